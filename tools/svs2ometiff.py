"""Convert a slide: ``python tools/svs2ometiff.py slide.svs slide.ome.tiff``.

The same as ``wsicodec convert``, with all its options.
"""

from __future__ import annotations

import sys

from wsicodec.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
