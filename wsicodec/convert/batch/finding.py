"""Which files below a folder are slides."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wsicodec.errors import RuntimeMissingError, SlideError, UnsupportedError, WsicodecError

SLIDE_SUFFIXES = (
    ".ome.tiff",
    ".ome.tif",
    ".ome.btf",
    ".tiff",
    ".tif",
    ".btf",
    ".svs",
    ".ndpi",
    ".scn",
    ".bif",
    ".mrxs",
    ".vms",
    ".vmu",
    ".svslide",
    ".qptiff",
    ".czi",
    ".isyntax",
    ".dcm",
)
"""Names that promise a slide: such a file is converted, or fails by name. A file called otherwise
is a slide when it opens as one, or would with the right library."""


@dataclass(frozen=True)
class Found:
    """A slide. source: path below the folder with ``/``. file_bytes, file_mtime_ms: of the file."""

    source: str
    file_bytes: int
    file_mtime_ms: int


@dataclass(frozen=True)
class Findings:
    """Slides by name, and the folders that could not be read, with the reason."""

    slides: tuple[Found, ...]
    unreadable: tuple[str, ...]


def find_slides(
    folder: Path,
    patterns: Sequence[str] = (),
    *,
    skip: Collection[Path] = (),
    outputs: Collection[Path] = (),
    known: Mapping[str, tuple[int, int]] | None = None,
) -> Findings:
    """Slides in and below a folder.

    patterns: shell patterns for the name or the path below the folder, upper and lower case alike;
    a file that matches is a slide whatever it is called. skip: folders left out. outputs: files
    left out. known: size and time of slides that need not be opened again.

    Hidden files and folders are left out, and links to folders are not followed. Raises SlideError
    where the folder cannot be read at all.
    """
    if not folder.is_dir():
        raise SlideError(f"{folder}: is no folder that can be read")
    left_out = {os.path.realpath(path) for path in skip}
    written = {os.path.realpath(path) for path in outputs}
    unreadable: list[str] = []
    slides: list[Found] = []
    series: set[tuple[Path, str] | None] = set()
    for path in _files(folder, left_out, unreadable):
        source = path.relative_to(folder).as_posix()
        if patterns and not _matches(source, patterns):
            continue
        try:
            status = path.stat()
            if written and os.path.realpath(path) in written:
                continue
        except OSError:  # a dangling link, or gone meanwhile
            continue
        found = Found(source, status.st_size, status.st_mtime_ns // 1_000_000)
        promised = bool(patterns) or path.name.lower().endswith(SLIDE_SUFFIXES)
        seen = (known or {}).get(source) == (found.file_bytes, found.file_mtime_ms)
        if not (promised or seen or _opens(path)):
            continue
        one = _series(path)
        if one is not None and one in series:
            continue
        series.add(one)
        slides.append(found)
    return Findings(tuple(slides), tuple(unreadable))


def _files(folder: Path, skip: Collection[str], unreadable: list[str]) -> Iterator[Path]:
    def refused(error: OSError) -> None:
        unreadable.append(f"{error.filename}: {error.strerror or error}")

    for parent, folders, files in os.walk(folder, onerror=refused):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(Path(parent, name)) not in skip
        )
        for name in sorted(files):
            path = Path(parent, name)
            # not Path.is_file(), which raises where a link leads out of reach
            if not name.startswith(".") and os.path.isfile(path):  # noqa: PTH113
                yield path


def _matches(source: str, patterns: Sequence[str]) -> bool:
    path = source.lower()
    name = path.rpartition("/")[2]
    return any(
        fnmatch.fnmatchcase(text, pattern.lower()) for pattern in patterns for text in (path, name)
    )


def _opens(path: Path) -> bool:
    from wsicodec.slide.opening import open_slide

    try:
        open_slide(path).close()
    except (UnsupportedError, RuntimeMissingError):
        # a slide, and why it cannot be converted is for the conversion to say; but not every
        # database is one of the scanners that keep slides in such
        return not _starts_with(path, b"SQLite format 3\0")
    except (WsicodecError, OSError):
        return False
    return True


def _series(path: Path) -> tuple[Path, str] | None:
    """Folder and series of a DICOM slide, whose levels are files of their own; None for others."""
    if not _starts_with(path, b"DICM", at=128):
        return None
    try:
        import openslide

        with openslide.OpenSlide(path) as slide:
            name = slide.properties.get("dicom.SeriesInstanceUID")
    except (ImportError, OSError):
        return None
    except openslide.OpenSlideError:
        return None
    return None if name is None else (path.parent, name)


def _starts_with(path: Path, magic: bytes, *, at: int = 0) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(at + len(magic))[at:] == magic
    except OSError:
        return False
