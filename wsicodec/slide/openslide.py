"""Slides that OpenSlide reads: NDPI, MIRAX, SCN, BIF, Philips, VMS, DICOM, Sakura, Trestle, Zeiss.

``OpenSlideReader`` gives their levels as RGB. OpenSlide aligns the levels of a slide to each other
by their sizes alone: where the origins of a scanner's levels differ by a pixel, so do they here.

What lies outside the scanned area is transparent for OpenSlide, and gets the slide's background
colour here (white where it names none). Slides with bounds are cropped to them: a MIRAX slide is
mostly empty margin. Each level is cropped at its pixel nearest to the bounds.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from wsicodec.errors import (
    LimitError,
    RuntimeMissingError,
    SettingsError,
    SlideError,
    UnsupportedError,
)
from wsicodec.forking import renewed_after_fork
from wsicodec.slide.associated import MAX_ASSOCIATED_BYTES
from wsicodec.slide.cache import SegmentCache
from wsicodec.slide.dates import openslide_date
from wsicodec.slide.layout import lossy_history, positive_number
from wsicodec.slide.pages import compression_name, file_start, is_tiff
from wsicodec.slide.parts import slide_bytes
from wsicodec.slide.protocol import (
    DEFAULT_CACHE_BYTES,
    AssociatedImage,
    Image,
    Level,
    SlideInfo,
    SlideReader,
)
from wsicodec.slide.region import empty_region

INSTALL = 'pip install "wsicodec[openslide]"'

_PIECE_PIXELS = 2**22  # read at once: four bytes a pixel on the way
_TILE = 256  # of slides that do not tell the size of theirs
_SHORTEST, _LONGEST = 512, 2048  # sides of the blocks that levels of uneven scale are read in
_ALIGNED = 1 / 512  # of a pixel: OpenSlide draws without interpolation below
_LOSSY = ("jpeg", "jpeg2000", "jpegxl", "webp", "jpegxr")
_DICOM = "1.2.840.10008.1.2"
_DICOM_SYNTAXES = {
    _DICOM: "none",
    f"{_DICOM}.1": "none",
    f"{_DICOM}.4.50": "jpeg",
    f"{_DICOM}.4.51": "jpeg",
    f"{_DICOM}.4.80": "jpegls",
    f"{_DICOM}.4.90": "jpeg2000",
    f"{_DICOM}.4.91": "jpeg2000",
    f"{_DICOM}.4.112": "jpegxl",
    f"{_DICOM}.5": "rle",
}
_DICOM_METHODS = {
    "ISO_10918_1": "jpeg",
    "ISO_14495_1": "jpegls",
    "ISO_15444_1": "jpeg2000",
    "ISO_18181_1": "jpegxl",
}
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Grid:
    """Where a level lies in OpenSlide's.

    top, left: OpenSlide's pixel of that level that is ours at (0, 0). scale: pixels of level 0 to
    one of the level, by which OpenSlide takes positions. rows, columns: where blocks start, in our
    pixels; empty for levels that can be read at any pixel without interpolation.
    """

    top: int
    left: int
    height: int
    width: int
    scale: float
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()


class OpenSlideReader(SlideReader):
    """An open slide of a format that OpenSlide knows. Thread-safe.

    path: the file. cache_bytes: of tiles that OpenSlide keeps, and of blocks that are kept here.

    OpenSlide addresses all levels by whole pixels of level 0. In a level whose scale is no whole
    number most pixels lie between those, and OpenSlide would interpolate, differently for each
    region. Such levels are read in fixed blocks that start where a pixel of the level falls on one
    of level 0, or as near as there is: a pixel has one value, whatever region is asked for.

    Raises RuntimeMissingError where OpenSlide is not installed, SlideError for files that are
    missing, empty or damaged, UnsupportedError for those that OpenSlide does not read.
    """

    def __init__(
        self, path: str | os.PathLike[str], cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        self.path = Path(path)
        start = file_start(self.path, 64)
        vendor = detect(self.path)
        if vendor is None:
            raise UnsupportedError(f"{self.path}: not a slide of a format that OpenSlide reads")
        self._handle = _Handle(self.path, vendor, cache_bytes)
        try:
            self._open(vendor, start)
        except BaseException:
            self._handle.close()
            raise
        uneven = any(grid.rows for grid in self._grids)
        self._cache = SegmentCache(cache_bytes if uneven else 0)

    def _open(self, vendor: str, start: bytes) -> None:
        properties, sizes, scales, profile, names = self._handle.run(_describe, "opened")
        self._background = _background(properties)
        self._grids = _grids(sizes, scales, _bounds(properties, sizes[0]))
        self._associated = names
        mpp_x = positive_number(properties.get("openslide.mpp-x"))
        mpp_y = positive_number(properties.get("openslide.mpp-y"))
        description = properties.get("openslide.comment", "")
        compression = _compression(self.path, vendor, properties, start)
        self.info = SlideInfo(
            path=self.path,
            format=vendor,
            file_bytes=slide_bytes(self.path, vendor, properties),
            levels=tuple(
                Level(
                    index,
                    grid.height,
                    grid.width,
                    self._grids[0].width / grid.width,
                    *_tile(properties, index, grid),
                )
                for index, grid in enumerate(self._grids)
            ),
            mpp_x=mpp_x or mpp_y,
            mpp_y=mpp_y or mpp_x,
            magnification=positive_number(properties.get("openslide.objective-power")),
            photometric="rgb",
            compression=compression,
            icc_profile=profile,
            description=description or None,
            history=_history(properties, description, compression),
            associated=names,
            record=None,
            acquisition_date=openslide_date(properties),
            vendor=vendor,
        )

    def read_region(self, level: int, y: int, x: int, height: int, width: int) -> Image:
        """Pixels of a rectangle as a new uint8 (height, width, 3) RGB array.

        level: index; y, x: top left pixel in that level; the rectangle must lie inside the level.
        Raises SettingsError for a rectangle outside, SlideError naming what is damaged.
        """
        self._handle.check()
        if not 0 <= level < len(self._grids):
            raise SettingsError(f"{self.path}: no level {level} among {len(self._grids)}")
        grid = self._grids[level]
        place = y, x, height, width
        region = empty_region((grid.height, grid.width), f"{self.path}: level {level}", place)
        if not region.size:
            return region
        if grid.rows:
            self._fill_from_blocks(region, level, y, x)
            return region
        rows = max(1, _PIECE_PIXELS // width)
        for top in range(0, height, rows):
            part = region[top : top + rows]
            part[:] = self._read(level, y + top, x, part.shape[0], width)
        return region

    def _fill_from_blocks(self, region: Image, level: int, y: int, x: int) -> None:
        grid = self._grids[level]
        height, width = region.shape[:2]
        for row in _touched(grid.rows, y, height):
            top = grid.rows[row]
            for column in _touched(grid.columns, x, width):
                left = grid.columns[column]
                block = self._block(level, row, column)
                y0, y1 = max(y, top), min(y + height, top + block.shape[0])
                x0, x1 = max(x, left), min(x + width, left + block.shape[1])
                region[y0 - y : y1 - y, x0 - x : x1 - x] = block[
                    y0 - top : y1 - top, x0 - left : x1 - left
                ]

    def _block(self, level: int, row: int, column: int) -> Image:
        grid = self._grids[level]
        top, left = grid.rows[row], grid.columns[column]
        bottom = (*grid.rows[1:], grid.height)[row]
        right = (*grid.columns[1:], grid.width)[column]
        return self._cache.get(
            (level, row, column), lambda: self._read(level, top, left, bottom - top, right - left)
        )

    def _read(self, level: int, y: int, x: int, height: int, width: int) -> Image:
        grid = self._grids[level]
        place = round((grid.left + x) * grid.scale), round((grid.top + y) * grid.scale)
        image = self._handle.run(
            lambda slide: slide.read_region(place, level, (width, height)),
            f"read: level {level}: region of {height} x {width} at ({y}, {x})",
        )
        return _rgb(image, self._background)

    def read_associated(self, name: str) -> AssociatedImage:
        """The image of this name (one of ``info.associated``), over the background colour.

        Raises SettingsError for another name, LimitError above MAX_ASSOCIATED_BYTES, SlideError
        where it is damaged.
        """
        self._handle.check()
        if name not in self._associated:
            raise SettingsError(
                f"{self.path}: no image {name!r} beside the slide; there are "
                f"{', '.join(self._associated) or 'none'}"
            )

        def read(slide: Any) -> Any:
            told = (slide.properties.get(f"openslide.associated.{name}.{s}") for s in _SIDES)
            height, width = (int(side or 0) for side in told)
            if height * width * 4 > MAX_ASSOCIATED_BYTES:
                raise LimitError(
                    f"{self.path}: image {name!r} of {width} x {height} pixels needs more than "
                    f"{MAX_ASSOCIATED_BYTES} bytes"
                )
            return slide.associated_images[name].convert("RGBA")

        image = self._handle.run(read, f"read: image {name!r}")
        return AssociatedImage(name, _rgb(image, self._background))

    def embedded_model(self) -> bytes | None:
        """None: no such slide carries one."""
        self._handle.check()
        return None

    def embedded_passport(self) -> bytes | None:
        """None: no such slide has one."""
        self._handle.check()
        return None

    def close(self) -> None:
        """Close the file, once the reads in other threads are done; reading raises SlideError."""
        self._handle.close()


_SIDES = ("height", "width")


def detect(path: Path) -> str | None:
    """OpenSlide's name of a file's format, None for a file that it does not know.

    Raises RuntimeMissingError, SlideError.
    """
    library = _library()
    try:
        found: str | None = library.OpenSlide.detect_format(os.fspath(path))
    except (library.OpenSlideError, OSError) as error:
        raise SlideError(f"{path}: {error}") from error
    return found


def _library() -> Any:
    try:
        import openslide
    except (ImportError, OSError) as error:
        raise RuntimeMissingError(
            f"OpenSlide is not installed, which reads slides of this format: {INSTALL}"
        ) from error
    return openslide


class _Handle:
    """An OpenSlide object that threads share.

    Once OpenSlide met an error it answers everything with that error: the slide is then opened
    anew, for the others and to ask again whether it was this request that failed. So it is in a
    forked process: both would move the place at which one open file is read.
    """

    def __init__(self, path: Path, vendor: str, cache_bytes: int) -> None:
        self._path, self._vendor = path, vendor
        self._library, self._cache_bytes = _library(), max(0, cache_bytes)
        self._left_behind: list[Any] = []
        self._slide: Any = None
        self._tiles: Any = None
        self._closed = False
        self.renew()
        self._slide = self._shared()
        renewed_after_fork(self)

    def renew(self) -> None:
        """Begin anew, without a slide; the one of before is not even closed, threads may use it."""
        self._left_behind += [it for it in (self._slide, self._tiles) if it is not None]
        self._slide = self._tiles = None
        self._changed = threading.Condition()
        self._users: dict[int, int] = {}

    def check(self) -> None:
        if self._closed:
            raise SlideError(f"{self._path}: the slide is closed")

    def run(self, ask: Callable[[Any], _T], what: str) -> _T:
        """What ``ask`` gives for the slide; SlideError "cannot be ``what``" where it cannot."""
        try:
            with self._borrowed() as slide:
                return ask(slide)
        except self._library.OpenSlideError:
            alone = self._opened()
        try:
            return ask(alone)
        except self._library.OpenSlideError as error:
            raise SlideError(f"{self._path}: cannot be {what}: {error}") from error
        finally:
            alone.close()

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[Any]:
        with self._changed:
            self.check()
            if self._slide is None:
                self._slide = self._shared()
            slide = self._slide
            self._users[id(slide)] = self._users.get(id(slide), 0) + 1
        failed = False
        try:
            yield slide
        except self._library.OpenSlideError:
            failed = True
            raise
        finally:
            with self._changed:
                if failed and self._slide is slide:
                    self._slide = None
                self._users[id(slide)] -= 1
                if not self._users[id(slide)]:
                    del self._users[id(slide)]
                    if self._slide is not slide:
                        slide.close()
                    self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._users)
            if self._slide is not None:
                self._slide.close()
            self._slide = self._tiles = None

    def _shared(self) -> Any:
        """The slide that threads share, and with it their cache of tiles."""
        if self._tiles is None:
            with contextlib.suppress(self._library.OpenSlideVersionError):  # OpenSlide 3: its own
                self._tiles = self._library.OpenSlideCache(self._cache_bytes)
        return self._opened()

    def _opened(self) -> Any:
        try:
            slide = self._library.OpenSlide(os.fspath(self._path))
        except self._library.OpenSlideError as error:
            reason = str(error).removeprefix(f"Reading {self._path}: ")
            kind = UnsupportedError if "nsupported" in reason else SlideError
            raise kind(
                f"{self._path}: OpenSlide does not open this {self._vendor} slide: {reason}"
            ) from error
        except OSError as error:
            raise SlideError(f"{self._path}: {error.strerror or error}") from error
        if self._tiles is not None:
            slide.set_cache(self._tiles)
        return slide


_Described = tuple[
    dict[str, str], tuple[tuple[int, int], ...], tuple[float, ...], bytes | None, tuple[str, ...]
]


def _describe(slide: Any) -> _Described:
    """Properties, (width, height) and scale of each level, ICC profile, associated images."""
    properties = dict(slide.properties)
    # the profile as it is stored; color_profile is one that a library has parsed
    profile = slide.read_region((0, 0), 0, (1, 1)).info.get("icc_profile")
    return (
        properties,
        tuple(slide.level_dimensions),
        tuple(slide.level_downsamples),
        bytes(profile) if profile else None,
        tuple(slide.associated_images),
    )


def _bounds(properties: Mapping[str, str], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(x, y, width, height) of what was scanned, in pixels of level 0; all where not told."""
    try:
        x, y, width, height = (
            int(properties[f"openslide.bounds-{name}"]) for name in ("x", "y", "width", "height")
        )
    except (KeyError, ValueError):
        return 0, 0, *size
    left, top = max(0, x), max(0, y)
    right, bottom = min(x + width, size[0]), min(y + height, size[1])
    if right <= left or bottom <= top:
        return 0, 0, *size
    return left, top, right - left, bottom - top


