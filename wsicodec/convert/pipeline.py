"""Runs a conversion: reading, coding and measuring on all cores, writing in order.

One pool of threads does everything that costs time, tile by tile; the calling thread hands out
tiles, takes results in order, and writes. A fixed number of tiles is under way at any moment, so
memory follows the settings and, for averaged levels, the width of the slide, never its area.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

import wsicodec
from wsicodec.convert.ordered import in_order
from wsicodec.convert.output import atomic_file
from wsicodec.convert.plan import ConvertPlan, ConvertSettings, LevelPlan, make_plan
from wsicodec.errors import UnsupportedError, WsicodecError
from wsicodec.metrics import (
    METRIC_ARGUMENTS,
    QualitySummary,
    TileQuality,
    psnr,
    ssim,
    summarise,
)
from wsicodec.slide.ometiff import CodedLevel, SlideMetadata, write_slide
from wsicodec.slide.reader import SlideReader
from wsicodec.slide.record import AREA_AVERAGE, FROM_SOURCE, FileRecord, ModelId

Image = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ConvertProgress:
    """How far a conversion is.

    tiles_done, tiles: of all levels. pixels_done: coded. bytes_done: of coded tiles.
    """

    level: int
    tiles_done: int
    tiles: int
    pixels_done: int
    pixels: int
    bytes_done: int


Progress = Callable[[ConvertProgress], None]


@dataclass(frozen=True)
class LevelReport:
    """One level that was written. coded_bytes: of its tiles. quality: of the measured tiles."""

    index: int
    height: int
    width: int
    tiles: int
    coded_bytes: int
    quality: QualitySummary | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "index": self.index,
            "height": self.height,
            "width": self.width,
            "tiles": self.tiles,
            "coded_bytes": self.coded_bytes,
            "quality": None if self.quality is None else self.quality.as_dict(),
        }


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did.

    seconds: wall time. pixels: of all levels. quality: over the measured tiles of all levels.
    dropped: images of the source that the output does not hold.
    """

    source: Path
    target: Path
    codec: str
    model: ModelId | None
    quality_setting: int | None
    source_bytes: int
    target_bytes: int
    levels: tuple[LevelReport, ...]
    quality: QualitySummary | None
    seconds: float
    pixels: int
    dropped: tuple[str, ...]

    @property
    def megapixels_per_second(self) -> float:
        """Pixels of all levels by wall time."""
        return self.pixels / 1e6 / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "source": str(self.source),
            "target": str(self.target),
            "codec": self.codec,
            "model": None
            if self.model is None
            else {"name": self.model.name, "sha256": self.model.sha256},
            "quality_setting": self.quality_setting,
            "source_bytes": self.source_bytes,
            "target_bytes": self.target_bytes,
            "levels": [level.as_dict() for level in self.levels],
            "quality": None if self.quality is None else self.quality.as_dict(),
            "metrics": METRIC_ARGUMENTS,
            "seconds": self.seconds,
            "pixels": self.pixels,
            "megapixels_per_second": self.megapixels_per_second,
            "dropped": list(self.dropped),
        }


