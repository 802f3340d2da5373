"""How many bytes a slide has that its format spreads over several files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from wsicodec.slide.pages import usable
from wsicodec.slide.zarrarray import folder_bytes

_MAX_FILES = 10_000  # of a folder that is searched for the parts of a DICOM slide
_DICOM_HEAD = 2**16  # bytes of a file within which it names its series
_SERIES = b"\x20\x00\x0e\x00UI"  # tag (0020,000E), explicit and little-endian
_VMS_FILE = re.compile(r"hamamatsu\.(ImageFile(\(.+\))?|MapFile|OptimisationFile|MacroImage)")


def slide_bytes(path: Path, vendor: str, properties: Mapping[str, str]) -> int:
    """Bytes of all files of a slide.

    path: the file by which it is opened; vendor, properties: by OpenSlide. Names that a file tells
    count where they lie beside it. Raises SlideError where the system refuses.
    """
    with usable(path):
        size = path.stat().st_size
        if vendor == "mirax":
            return size + folder_bytes(path.with_suffix(""))
        if vendor == "dicom":
            others = _of_series(path, properties.get("dicom.SeriesInstanceUID", ""))
        elif vendor == "hamamatsu":
            names = {value for key, value in properties.items() if _VMS_FILE.fullmatch(key)}
            others = (path.parent / name for name in names if name == Path(name).name)
        else:
            return size
        return size + sum(
            other.stat().st_size for other in others if other != path and other.is_file()
        )


def _of_series(path: Path, series: str) -> Iterator[Path]:
    """Files of the same folder that are of this series, as OpenSlide looks for them."""
    if not series:
        return
    value = series.encode("ascii", "replace")
    value += b"\0" * (len(value) % 2)
    wanted = _SERIES + len(value).to_bytes(2, "little") + value
    for number, other in enumerate(path.parent.iterdir()):
        if number == _MAX_FILES:
            return
        if not other.is_file():
            continue
        with other.open("rb") as file:
            head = file.read(_DICOM_HEAD)
        if head[128:132] == b"DICM" and wanted in head:
            yield other
