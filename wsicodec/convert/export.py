"""Back to what every reader knows: a JPEG pyramid, as OME-TIFF or as plain TIFF.

OpenSlide, libvips and viewers built on them never run Python, so they will not read learned tiles;
an exported file is for them.
"""

from __future__ import annotations

from pathlib import Path

from wsicodec.convert.pipeline import convert
from wsicodec.convert.plan import ConvertSettings
from wsicodec.convert.results import ConvertReport, Progress
from wsicodec.errors import SettingsError

EXPORT_CODECS = ("jpeg", "jpeg2000", "jpegxl", "webp", "lossless")
EXPORT_QUALITY = 90
"""The pixels were coded once already: the second coding must not be what one sees."""


def export(
    source: str | Path,
    target: str | Path,
    settings: ConvertSettings | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Decode a slide, of any format that wsicodec reads, and code it with a standard codec.

    settings: default JPEG at EXPORT_QUALITY as OME-TIFF; ``layout="flat"`` writes the pyramid that
    OpenSlide and libvips see whole.

    Raises SettingsError for ``codec="learned"``, else as ``convert``.
    """
    chosen = settings or ConvertSettings(codec="jpeg", quality=EXPORT_QUALITY, measure="none")
    if chosen.codec not in EXPORT_CODECS:
        raise SettingsError(
            f"export writes {', '.join(EXPORT_CODECS)}, not {chosen.codec!r}; use convert"
        )
    return convert(source, target, chosen, progress)
