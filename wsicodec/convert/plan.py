"""What a conversion is to do: checked settings, and the levels and tiles that follow from them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from wsicodec.bitstream import MAX_SIDE
from wsicodec.choices import (
    CONVERT_CODECS,
    GLASS_MODES,
    LAYOUTS,
    MACROS,
    MEASURES,
    TISSUE_METHODS,
)
from wsicodec.codec import CODECS, DEFAULT_MODEL, DEFAULT_QUALITY, TARGETS
from wsicodec.codec.protocol import check_quality
from wsicodec.errors import SettingsError, SlideError, UnsupportedError
from wsicodec.settings import MAX_THREADS, thread_budget
from wsicodec.slide.ometiff import MAX_LEVELS, compression_tag
from wsicodec.slide.omezarr import check_codec, check_replaced
from wsicodec.slide.pages import usable
from wsicodec.slide.protocol import SlideInfo

TILE_SIZE = 256
"""Side of the output's tiles in pixels, unless told otherwise."""
CACHE_BYTES = 48 * 2**20
"""Decoded tiles of the source that a job keeps: blocks share only the tiles on their borders."""
BLOCK_SIZE = 2048
"""Side of a block in pixels: 12 MiB of them, and whole tiles of four levels."""
SAMPLE_TILES = 64
"""Tiles of each level that ``measure="sample"`` looks at, spread evenly."""

_OTHER_FILES = (".jpg", ".jpeg", ".png", ".jp2", ".jxl", ".webp", ".avif", ".ndpi", ".mrxs", ".dcm")
_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class ConvertSettings:
    """How to convert a slide. Everything is checked when built; raises SettingsError.

    codec: ``learned``, ``jpeg``, ``jpeg2000``, ``jpegxl``, ``lossless`` or ``webp``; ``copy`` keeps
    the source's own compressed tiles.
    model: name or digest, for ``learned``. quality: 1 ... 100. options: of the codec, such as
    ``effort``; for ``learned``, ``target_ssim`` or ``target_psnr`` takes the place of quality.
    tile_size: side of the output's tiles in pixels, a multiple of 16, at most 4096.
    levels: ``source`` codes every level of the source from that level's own pixels; a number N
    writes N levels, each the area average of four pixels of the one before, level 0 from the
    source; coded pixels are never averaged.
    glass: ``keep`` codes it like all else; ``fill`` gives it one colour, the slide's own
    background; ``drop`` stores tiles without tissue once for a whole level. tissue: how tissue is
    told from glass, ``network`` or ``otsu``.
    floor_ssim, floor_psnr: least SSIM (0 ... 1) and PSNR (dB) of every tile; None for no floor.
    measure: ``all`` or a ``sample`` of tiles are decoded and compared with what was coded; with a
    floor, always all.
    lossless_transcode: with ``jpegxl``, JPEG tiles become JPEG XL that ``restore`` can turn back
    into the same JPEG bytes.
    associated: keep label, macro and thumbnail. deidentify: remove what names a person, place or
    time; macro: what then becomes of the macro image, ``drop`` or ``blank`` (its label's end).
    accept_damage: code what libjpeg makes of a JPEG tile even where its stream is damaged; without
    it such a tile ends the conversion.
    embed_model: carry the model in the file; None does where it makes up a hundredth at most.
    layout: as in ``slide.ometiff.write_slide``.
    resume: go on where an earlier run with the same settings was stopped, and keep finished blocks
    when this one is; where the source's streams are kept, which is quick, it begins anew and says
    so.
    jobs: processes that compute; None takes the thread budget. in_process: compute in threads of
    this process instead; None decides by the slide's size.
    cache_bytes: decoded tiles of the source that each job keeps. block_size: side in pixels of what
    is read and coded at once, a power of two of tiles at most.
    """

    codec: str = "learned"
    model: str = DEFAULT_MODEL
    quality: int = DEFAULT_QUALITY
    options: Mapping[str, Any] = field(default_factory=lambda: _NO_OPTIONS)
    tile_size: int = TILE_SIZE
    levels: str | int = "source"
    glass: str = "keep"
    tissue: str = TISSUE_METHODS[0]
    floor_ssim: float | None = None
    floor_psnr: float | None = None
    measure: str = "all"
    lossless_transcode: bool = False
    associated: bool = True
    deidentify: bool = False
    macro: str = MACROS[0]
    accept_damage: bool = False
    embed_model: bool | None = None
    overwrite: bool = False
    resume: bool = False
    layout: str = "subifd"
    jobs: int | None = None
    in_process: bool | None = None
    cache_bytes: int = CACHE_BYTES
    block_size: int = BLOCK_SIZE

    def __post_init__(self) -> None:
        if self.codec not in CONVERT_CODECS:
            # codecs of single tiles that TIFF has no value for are refused with the reason
            if self.codec in CODECS:
                compression_tag(self.codec)
            raise SettingsError(f"codec {self.codec!r} is none of {', '.join(CONVERT_CODECS)}")
        check_quality(self.quality)
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        if self.codec != "learned" and self.model != DEFAULT_MODEL:
            raise SettingsError(f"model goes with codec learned, not {self.codec}")
        if self.target is not None and self.quality != DEFAULT_QUALITY:
            raise SettingsError(f"quality and {self.target} exclude each other")
        _check_int("tile size", self.tile_size, 16, MAX_SIDE)
        if self.tile_size % 16:
            raise SettingsError(f"tile size {self.tile_size} is not a multiple of 16, as TIFF asks")
        if self.levels != "source":
            _check_int("number of levels", self.levels, 1, MAX_LEVELS)
        for what, value, known in (
            ("measure", self.measure, MEASURES),
            ("layout", self.layout, LAYOUTS),
            ("glass", self.glass, GLASS_MODES),
            ("tissue", self.tissue, TISSUE_METHODS),
            ("macro", self.macro, MACROS),
        ):
            if value not in known:
                raise SettingsError(f"{what} {value!r} is none of {', '.join(known)}")
        if self.macro != MACROS[0] and not self.deidentify:
            raise SettingsError("macro says what deidentify does: it needs deidentify")
        _check_number("floor_ssim", self.floor_ssim, 0, 1)
        _check_number("floor_psnr", self.floor_psnr, 0, 100)
        if self.keeps_streams:
            self._check_kept_streams()
        if self.jobs is not None:
            _check_int("jobs", self.jobs, 1, MAX_THREADS)
        _check_int("cache_bytes", self.cache_bytes, 0, 2**40)
        _check_int("block_size", self.block_size, 16, 2**15)

    def _check_kept_streams(self) -> None:
        name = "lossless_transcode" if self.lossless_transcode else "codec 'copy'"
        if self.lossless_transcode and self.codec != "jpegxl":
            raise SettingsError("lossless_transcode makes JPEG XL: it needs codec jpegxl")
        if self.quality != DEFAULT_QUALITY or self.options:
            raise SettingsError(f"{name} keeps what is coded: it takes no quality and no options")
        if self.tile_size != TILE_SIZE:
            raise SettingsError(f"{name} keeps the source's tiles: it takes no tile size")
        if self.levels != "source" or self.glass != "keep" or self.has_floor:
            raise SettingsError(
                f"{name} keeps the source's tiles: it goes with levels='source', glass='keep' and "
                "no floor"
            )
        if self.embed_model:
            raise SettingsError(f"{name} codes nothing: there is no model to embed")

    @property
    def keeps_streams(self) -> bool:
        """True where the source's own coded tiles are kept: nothing is coded anew."""
        return self.codec == "copy" or self.lossless_transcode

    @property
    def has_floor(self) -> bool:
        """True when every tile has to reach an SSIM or a PSNR."""
        return self.floor_ssim is not None or self.floor_psnr is not None

    @property
    def lossless(self) -> bool:
        """True when every pixel will be kept: codec ``lossless``, or its option in another."""
        if self.codec == "lossless" or self.keeps_streams:
            return True
        return self.options.get("lossless") is True

    @property
    def target(self) -> str | None:
        """Name of the option that sets what every tile has to reach, in place of quality."""
        given = [name for name in TARGETS if self.options.get(name) is not None]
        return given[0] if given else None

    @property
    def fixed_quality(self) -> int | None:
        """The quality of all tiles; None where every pixel is kept, or tiles reach a target."""
        return None if self.lossless or self.target is not None else self.quality

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return thread_budget() if self.jobs is None else self.jobs


