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

from wsicodec.errors import LimitError, SlideError, UnsupportedError
from wsicodec.slide import omexml
from wsicodec.slide.dates import aperio_date, iso_date, tiff_date

MAX_MPP = 100.0
"""Coarser is no microscope: 72 dpi (353 µm) is what image editors write by default."""

MAX_DIRECTORIES = 1000
"""A file of more images is no slide, and would take long to tell apart."""

# whole-slide formats on top of TIFF whose geometry or colours plain TIFF reading would get wrong
_OTHER_VENDORS = {
    "is_ndpi": "Hamamatsu NDPI",
    "is_philips": "Philips TIFF",
    "is_bif": "Ventana BIF",
    "is_scn": "Leica SCN",
    "is_qpi": "PerkinElmer QPTIFF",
}
_SOFTWARE, _DATE_TIME, _PAGE_NAME = 305, 306, 285
_NAMES = ("label", "macro", "thumbnail")


class VendorError(UnsupportedError):
    """A slide in a vendor's kind of TIFF, which OpenSlide may read. vendor: its name in words."""

    def __init__(self, path: Path, vendor: str) -> None:
        self.vendor = vendor
        super().__init__(
            f"{path}: {vendor} slides are not read as TIFF; open them with "
            "wsicodec.slide.open_slide, which asks OpenSlide for them"
        )


_OUR_XML = 'Creator="wsicodec '
_XML_HEAD = 4096


@dataclass(frozen=True)
class Layout:
    """A slide as its file describes it.

    format: ``svs``, ``ome-tiff``, ``tiff``. pages: tifffile pages of the levels, finest first.
    associated: (name, tifffile page) of the other images, names unique; None for a page that is
    more than one plane. description: the scanner's own, or empty.
    mpp_x, mpp_y: µm per pixel of level 0 by the vendor's or OME metadata, not the TIFF tags.
    acquisition_date: ISO 8601. vendor: of the scanner, as OpenSlide names it.
    """

    format: str
    pages: list[Any]
    associated: tuple[tuple[str, Any | None], ...]
    description: str
    mpp_x: float | None = None
    mpp_y: float | None = None
    magnification: float | None = None
    acquisition_date: str | None = None
    vendor: str | None = None


def find_layout(tiff: Any, path: Path) -> Layout:
    """Layout of an open tifffile.TiffFile.

    Raises VendorError for slides that only their own readers understand, UnsupportedError for
    images that are no slide of RGB, LimitError for too many of them, SlideError for broken files.
    """
    if not len(tiff.pages):
        raise SlideError(f"{path}: TIFF file without images")
    vendor = _other_vendor(tiff)
    if vendor:
        raise VendorError(path, vendor)
    if _is_olympus(tiff, path):
        raise UnsupportedError(
            f"{path}: Olympus VSI slides keep their pixels in .ets files beside them, which "
            "neither wsicodec nor OpenSlide reads; export the slide as OME-TIFF"
        )
    if tiff.is_ome:
        return _ome_layout(tiff, path)
    _check_number(len(tiff.pages), path)
    # tifffile by itself keeps only parts of later directories
    tiff.pages.useframes = False
    pages = [tiff.pages[index].aspage() for index in range(len(tiff.pages))]
    if tiff.is_imagej and int((tiff.imagej_metadata or {}).get("images", 1)) > len(pages):
        raise UnsupportedError(
            f"{path}: an ImageJ stack of focal planes, channels or times; wsicodec reads one plane"
        )
    levels, associated = _pyramid(tiff, pages, path)
    first = levels[0]
    description = str(first.description)
    values = aperio_values(description)
    if tiff.is_svs:
        mpp = positive_number(values.get("MPP"))
        return Layout(
            "svs",
            levels,
            associated,
            description,
            mpp,
            mpp,
            positive_number(values.get("AppMag")),
            aperio_date(values) or tiff_date(first.tags.valueof(_DATE_TIME)),
            "aperio",
        )
    magnification = None
    if description.startswith("wsicodec "):
        # a flat pyramid of our own: one line of ours, then the words of the scanner
        ours, _, description = description.partition("\n")
        magnification = positive_number(aperio_values(ours).get("AppMag"))
        date = iso_date(aperio_values(ours).get("Date")) or _date_of(description)
    else:
        date = tiff_date(first.tags.valueof(_DATE_TIME))
        # tifffile's own shape notes describe the array, not the slide
        description = re.sub(r'^{"shape".*', "", description)
    return Layout(
        "tiff",
        levels,
        associated,
        description,
        magnification=magnification,
        acquisition_date=date,
        vendor=_vendor_of(description),
    )