def _grids(
    sizes: tuple[tuple[int, int], ...],
    scales: tuple[float, ...],
    bounds: tuple[int, int, int, int],
) -> tuple[_Grid, ...]:
    """The levels within the bounds; those of no pixel are left out."""
    grids = []
    x, y, across, down = bounds
    for (width, height), scale in zip(sizes, scales, strict=True):
        left, top = round(x / scale), round(y / scale)
        if across == sizes[0][0] and down == sizes[0][1]:
            wide, tall = width, height
        else:
            wide = min(max(1, round(across / scale)), width - left)
            tall = min(max(1, round(down / scale)), height - top)
        if wide < 1 or tall < 1:
            continue
        if abs(scale - round(scale)) < 1e-9:
            grids.append(_Grid(top, left, tall, wide, float(round(scale))))
        else:
            rows, columns = _cuts(top, tall, scale), _cuts(left, wide, scale)
            grids.append(_Grid(top, left, tall, wide, scale, rows, columns))
    return tuple(grids)


def _cuts(origin: int, length: int, scale: float) -> tuple[int, ...]:
    """Starts of blocks along an axis, where pixels of the level meet pixels of level 0.

    origin: OpenSlide's pixel that is our first; the starts are counted from it.
    """
    starts = [0]
    while starts[-1] + _LONGEST < length:
        candidates = np.arange(starts[-1] + _SHORTEST, starts[-1] + _LONGEST + 1)
        positions = (origin + candidates) * scale
        off = np.abs(np.rint(positions) - positions) / scale
        good = np.flatnonzero(off <= _ALIGNED)
        starts.append(int(candidates[good[0] if good.size else int(off.argmin())]))
    return tuple(starts)


