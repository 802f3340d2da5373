"""Which TIFF directories of a file are its pyramid, and what its metadata says of it.

Directories are told apart by what they hold, not by their position in the file.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsicodec.errors import SlideError, UnsupportedError
from wsicodec.slide import omexml

MAX_MPP = 100.0
"""Coarser is no microscope: 72 dpi (353 µm) is what image editors write by default."""

# whole-slide formats on top of TIFF whose geometry or colours plain TIFF reading would get wrong
_OTHER_VENDORS = {
    "is_ndpi": "Hamamatsu NDPI",
    "is_philips": "Philips TIFF",
    "is_bif": "Ventana BIF",
    "is_scn": "Leica SCN",
    "is_qpi": "PerkinElmer QPTIFF",
}


@dataclass(frozen=True)
class Layout:
    """A slide as its file describes it.

    format: ``svs``, ``ome-tiff``, ``tiff``. pages: tifffile pages of the levels, finest first.
    associated: names of the other images. description: the scanner's own, or empty.
    mpp_x, mpp_y: µm per pixel of level 0 by the vendor's or OME metadata, not the TIFF tags.
    """

    format: str
    pages: list[Any]
    associated: tuple[str, ...]
    description: str
    mpp_x: float | None = None
    mpp_y: float | None = None
    magnification: float | None = None


def find_layout(tiff: Any, path: Path) -> Layout:
    """Layout of an open tifffile.TiffFile. Raises UnsupportedError, SlideError."""
    for flag, vendor in _OTHER_VENDORS.items():
        if getattr(tiff, flag, False):
            raise UnsupportedError(
                f"{path}: {vendor} slides are not read by this version; wsicodec reads SVS, "
                "OME-TIFF and plain TIFF"
            )
    if not len(tiff.pages):
        raise SlideError(f"{path}: TIFF file without images")
    if tiff.is_ome:
        return _ome_layout(tiff, path)
    # tifffile by itself keeps only parts of later directories
    tiff.pages.useframes = False
    pages = [tiff.pages[index].aspage() for index in range(len(tiff.pages))]
    levels, associated = _pyramid(tiff, pages, path)
    description = str(pages[0].description)
    values = aperio_values(description)
    mpp = positive_number(values.get("MPP"))
    magnification = positive_number(values.get("AppMag"))
    if tiff.is_svs:
        return Layout("svs", levels, associated, description, mpp, mpp, magnification)
    if description.startswith("wsicodec "):
        # a flat pyramid of our own: one line of ours, then the words of the scanner
        ours, _, description = description.partition("\n")
        magnification = positive_number(aperio_values(ours).get("AppMag"))
        return Layout("tiff", levels, associated, description, magnification=magnification)
    # tifffile's own shape notes describe the array, not the slide
    return Layout("tiff", levels, associated, re.sub(r'^{"shape".*', "", description))


def _ome_layout(tiff: Any, path: Path) -> Layout:
    text = tiff.ome_metadata
    images = omexml.parse(text)
    series = [s for s in tiff.series if s.kind == "ome"]
    if not series or not images:
        raise SlideError(f"{path}: OME-XML describes no image that is in the file")
    # the slide is the largest image; label and macro are further ones
    index = max(range(len(series)), key=lambda i: int(series[i].size))
    main = series[index]
    image = images[index] if len(images) == len(series) else images[0]
    if image.planes > 1 or main.axes not in ("YXS", "SYX"):
        raise UnsupportedError(
            f"{path}: OME image has axes {main.axes} of {main.shape}; wsicodec reads one plane of "
            "RGB (brightfield), not fluorescence, stacks or time series"
        )
    pages = []
    for level in main.levels:
        page = level.pages[0]
        if len(level.pages) != 1 or page is None or page.parent is not tiff:
            raise UnsupportedError(
                f"{path}: OME image is spread over several TIFF directories or files; wsicodec "
                "reads interleaved RGB in one"
            )
        pages.append(page.aspage())
    for before, page in itertools.pairwise(pages):
        if page.imagewidth >= before.imagewidth or page.imagelength >= before.imagelength:
            raise SlideError(f"{path}: levels of the pyramid do not become smaller")
    associated = tuple(s.name or f"image {i}" for i, s in enumerate(series) if i != index)
    return Layout(
        "ome-tiff",
        pages,
        associated,
        text if image.description is None else image.description,
        image.mpp_x,
        image.mpp_y,
        image.magnification,
    )


def _pyramid(tiff: Any, pages: list[Any], path: Path) -> tuple[list[Any], tuple[str, ...]]:
    """Levels among directories and SubIFDs, and the names of the other images.

    A level has the shape of level 0 within a rounding, is smaller than the one before, and is
    tiled if level 0 is: thumbnails and labels are stored in strips.
    """
    first = pages[0]
    levels: list[Any] = [first]
    others: list[str] = []
    for page in (*_sub_pages(tiff, first), *pages[1:]):
        if (page.imagelength, page.imagewidth) == (first.imagelength, first.imagewidth):
            raise UnsupportedError(
                f"{path}: several images of {first.imagelength} x {first.imagewidth} pixels: a "
                "stack of focal planes, channels or times; wsicodec reads one plane"
            )
        if _is_level(page, levels[-1], first):
            levels.append(page)
        else:
            others.append(_page_name(page, len(others)))
    return levels, tuple(others)


def _sub_pages(tiff: Any, page: Any) -> Iterator[Any]:
    from tifffile import TiffPage

    for index, offset in enumerate(page.subifds or ()):
        if offset >= 8:
            tiff.filehandle.seek(offset)
            yield TiffPage(tiff, (page.index, index))


def _is_level(page: Any, before: Any, first: Any) -> bool:
    height, width = page.imagelength, page.imagewidth
    if not (0 < height < before.imagelength and 0 < width < before.imagewidth):
        return False
    if page.samplesperpixel != first.samplesperpixel or (first.is_tiled and not page.is_tiled):
        return False
    # one pixel of rounding in the smaller image, a little more in large ones
    expected = first.imagelength * width / first.imagewidth
    return bool(abs(expected - height) <= 1 + 0.002 * height)


def _page_name(page: Any, index: int) -> str:
    # Aperio's second line: "label 387x463", "macro 1280x431" or "46000x32914 -> 1024x732 - ..."
    lines = str(page.description).replace("\r", "").split("\n")
    second = lines[1].lower() if len(lines) > 1 else ""
    for name in ("label", "macro"):
        if second.startswith(name):
            return name
    if "->" in second:
        return "thumbnail"
    return f"image {index + 1} of {page.imagewidth} x {page.imagelength} pixels"


def aperio_values(description: str) -> dict[str, str]:
    """``key = value`` pairs of an Aperio ImageDescription; the first of a key counts."""
    values: dict[str, str] = {}
    for item in description.split("|"):
        key, equals, value = item.partition("=")
        if equals:
            values.setdefault(key.strip(), value.strip())
    return values


def lossy_history(description: str, compression: str) -> tuple[str, ...]:
    """Lossy codings that an Aperio description names, oldest first; else the file's own."""
    steps = [
        f"{'jpeg' if name == 'JPEG' else 'jpeg2000'} q{quality}"
        for name, quality in re.findall(r"\b(JPEG|J2K)/\w+ Q=(\d+)", description)
    ]
    if steps:
        return tuple(reversed(steps))  # Aperio puts the latest step first
    lossy = ("jpeg", "jpeg2000", "jpegxl", "webp", "wsicodec")
    return (compression,) if compression in lossy else ()


def resolution_mpp(tags: Any) -> tuple[float | None, float | None]:
    """µm per pixel by the TIFF resolution tags (x, y); None without a unit or above MAX_MPP."""
    unit = {2: 25400.0, 3: 10000.0}.get(int(tags.valueof(296, 2) or 0))
    values: list[float | None] = []
    for code in (282, 283):
        value = tags.valueof(code)
        mpp = None
        if unit and isinstance(value, tuple) and len(value) == 2 and value[0] and value[1]:
            mpp = unit * value[1] / value[0]
        values.append(mpp if mpp and mpp < MAX_MPP else None)
    return values[0], values[1] or values[0]


def positive_number(text: str | None) -> float | None:
    """A finite number above zero, else None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None