@dataclass(frozen=True)
class LevelPlan:
    """One level to write.

    height, width: pixels. source: index of the source's level whose pixels it takes; None for the
    area average of the level before. measure_every: every n-th tile is measured, 0 for none.
    """

    index: int
    height: int
    width: int
    tile_size: int
    source: int | None
    measure_every: int

    @property
    def rows(self) -> int:
        """Rows of tiles."""
        return -(-self.height // self.tile_size)

    @property
    def columns(self) -> int:
        """Columns of tiles."""
        return -(-self.width // self.tile_size)

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Pass:
    """Levels that are coded together: the first is read, each other is the average of the one
    before.

    side: of a block in tiles of the first level, a power of two of at least 2 ** (levels - 1).
    leaves_pieces: True when a later pass begins with the average of the last level.
    """

    levels: tuple[LevelPlan, ...]
    side: int
    leaves_pieces: bool

    @property
    def rows(self) -> int:
        """Rows of blocks."""
        return -(-self.levels[0].rows // self.side)

    @property
    def columns(self) -> int:
        """Columns of blocks."""
        return -(-self.levels[0].columns // self.side)

    @property
    def piece_side(self) -> int:
        """Side in pixels of the piece that a whole block leaves."""
        return self.side * self.levels[0].tile_size >> len(self.levels)


@dataclass(frozen=True)
class ConvertPlan:
    """A conversion, ready to run.

    dropped: names of the source's images that the output will not hold.
    """

    source: SlideInfo
    target: Path
    settings: ConvertSettings
    levels: tuple[LevelPlan, ...]
    passes: tuple[Pass, ...]
    dropped: tuple[str, ...]

    @property
    def tiles(self) -> int:
        """Tiles of all levels."""
        return sum(level.tiles for level in self.levels)

    @property
    def pixels(self) -> int:
        """Pixels of all levels, without padding."""
        return sum(level.height * level.width for level in self.levels)


def make_plan(source: SlideInfo, target: Path, settings: ConvertSettings) -> ConvertPlan:
    """Levels and tiles of a conversion.

    Raises SlideError for a target that cannot be written (the source itself, a folder, in a folder
    that is missing or not writable, an existing file without ``overwrite``, a name of another
    format), SettingsError for more levels than the slide can be halved into and for a layout that
    OME-Zarr has not, and UnsupportedError for a codec that an OME-Zarr cannot be written with.
    """
    check_target(source.path, target, overwrite=settings.overwrite)
    if is_zarr(target):
        if settings.layout != LAYOUTS[0]:
            raise SettingsError(f"layout {settings.layout!r} is one of TIFF, not of OME-Zarr")
        if settings.keeps_streams:
            raise UnsupportedError("streams of a TIFF are kept in a TIFF; code pixels for OME-Zarr")
        check_codec(settings.codec)
    size = settings.tile_size
    levels = []
    if isinstance(settings.levels, int):
        height, width = source.levels[0].height, source.levels[0].width
        for index in range(settings.levels):
            if index:
                if height == width == 1:
                    raise SettingsError(
                        f"{source.path}: {settings.levels} levels are too many: level {index - 1} "
                        "is one pixel already"
                    )
                height, width = -(-height // 2), -(-width // 2)
            levels.append(
                LevelPlan(
                    index,
                    height,
                    width,
                    size,
                    None if index else 0,
                    _measure_every(settings, height, width, size),
                )
            )
    else:
        levels = [
            LevelPlan(
                level.index,
                level.height,
                level.width,
                size,
                level.index,
                _measure_every(settings, level.height, level.width, size),
            )
            for level in source.levels
        ]
    dropped = source.associated
    if settings.associated:
        dropped = tuple(name for name in dropped if settings.deidentify and name == "label")
    return ConvertPlan(
        source, target, settings, tuple(levels), passes_of(levels, settings), dropped
    )


def passes_of(levels: Sequence[LevelPlan], settings: ConvertSettings) -> tuple[Pass, ...]:
    """Passes over ``levels``."""
    side = 1
    while 2 * side * settings.tile_size <= settings.block_size:
        side *= 2
    depth = side.bit_length()  # a block of eight tiles holds whole tiles of four levels
    passes = []
    first = 0
    while first < len(levels):
        last = first + 1
        while last < len(levels) and last - first < depth and levels[last].source is None:
            last += 1
        more = last < len(levels) and levels[last].source is None
        passes.append(Pass(tuple(levels[first:last]), side, more))
        first = last
    return tuple(passes)


def is_zarr(target: Path) -> bool:
    """True for the name of an OME-Zarr folder."""
    return target.suffix.lower() == ".zarr"


def check_target(source: Path, target: Path, *, overwrite: bool) -> None:
    """Raise SlideError where ``target`` cannot be written, before hours are spent on it."""
    with usable(target):
        # later questions may take a name that is too long for one of a missing file
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            target.stat()
        _check_target(source, target, overwrite=overwrite)


def _check_target(source: Path, target: Path, *, overwrite: bool) -> None:
    folder = target.parent
    if target.exists() and source.exists() and target.samefile(source):
        raise SlideError(f"{target}: is the source itself; write to another file")
    if source.is_dir() and source.resolve() in target.resolve().parents:
        raise SlideError(f"{target}: lies in the source; write elsewhere")
    if is_zarr(target):
        if overwrite and target.exists():
            check_replaced(target)
    elif target.is_dir():
        raise SlideError(f"{target}: is a folder; name a file in it")
    elif target.suffix.lower() in _OTHER_FILES:
        raise SlideError(
            f"{target}: would be a TIFF under the name of another format; end the name in "
            ".ome.tiff or .tiff, or in .zarr for an OME-Zarr"
        )
    if target.exists() and not overwrite:
        raise SlideError(f"{target}: exists already; pass --overwrite (overwrite=True) to replace")
    if not folder.is_dir():
        raise SlideError(f"{target}: folder {folder} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SlideError(f"{target}: folder {folder} is not writable")


def _measure_every(settings: ConvertSettings, height: int, width: int, size: int) -> int:
    if settings.has_floor or settings.measure == "all":
        return 1
    if settings.measure == "none":
        return 0
    tiles = -(-height // size) * -(-width // size)
    return -(-tiles // SAMPLE_TILES)


def _check_number(what: str, value: object, low: float, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SettingsError(f"{what} must be a number, not {value!r}")
    if not low <= value <= high:
        raise SettingsError(f"{what} {value} is not within {low} ... {high}")


def _check_int(what: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SettingsError(f"{what} must be an integer, not {value!r}")
    if not low <= value <= high:
        raise SettingsError(f"{what} {value} is not within {low} ... {high}")
