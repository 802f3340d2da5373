"""What a conversion is to do: checked settings, and the levels and tiles that follow from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from wsicodec.bitstream import MAX_SIDE
from wsicodec.codec import CODECS, DEFAULT_MODEL, DEFAULT_QUALITY, TARGETS
from wsicodec.codec.protocol import check_quality
from wsicodec.errors import SettingsError, SlideError, UnsupportedError
from wsicodec.settings import MAX_THREADS, thread_budget
from wsicodec.slide.ometiff import LAYOUTS, MAX_LEVELS, compression_tag
from wsicodec.slide.reader import DEFAULT_CACHE_BYTES, SlideInfo

MEASURES = ("none", "sample", "all")
SAMPLE_TILES = 64
"""Tiles of each level that ``measure="sample"`` looks at, spread evenly."""

_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class ConvertSettings:
    """How to convert a slide. Everything is checked when built; raises SettingsError.

    codec: ``learned``, ``jpeg``, ``jpeg2000``, ``jpegxl``, ``lossless`` or ``webp``.
    model: name or digest, for ``learned``. quality: 1 ... 100. options: of the codec, such as
    ``effort``; for ``learned``, ``target_ssim`` or ``target_psnr`` takes the place of quality.
    tile_size: side of the output's tiles in pixels, a multiple of 16, at most 4096.
    levels: ``source`` codes every level of the source from that level's own pixels; a number N
    writes N levels, each the area average of four pixels of the one before, level 0 from the
    source; coded pixels are never averaged.
    measure: ``all`` or a ``sample`` of tiles are decoded and compared with what was coded.
    embed_model: carry the model in the file. layout: as in ``slide.ometiff.write_slide``.
    jobs: threads that compute; None takes the thread budget.
    in_flight: tiles that may be under way per job; with tile_size it bounds memory, together with
    cache_bytes, decoded tiles of the source that are kept.
    """

    codec: str = "learned"
    model: str = DEFAULT_MODEL
    quality: int = DEFAULT_QUALITY
    options: Mapping[str, Any] = field(default_factory=lambda: _NO_OPTIONS)
    tile_size: int = 256
    levels: str | int = "source"
    measure: str = "none"
    embed_model: bool = False
    overwrite: bool = False
    layout: str = "subifd"
    jobs: int | None = None
    in_flight: int = 4
    cache_bytes: int = DEFAULT_CACHE_BYTES

    def __post_init__(self) -> None:
        if self.codec == "copy":
            raise UnsupportedError(
                "codec 'copy' (the source's own compressed tiles in a new file) is not supported "
                "by this version; 'lossless' keeps every pixel"
            )
        if self.codec not in CODECS:
            raise SettingsError(f"codec {self.codec!r} is none of {', '.join(CODECS)}")
        compression_tag(self.codec)
        check_quality(self.quality)
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        if self.target is not None and self.quality != DEFAULT_QUALITY:
            raise SettingsError(f"quality and {self.target} exclude each other")
        _check_int("tile size", self.tile_size, 16, MAX_SIDE)
        if self.tile_size % 16:
            raise SettingsError(f"tile size {self.tile_size} is not a multiple of 16, as TIFF asks")
        if self.levels != "source":
            _check_int("number of levels", self.levels, 1, MAX_LEVELS)
        if self.measure not in MEASURES:
            raise SettingsError(f"measure {self.measure!r} is none of {', '.join(MEASURES)}")
        if self.layout not in LAYOUTS:
            raise SettingsError(f"layout {self.layout!r} is none of {', '.join(LAYOUTS)}")
        if self.jobs is not None:
            _check_int("jobs", self.jobs, 1, MAX_THREADS)
        _check_int("in_flight", self.in_flight, 1, 1024)
        _check_int("cache_bytes", self.cache_bytes, 0, 2**40)

    @property
    def lossless(self) -> bool:
        """True when every pixel will be kept: codec ``lossless``, or its option in another."""
        return self.codec == "lossless" or self.options.get("lossless") is True

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
class ConvertPlan:
    """A conversion, ready to run.

    dropped: names of the source's images that the output will not hold.
    """

    source: SlideInfo
    target: Path
    settings: ConvertSettings
    levels: tuple[LevelPlan, ...]
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
    that is missing or not writable, an existing file without ``overwrite``), and SettingsError for
    more levels than the slide can be halved into.
    """
    check_target(source.path, target, overwrite=settings.overwrite)
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
                    _measure_every(settings.measure, height, width, size),
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
                _measure_every(settings.measure, level.height, level.width, size),
            )
            for level in source.levels
        ]
    return ConvertPlan(source, target, settings, tuple(levels), source.associated)


def check_target(source: Path, target: Path, *, overwrite: bool) -> None:
    """Raise SlideError where ``target`` cannot be written, before hours are spent on it."""
    folder = target.parent
    if target.exists() and source.exists() and target.samefile(source):
        raise SlideError(f"{target}: is the source itself; write to another file")
    if target.is_dir():
        raise SlideError(f"{target}: is a folder; name a file in it")
    if target.exists() and not overwrite:
        raise SlideError(f"{target}: exists already; pass --overwrite (overwrite=True) to replace")
    if not folder.is_dir():
        raise SlideError(f"{target}: folder {folder} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SlideError(f"{target}: folder {folder} is not writable")


def _measure_every(measure: str, height: int, width: int, size: int) -> int:
    if measure == "none":
        return 0
    tiles = -(-height // size) * -(-width // size)
    return 1 if measure == "all" else -(-tiles // SAMPLE_TILES)


def _check_int(what: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SettingsError(f"{what} must be an integer, not {value!r}")
    if not low <= value <= high:
        raise SettingsError(f"{what} {value} is not within {low} ... {high}")