def _check_number(images: int, path: Path) -> None:
    if images > MAX_DIRECTORIES:
        raise LimitError(f"{path}: holds {images} images; slides have {MAX_DIRECTORIES} at most")


def _other_vendor(tiff: Any) -> str | None:
    for flag, vendor in _OTHER_VENDORS.items():
        if getattr(tiff, flag, False):
            return vendor
    if str(tiff.pages[0].tags.valueof(_SOFTWARE, "")).startswith("MedScan"):
        return "Trestle"  # its tiles overlap
    return None


def _is_olympus(tiff: Any, path: Path) -> bool:
    """A VSI file holds a small overview; the slide lies in a folder beside it."""
    return path.suffix.lower() == ".vsi" or (
        bool(tiff.pages[0].is_sis) and any(path.parent.glob(f"_{_literal(path.stem)}_/stack*"))
    )


def _literal(name: str) -> str:
    """A file name as a pattern that matches nothing else."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _vendor_of(description: str) -> str | None:
    return "aperio" if description.startswith("Aperio ") else None


def _date_of(description: str) -> str | None:
    if _vendor_of(description) is None:
        return None
    return aperio_date(aperio_values(description))


def _ome_layout(tiff: Any, path: Path) -> Layout:
    text = tiff.ome_metadata
    images = omexml.parse(text)
    series = [s for s in tiff.series if s.kind == "ome"]
    _check_number(len(series), path)
    if not series and "FileName=" in text:
        raise UnsupportedError(
            f"{path}: its OME-XML puts the image into several files, or into one of another name; "
            "wsicodec reads slides in one file"
        )
    if not series or not images:
        raise SlideError(f"{path}: OME-XML describes no image that is in the file")
    # the slide is the largest image; label and macro are further ones
    named = [_ome_name(str(s.name or "")) in _NAMES for s in series]
    index = max(range(len(series)), key=lambda i: (not named[i] or all(named), int(series[i].size)))
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
    others = [
        (_ome_name(str(s.name or "")) or f"image {i}", _one_page(tiff, s))
        for i, s in enumerate(series)
        if i != index
    ]
    description = image.description
    if description is None:
        # XML that was written for want of a scanner's words says nothing of the scanner
        description = "" if _OUR_XML in text[:_XML_HEAD] else text
    return Layout(
        "ome-tiff",
        pages,
        _unique(others),
        description,
        image.mpp_x,
        image.mpp_y,
        image.magnification,
        iso_date(image.acquisition_date) or _date_of(description),
        _vendor_of(description),
    )


def _ome_name(name: str) -> str:
    """Bio-Formats says "label image"."""
    short = name.strip().lower().removesuffix(" image")
    return short if short in _NAMES else name


def _one_page(tiff: Any, series: Any) -> Any | None:
    page = series.levels[0].pages[0]
    if len(series.levels[0].pages) != 1 or page is None or page.parent is not tiff:
        return None
    return page.aspage()


def _pyramid(
    tiff: Any, pages: list[Any], path: Path
) -> tuple[list[Any], tuple[tuple[str, Any], ...]]:
    """Levels among directories and SubIFDs, and the other images with their names.

    Level 0 is the largest image that is tiled and not called a label or such. A level has its
    shape within a rounding, is smaller than the one before, and is tiled if level 0 is:
    thumbnails and labels are stored in strips.
    """
    _check_number(max(len(page.subifds or ()) for page in pages), path)
    main = [page for page in pages if _told_name(page) is None] or pages
    main = [page for page in main if page.is_tiled] or main
    first = max(main, key=lambda page: int(page.imagelength) * int(page.imagewidth))
    rest = [*_sub_pages(tiff, first), *(page for page in pages if page is not first)]
    for page in rest:
        if _size(page) == _size(first) and _told_name(page) is None:
            raise UnsupportedError(
                f"{path}: several images of {first.imagelength} x {first.imagewidth} pixels: a "
                "stack of focal planes, channels or times; wsicodec reads one plane"
            )
    levels = [first]
    for page in sorted(rest, key=lambda page: -int(page.imagewidth)):
        if _is_level(page, levels[-1], first):
            levels.append(page)
    others = [page for page in rest if not any(page is level for level in levels)]
    return levels, _unique(
        [(_page_name(page, first, number), page) for number, page in enumerate(others, 1)]
    )


def _size(page: Any) -> tuple[int, int]:
    return int(page.imagelength), int(page.imagewidth)


def _sub_pages(tiff: Any, page: Any) -> Iterator[Any]:
    from tifffile import TiffPage

    for index, offset in enumerate(page.subifds or ()):
        if offset >= 8:
            tiff.filehandle.seek(offset)
            yield TiffPage(tiff, (page.index, index))


def _is_level(page: Any, before: Any, first: Any) -> bool:
    (height, width), (tall, wide) = _size(page), _size(before)
    if not (0 < height < tall and 0 < width < wide) or _told_name(page):
        return False
    if page.samplesperpixel != first.samplesperpixel or (first.is_tiled and not page.is_tiled):
        return False
    return _same_shape(page, first)


def _same_shape(page: Any, first: Any) -> bool:
    """True when one scale takes an image to the other, within a few pixels of rounding."""
    low, high = 0.0, float("inf")
    for side, whole in zip(_size(page), _size(first), strict=True):
        slack = 2 + 0.002 * side
        low = max(low, whole / (side + slack))
        high = min(high, whole / (side - slack) if side > slack else float("inf"))
    return low <= high


def _unique(named: list[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    """The same with a number behind names that were there before."""
    taken: set[str] = set()
    result = []
    for name, page in named:
        numbered = (f"{name} {number}" for number in itertools.count(2))
        free = next(text for text in itertools.chain([name], numbered) if text not in taken)
        taken.add(free)
        result.append((free, page))
    return tuple(result)


def _page_name(page: Any, first: Any, number: int) -> str:
    """What an image beside the pyramid is, by its words, else by its shape."""
    told = _told_name(page)
    if told is not None:
        return told
    if not page.is_tiled and first.is_tiled and _same_shape(page, first):
        return "thumbnail"
    return f"image {number} of {page.imagewidth} x {page.imagelength} pixels"


def _told_name(page: Any) -> str | None:
    """Name by the words of a directory, None where they do not say.

    Aperio's second line is "label 387x463", "macro 1280x431" or "46000x32914 -> 1024x732 - ...";
    levels have a size of tiles in brackets there. Our own flat files follow it.
    """
    lines = str(page.description).replace("\r", "").split("\n")
    for text in (lines[0], str(page.tags.valueof(_PAGE_NAME, ""))):
        if text.strip().lower() in _NAMES:
            return text.strip().lower()
    second = lines[1].strip() if len(lines) > 1 else ""
    ours = re.fullmatch(r"wsicodec \S+", lines[0]) is not None
    if not (ours or lines[0].startswith("Aperio")):
        return None
    for name in ("label", "macro"):
        if second.lower().startswith(name):
            return name
    if "->" in second and not page.is_tiled:
        return "thumbnail"
    if ours:
        match = re.fullmatch(r"(.+) \d+x\d+", second)
        return match[1] if match else None
    if page.is_tiled:
        return None
    # the words were taken away, as de-identification does: the subfile type is left
    return {1: "label", 9: "macro"}.get(int(page.subfiletype))


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
