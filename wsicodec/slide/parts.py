"""Which files a slide is made of whose format spreads it over several."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from wsicodec.slide.pages import usable

_MAX_NEIGHBOURS = 1000  # files beside a DICOM slide that are looked into for its series
_DICOM_HEAD = 2**16  # bytes of a file within which it names its series
_SERIES = b"\x20\x00\x0e\x00UI"  # tag (0020,000E), explicit and little-endian
_VMS_FILE = re.compile(r"hamamatsu\.(ImageFile(\(.+\))?|MapFile|OptimisationFile|MacroImage)")


def slide_bytes(path: Path, vendor: str, properties: Mapping[str, str]) -> int:
    """Bytes of all files of a slide. Arguments and errors as ``slide_files``."""
    with usable(path):
        size = path.stat().st_size
    for other in slide_files(path, vendor, properties)[1:]:
        # one that has vanished meanwhile has no bytes
        with contextlib.suppress(OSError):
            size += other.lstat().st_size if vendor == "mirax" else other.stat().st_size
    return size


def slide_files(path: Path, vendor: str, properties: Mapping[str, str]) -> list[Path]:
    """All files of a slide, the one by which it is opened first, the others by name.

    path: the file by which it is opened; vendor, properties: by OpenSlide. Names that a file tells
    count where they lie beside it; other files that cannot be read do not. Raises SlideError where
    the system refuses the first.
    """
    with usable(path):
        path.stat()
        if vendor == "mirax":
            others = files_below(path.with_suffix(""))
        elif vendor == "dicom":
            others = _of_series(path, properties.get("dicom.SeriesInstanceUID", ""))
        elif vendor == "hamamatsu":
            names = {value for key, value in properties.items() if _VMS_FILE.fullmatch(key)}
            beside = (path.parent / name for name in names if name == Path(name).name)
            others = (other for other in beside if other.is_file())
        else:
            return [path]
        return [path, *sorted(other for other in others if other != path)]


def files_below(folder: Path) -> Iterator[Path]:
    """Everything below a folder that is no folder; links to folders are not followed."""
    for root, _, names in os.walk(folder):
        for name in names:
            yield Path(root) / name


def _of_series(path: Path, series: str) -> Iterator[Path]:
    """Files of the same folder and extension that are of this series."""
    if not series:
        return
    value = series.encode("ascii", "replace")
    value += b"\0" * (len(value) % 2)
    wanted = _SERIES + len(value).to_bytes(2, "little") + value
    looked = 0
    # what cannot be read, or vanishes, is no part of the slide
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if Path(entry.name).suffix.lower() != path.suffix.lower():
                continue
            looked += 1
            if looked > _MAX_NEIGHBOURS:
                return
            head = b""
            with contextlib.suppress(OSError):
                if entry.is_file():
                    with open(entry.path, "rb") as file:  # noqa: PTH123 - of an entry
                        head = file.read(_DICOM_HEAD)
            if head[128:132] == b"DICM" and wanted in head:
                yield path.parent / entry.name
