"""``python -m wsicodec.cli``, where the ``wsicodec`` script is not on the path."""

import sys

from wsicodec.cli import main

sys.exit(main())
