"""What a conversion can be asked for, by name.

By itself, so that the command line can tell the names before anything heavy is imported.
"""

from __future__ import annotations

CONVERT_CODECS = ("learned", "jpeg", "jpeg2000", "jpegxl", "webp", "lossless", "copy")
MEASURES = ("none", "sample", "all")
GLASS_MODES = ("keep", "fill", "drop")
TISSUE_METHODS = ("network", "otsu")
MACROS = ("drop", "blank")
LAYOUTS = ("subifd", "flat")