def _touched(starts: tuple[int, ...], first: int, length: int) -> range:
    """Numbers of the blocks that share pixels with first ... first + length."""
    return range(bisect.bisect_right(starts, first) - 1, bisect.bisect_left(starts, first + length))


def _tile(properties: Mapping[str, str], index: int, grid: _Grid) -> tuple[int, int]:
    sides = []
    for name, whole in (("height", grid.height), ("width", grid.width)):
        told = properties.get(f"openslide.level[{index}].tile-{name}", "")
        sides.append(min(int(told) if told.isdecimal() and int(told) else _TILE, whole))
    return sides[0], sides[1]


def _background(properties: Mapping[str, str]) -> tuple[int, int, int]:
    text = properties.get("openslide.background-color", "")
    if not re.fullmatch(r"[0-9A-Fa-f]{6}", text):
        text = "ffffff"
    return int(text[:2], 16), int(text[2:4], 16), int(text[4:], 16)


def _rgb(picture: Any, background: tuple[int, int, int]) -> Image:
    """Pixels of a Pillow image of RGBA over a colour."""
    if picture.getchannel("A").getextrema()[0] == 255:
        return np.array(picture.convert("RGB"))
    return _opaque(np.asarray(picture), background)


def _opaque(image: Image, background: tuple[int, int, int]) -> Image:
    """RGB of RGBA (not premultiplied) over a colour."""
    rgb, alpha = image[..., :3], image[..., 3:]
    # at most 255 * 255 + 127: sixteen bits hold it
    weight = alpha.astype(np.uint16)
    blended = rgb * weight + np.array(background, np.uint16) * (255 - weight) + np.uint16(127)
    return np.asarray(blended // 255, np.uint8)


def _compression(path: Path, vendor: str, properties: Mapping[str, str], start: bytes) -> str:
    """Of level 0's tiles, ``unknown`` where nothing tells."""
    if vendor == "dicom":
        return _DICOM_SYNTAXES.get(properties.get("dicom.TransferSyntaxUID", ""), "unknown")
    if vendor == "mirax":
        return properties.get(f"{_mirax_section(properties)}.IMAGE_FORMAT", "unknown").lower()
    if vendor == "sakura" or start.startswith(b"[Virtual"):
        return "jpeg"
    if start.startswith(b"[Uncompressed"):
        return "none"
    return _tiff_compression(path) if is_tiff(start) else "unknown"


def _mirax_section(properties: Mapping[str, str]) -> str:
    """Start of the names of the properties of a MIRAX slide's finest level."""
    for number in range(64):
        start = f"mirax.HIERARCHICAL.HIER_{number}"
        if properties.get(f"{start}_NAME") == "Slide zoom level":
            return f"mirax.{properties.get(f'{start}_VAL_0_SECTION', '')}"
    return ""


def _tiff_compression(path: Path) -> str:
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            tiff.pages.useframes = False
            pages: list[Any] = [tiff.pages[index] for index in range(len(tiff.pages))]
            largest = max(pages, key=lambda page: int(page.imagelength) * int(page.imagewidth))
            return compression_name(largest)
    except Exception:
        return "unknown"  # OpenSlide reads the file all the same


def _history(properties: Mapping[str, str], description: str, compression: str) -> tuple[str, ...]:
    """Lossy codings that the properties name, oldest first."""
    told = properties.get("dicom.LossyImageCompression")
    if told == "00":
        return ()
    if told == "01":
        # one value, or several as properties with a number
        methods = (
            properties[key]
            for key in sorted(properties)
            if key.partition("[")[0] == "dicom.LossyImageCompressionMethod"
        )
        return tuple(_DICOM_METHODS.get(method, method.lower()) for method in methods)
    mirax = f"{_mirax_section(properties)}.IMAGE_COMPRESSION_FACTOR"
    for name in (mirax, "trestle.JPEG Quality"):
        quality = properties.get(name, "")
        if compression == "jpeg" and quality.isdecimal():
            return (f"jpeg q{quality}",)
    return lossy_history(description, compression if compression in _LOSSY else "")