def convert(
    source: str | Path,
    target: str | Path,
    settings: ConvertSettings | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Convert a slide to a tiled pyramid.

    progress: called in the calling thread after each tile; what it raises ends the conversion.

    The target appears when it is complete; on any failure nothing is left. Raises SlideError (what
    cannot be read or written), UnsupportedError (pixels that are not 8-bit RGB, a codec without
    TIFF value), UnknownModelError, RuntimeMissingError, SettingsError.
    """
    started = time.perf_counter()
    chosen = settings or ConvertSettings()
    with SlideReader(source, chosen.cache_bytes) as slide:
        plan = make_plan(slide.info, Path(target), chosen)
        model, model_bytes = _model_of(chosen)
        _try_codec(chosen)
        run = _Run(slide, plan, progress)
        with run, atomic_file(plan.target, overwrite=chosen.overwrite) as file:
            write_slide(
                file,
                [
                    CodedLevel(level.height, level.width, level.tile_size, run.tiles(level))
                    for level in plan.levels
                ],
                chosen.codec,
                _metadata(plan),
                _record(plan, model),
                model=model_bytes,
                layout=chosen.layout,
            )
        return ConvertReport(
            source=slide.info.path,
            target=plan.target,
            codec=chosen.codec,
            model=model,
            quality_setting=chosen.fixed_quality,
            source_bytes=slide.info.file_bytes,
            target_bytes=plan.target.stat().st_size,
            levels=run.reports(),
            quality=summarise([tile for tally in run.tallies for tile in tally.quality]),
            seconds=time.perf_counter() - started,
            pixels=plan.pixels,
            dropped=plan.dropped,
        )


def _model_of(settings: ConvertSettings) -> tuple[ModelId | None, bytes | None]:
    """The model's identity, and its bytes where they are to be embedded."""
    if settings.codec != "learned" or settings.lossless:
        if settings.embed_model:
            raise UnsupportedError("only lossy learned tiles have a model that could be embedded")
        return None, None
    from wsicodec.models import find_model

    found = find_model(settings.model)
    content = found.path.read_bytes() if settings.embed_model else None
    return ModelId(found.name, found.digest), content


def _try_codec(settings: ConvertSettings) -> None:
    """Code one small tile: a missing library or a wrong option must show before the work starts."""
    ramp = np.arange(16 * 16 * 3, dtype=np.uint32).reshape(16, 16, 3)
    _encode((ramp * 85 // 256).astype(np.uint8), settings)


def _encode(image: Image, settings: ConvertSettings) -> bytes:
    options = dict(settings.options)
    if settings.codec == "learned":
        options["model"] = settings.model
    quality = None if settings.target is not None else settings.quality
    return wsicodec.encode(image, codec=settings.codec, quality=quality, **options)


def _metadata(plan: ConvertPlan) -> SlideMetadata:
    info = plan.source
    name = plan.target.name
    for suffix in (".tiff", ".tif", ".ome"):
        name = name.removesuffix(suffix)
    return SlideMetadata(
        name=name,
        mpp_x=info.mpp_x,
        mpp_y=info.mpp_y,
        magnification=info.magnification,
        description=info.description,
        icc_profile=info.icc_profile,
    )


def _record(plan: ConvertPlan, model: ModelId | None) -> FileRecord:
    settings = plan.settings
    step: tuple[str, ...] = ()
    if settings.target is not None:
        step = (f"{settings.codec} {settings.target} {settings.options[settings.target]:g}",)
    elif not settings.lossless:
        step = (f"{settings.codec} quality {settings.quality}",)
    return FileRecord(
        wsicodec=wsicodec.__version__,
        codec=settings.codec,
        quality=settings.fixed_quality,
        models=() if model is None else (model,),
        history=(*plan.source.history, *step),
        levels=tuple(FROM_SOURCE if _read(level) else AREA_AVERAGE for level in plan.levels),
        options=dict(settings.options),
        metrics=METRIC_ARGUMENTS,
    )


@dataclass(frozen=True)
class _Coded:
    """A coded tile. half: its area average where the next level is made from it."""

    row: int
    column: int
    data: bytes
    quality: TileQuality | None
    half: Image | None


@dataclass
class _Tally:
    """What was written of a level so far."""

    tiles: int = 0
    coded_bytes: int = 0
    quality: list[TileQuality] = field(default_factory=list)


class _Run(contextlib.AbstractContextManager["_Run"]):
    """The moving parts of one conversion: pool, counters, and levels averaged on the way."""

    def __init__(self, slide: SlideReader, plan: ConvertPlan, progress: Progress | None) -> None:
        self._slide = slide
        self._plan = plan
        self._progress = progress
        self._limit = plan.settings.threads * plan.settings.in_flight
        self._pool = ThreadPoolExecutor(plan.settings.threads, thread_name_prefix="wsicodec")
        self._averaged = [
            _AveragedLevel(level, plan.target.parent) for level in plan.levels if not _read(level)
        ]
        self.tallies = [_Tally() for _ in plan.levels]
        self._pixels_done = 0

    def __exit__(self, *_: object) -> None:
        # tiles under way finish, which takes moments; the others never start
        self._pool.shutdown(wait=True, cancel_futures=True)
        for level in self._averaged:
            level.close()

    def tiles(self, level: LevelPlan) -> Iterator[bytes]:
        """Coded tiles of a level in order. Levels must be asked for in order."""
        if not _read(level):
            yield from self._averaged[level.index - 1].spooled()
            return
        feeds = level.index + 1 < len(self._plan.levels) and not _read(
            self._plan.levels[level.index + 1]
        )
        tasks = (
            functools.partial(self._code_from_source, level, row, column, feeds)
            for row in range(level.rows)
            for column in range(level.columns)
        )
        for coded in in_order(self._pool, tasks, self._limit):
            self._count(level, coded)
            yield coded.data
            if feeds:
                self._feed(0, coded)

    def reports(self) -> tuple[LevelReport, ...]:
        """Per level, what was written."""
        return tuple(
            LevelReport(
                level.index,
                level.height,
                level.width,
                tally.tiles,
                tally.coded_bytes,
                summarise(tally.quality),
            )
            for level, tally in zip(self._plan.levels, self.tallies, strict=True)
        )

    def _feed(self, index: int, coded: _Coded) -> None:
        """Give a tile's average to the averaged level ``index``; code the rows it completes."""
        level = self._averaged[index]
        if not level.place(coded):
            return
        last = index + 1 == len(self._averaged)
        tasks = (
            functools.partial(self._code, level.plan, row, column, pixels, not last)
            for row, column, pixels in level.take_row()
        )
        for done in in_order(self._pool, tasks, self._limit):
            self._count(level.plan, done)
            level.spool(done.data)
            if not last:
                self._feed(index + 1, done)

    def _code_from_source(self, level: LevelPlan, row: int, column: int, feeds: bool) -> _Coded:
        assert level.source is not None
        y, x = row * level.tile_size, column * level.tile_size
        height = min(level.tile_size, level.height - y)
        width = min(level.tile_size, level.width - x)
        pixels = self._slide.read_region(level.source, y, x, height, width)
        return self._code(level, row, column, pixels, feeds)

    def _code(self, level: LevelPlan, row: int, column: int, pixels: Image, halve: bool) -> _Coded:
        size = level.tile_size
        height, width = pixels.shape[:2]
        # repeat the last pixels: black padding would cost bits and bleed into the edge
        padded = np.pad(pixels, ((0, size - height), (0, size - width), (0, 0)), mode="edge")
        number = row * level.columns + column
        quality = None
        try:
            data = _encode(padded, self._plan.settings)
            if level.measure_every and number % level.measure_every == 0:
                decoded = wsicodec.decode(data)[:height, :width]
                quality = TileQuality(
                    level.index,
                    row * size,
                    column * size,
                    psnr(pixels, decoded),
                    ssim(pixels, decoded),
                )
        except WsicodecError as error:
            raise type(error)(
                f"{self._plan.source.path}: level {level.index}, tile at row {row}, column "
                f"{column}: {error}"
            ) from error
        return _Coded(row, column, data, quality, area_average(pixels) if halve else None)

    def _count(self, level: LevelPlan, coded: _Coded) -> None:
        tally = self.tallies[level.index]
        tally.tiles += 1
        tally.coded_bytes += len(coded.data)
        if coded.quality is not None:
            tally.quality.append(coded.quality)
        size = level.tile_size
        self._pixels_done += min(size, level.height - coded.row * size) * min(
            size, level.width - coded.column * size
        )
        if self._progress is not None:
            self._progress(
                ConvertProgress(
                    level.index,
                    sum(t.tiles for t in self.tallies),
                    self._plan.tiles,
                    self._pixels_done,
                    self._plan.pixels,
                    sum(t.coded_bytes for t in self.tallies),
                )
            )


class _AveragedLevel:
    """A level that is made while the one before is coded: one row of tiles in memory.

    Its coded tiles wait in an unnamed file until their turn to be written comes; the system removes
    that file whatever happens to the process.
    """

    def __init__(self, plan: LevelPlan, folder: Path) -> None:
        self.plan = plan
        self._row = 0
        self._pixels: Image | None = None
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._lengths: list[int] = []

    def place(self, coded: _Coded) -> bool:
        """Put an averaged tile of the level before into the row; True when the row is complete."""
        assert coded.half is not None
        size = self.plan.tile_size
        if self._pixels is None:
            rows = min(size, self.plan.height - self._row * size)
            self._pixels = np.empty((rows, self.plan.width, 3), np.uint8)
        y, x = (coded.row % 2) * (size // 2), coded.column * (size // 2)
        height, width = coded.half.shape[:2]
        self._pixels[y : y + height, x : x + width] = coded.half
        rows, columns = self._pixels.shape[:2]
        return bool(y + height == rows and x + width == columns)

    def take_row(self) -> Iterator[tuple[int, int, Image]]:
        """(row, column, pixels) of the complete row's tiles."""
        assert self._pixels is not None
        pixels, row, size = self._pixels, self._row, self.plan.tile_size
        self._pixels, self._row = None, row + 1
        for column in range(self.plan.columns):
            yield row, column, pixels[:, column * size : (column + 1) * size]

    def spool(self, data: bytes) -> None:
        """Keep a coded tile for later."""
        if self._file is None:
            # same folder, same disk: if it fills up, it does so here and not at the end
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        self._file.write(data)
        self._lengths.append(len(data))

    def spooled(self) -> Iterator[bytes]:
        """The kept tiles in order."""
        if self._file is not None:
            self._file.seek(0)
            for length in self._lengths:
                yield self._file.read(length)

    def close(self) -> None:
        if self._file is not None:
            # closing flushes, which fails on a full disk; the error was raised before
            with contextlib.suppress(OSError):
                self._file.close()


def area_average(image: Image) -> Image:
    """Half the size of a uint8 (rows, columns, 3) image, each pixel the mean of up to four.

    Sides are rounded up; the last row or column of an odd side averages what is there. Halves round
    up.
    """
    height, width = image.shape[:2]
    if height % 2 or width % 2:
        image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    rows = image[0::2].astype(np.uint16) + image[1::2]
    total = rows[:, 0::2] + rows[:, 1::2]
    return ((total + 2) >> 2).astype(np.uint8)


def _read(level: LevelPlan) -> bool:
    """True when a level's pixels are read from the source."""
    return level.source is not None
