"""Opens a slide with the reader that its bytes ask for, whatever the file is called."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from wsicodec.errors import RuntimeMissingError, SlideError, UnsupportedError, WsicodecError
from wsicodec.slide.layout import VendorError
from wsicodec.slide.pages import file_start, is_tiff
from wsicodec.slide.protocol import DEFAULT_CACHE_BYTES, SlideReader

if TYPE_CHECKING:
    from wsicodec.slide.tiff import TiffReader
    from wsicodec.slide.zarrreader import ZarrReader

_START_BYTES = 256
_ZARR_NAMES = ("zarr.json", ".zgroup")

# what files that are no TIFF start with, at which byte
_VENDOR_STARTS = (
    (128, b"DICM", "DICOM"),
    (0, b"SQLite format 3\0", "Sakura (SQLite)"),
    (0, b"ZISRAWFILE", "Zeiss CZI"),
    (0, b"[Virtual Microscope Specimen]", "Hamamatsu VMS"),
    (0, b"[Uncompressed Virtual Microscope Specimen]", "Hamamatsu VMU"),
)
_OTHER_STARTS = (
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG-2000 image"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (8, b"WEBP", "a WebP image"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"%PDF", "a PDF document"),
    (0, b"SIS\0", "the pixel data of an Olympus VSI slide"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
)


def open_slide(
    path: str | os.PathLike[str], cache_bytes: int = DEFAULT_CACHE_BYTES, *, strict: bool = False
) -> SlideReader:
    """An open slide of any format that wsicodec reads, told by its content.

    SVS, OME-TIFF and plain TIFF are read by ``TiffReader``; folders of OME-Zarr by ``ZarrReader``;
    vendors' other formats by ``OpenSlideReader``. cache_bytes: decoded tiles kept at most.
    strict: as ``TiffReader`` has it; formats read by OpenSlide are read as it reads them.

    Raises as the readers do: SlideError for files that are missing, empty, damaged or no slides,
    UnsupportedError for slides that neither reads, RuntimeMissingError where OpenSlide would be
    needed and is not installed.
    """
    path = Path(path)
    if _is_zarr(path):
        from wsicodec.slide.zarrreader import ZarrReader

        return ZarrReader(path, cache_bytes)
    start = file_start(path, _START_BYTES)
    if not is_tiff(start):
        return _open_other(path, start, cache_bytes)
    from wsicodec.slide.tiff import TiffReader

    try:
        return TiffReader(path, cache_bytes, strict=strict)
    except VendorError as error:
        return _open_vendor(path, error.vendor, cache_bytes)
    except WsicodecError:
        # NDPI of more than 4 GiB under another name looks like a damaged TIFF
        if _known_to_openslide(path) in (None, "aperio", "generic-tiff"):
            raise
    return _open_vendor(path, "vendor's", cache_bytes)


def open_tiles(
    path: str | os.PathLike[str], cache_bytes: int = DEFAULT_CACHE_BYTES
) -> TiffReader | ZarrReader:
    """An open slide whose own coded tiles can be read one by one: TIFF or OME-Zarr.

    Raises as ``open_slide``, UnsupportedError for other formats.
    """
    from wsicodec.slide.tiff import TiffReader
    from wsicodec.slide.zarrreader import ZarrReader

    slide = open_slide(path, cache_bytes)
    if isinstance(slide, (TiffReader, ZarrReader)):
        return slide
    slide.close()
    raise UnsupportedError(
        f"{path}: tiles of {slide.info.format} slides cannot be looked at one by one; convert it"
    )


def _is_zarr(path: Path) -> bool:
    try:
        return path.is_dir() and any((path / name).exists() for name in _ZARR_NAMES)
    except (OSError, ValueError):
        return False  # file_start says what the system has against the name


def _known_to_openslide(path: Path) -> str | None:
    """OpenSlide's name of a file's format, None without one, or without OpenSlide."""
    from wsicodec.slide.openslide import detect

    try:
        return detect(path)
    except WsicodecError:
        return None


def _open_vendor(path: Path, vendor: str, cache_bytes: int) -> SlideReader:
    """A slide whose first bytes say that it is a vendor's."""
    from wsicodec.slide.openslide import OpenSlideReader, detect

    try:
        found = detect(path)
    except RuntimeMissingError as error:
        raise RuntimeMissingError(f"{path}: {vendor} slide: {error}") from error
    # as plain TIFF its geometry or colours would be wrong
    if found is None or found == "generic-tiff":
        raise UnsupportedError(
            f"{path}: {vendor} slide of a kind that neither wsicodec nor OpenSlide reads"
        )
    return OpenSlideReader(path, cache_bytes)


def _open_other(path: Path, start: bytes, cache_bytes: int) -> SlideReader:
    """A file that is no TIFF."""
    for offset, magic, vendor in _VENDOR_STARTS:
        if start.startswith(magic, offset):
            return _open_vendor(path, vendor, cache_bytes)
    if path.suffix.lower() == ".mrxs":
        # an image of the slide under this name, the slide itself in a folder beside it
        return _open_vendor(path, "3DHISTECH MIRAX", cache_bytes)
    for offset, magic, kind in _OTHER_STARTS:
        if start.startswith(magic, offset):
            raise SlideError(f"{path}: is {kind}, not a slide")
    if _known_to_openslide(path) is None:
        raise SlideError(
            f"{path}: neither a TIFF file nor a slide that OpenSlide knows (starts with "
            f"{start[:4].hex(' ')})"
        )
    return _open_vendor(path, "vendor's", cache_bytes)
