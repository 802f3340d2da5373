"""Checks that a written file holds what it promises, tile by tile.

wsicodec tiles carry a checksum, and of tiles that were transcoded the file keeps one. Standard
codecs have none: of them this can say only that each tile is
there, has the length that the passport tells, ends where its format ends, and decodes to its size,
to the same pixels by itself as through the tags of the file. Changed bytes that still make a stream
of the same size may go unnoticed, and so may changes of metadata that nothing checks, like a colour
profile.
"""

from __future__ import annotations

import collections
import functools
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import wsicodec
from wsicodec.convert.against import check_source, source_region
from wsicodec.convert.ordered import in_order
from wsicodec.convert.restore import LevelBefore, levels_before
from wsicodec.convert.rewrap import TRANSCODE_OPTION
from wsicodec.errors import (
    FormatError,
    ModelError,
    RuntimeMissingError,
    SettingsError,
    SlideError,
    UnknownModelError,
    UnsupportedError,
    VerifyError,
    WsicodecError,
)
from wsicodec.metrics import METRIC_ARGUMENTS, QualitySummary, TileQuality, psnr, ssim, summarise
from wsicodec.settings import thread_budget
from wsicodec.slide.opening import open_slide, open_tiles
from wsicodec.slide.passport import Passport, parse_passport
from wsicodec.slide.protocol import Level, SlideReader
from wsicodec.slide.record import FileRecord
from wsicodec.slide.tiff import TiffReader
from wsicodec.slide.zarrreader import ZarrReader

Image = npt.NDArray[np.uint8]

MAX_FAILURES = 100
"""Failures that a report lists; all are counted."""


@dataclass(frozen=True)
class TileFailure:
    """A tile that is not as it should be. row, column: in the grid of the file's tiles."""

    level: int
    row: int
    column: int
    error: str
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "level": self.level,
            "row": self.row,
            "column": self.column,
            "error": self.error,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class VerifyReport:
    """What a check found.

    tiles: checked, over all levels. failed: tiles with a fault; failures lists the first of them.
    faults: what is wrong beside the tiles: passport, model, images of the slide.
    quality: per compared level, fidelity of its tiles to the source; empty without a source.
    not_compared: levels that the source has nothing to compare with, or that average too much.
    """

    path: Path
    against: Path | None
    tiles: int
    failed: int
    failures: tuple[TileFailure, ...]
    quality: dict[int, QualitySummary]
    overall: QualitySummary | None
    not_compared: tuple[int, ...]
    faults: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True when everything is as it should be."""
        return not self.failed and not self.faults

    def raise_if_failed(self) -> None:
        """Raise VerifyError naming the first fault, if there is one."""
        if self.faults:
            raise VerifyError(self.faults[0])
        if self.failed:
            raise VerifyError(f"{self.failed} of {self.tiles} tiles: {self.failures[0].reason}")

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "path": str(self.path),
            "against": None if self.against is None else str(self.against),
            "ok": self.ok,
            "tiles": self.tiles,
            "failed": self.failed,
            "failures": [failure.as_dict() for failure in self.failures],
            "quality": {str(level): summary.as_dict() for level, summary in self.quality.items()},
            "overall": None if self.overall is None else self.overall.as_dict(),
            "not_compared": list(self.not_compared),
            "faults": list(self.faults),
            "metrics": METRIC_ARGUMENTS,
        }


def verify(
    path: str | Path,
    against: str | Path | None = None,
    *,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check every tile of a file: bytes, checksum where there is one, model, size, decoding; and
    what is beside them: passport, the model that is carried, images of the slide.

    against: a slide whose levels of the same size are compared tile by tile (PSNR, SSIM).
    progress: called with (tiles done, tiles) in the calling thread.

    Faults are in the report. Raises SlideError or UnsupportedError where a file cannot be
    opened, VerifyError where ``against`` is of another size, so not the source, and
    UnknownModelError, ModelError or RuntimeMissingError where this machine cannot decode at all.
    """
    workers = thread_budget() if jobs is None else jobs
    if workers < 1:
        raise SettingsError(f"jobs {workers} is not 1 or more")
    try:
        import imagecodecs  # noqa: F401
    except ImportError as error:
        # or its absence would look like damage of every tile
        raise RuntimeMissingError(
            f"tiles are decoded with imagecodecs, which cannot be imported ({error}): "
            "pip install imagecodecs"
        ) from error
    with open_tiles(path) as slide:
        if against is None:
            return _verify(slide, None, workers, progress)
        with open_slide(against) as source:
            check_source(slide, source)
            return _verify(slide, source, workers, progress)


def _verify(
    slide: TiffReader | ZarrReader,
    source: SlideReader | None,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> VerifyReport:
    passport, faults = _passport(slide)
    faults += _faults_beside(slide)
    before, more = _before_transcoding(slide)
    faults += more
    checker = _Checker(slide, source, passport, before)
    total = sum(level.rows * level.columns for level in slide.levels)
    tasks = (
        functools.partial(checker.check, level, row, column)
        for level in slide.levels
        for row in range(level.rows)
        for column in range(level.columns)
    )
    failures: list[TileFailure] = []
    failed = 0
    tiles: dict[int, list[TileQuality]] = collections.defaultdict(list)
    with ThreadPoolExecutor(workers, thread_name_prefix="wsicodec") as pool:
        for done, outcome in enumerate(in_order(pool, tasks, 4 * workers), 1):
            if isinstance(outcome, TileFailure):
                failed += 1
                if len(failures) < MAX_FAILURES:
                    failures.append(outcome)
            elif outcome is not None:
                tiles[outcome.level].append(outcome)
            if progress is not None:
                progress(done, total)
    quality = {level: summarise(measured) for level, measured in tiles.items()}
    return VerifyReport(
        path=slide.path,
        against=None if source is None else source.info.path,
        tiles=total,
        failed=failed,
        failures=tuple(failures),
        quality={level: summary for level, summary in quality.items() if summary is not None},
        overall=summarise([tile for measured in tiles.values() for tile in measured]),
        not_compared=tuple(sorted(checker.not_compared)),
        faults=tuple(faults),
    )


def _passport(slide: TiffReader | ZarrReader) -> tuple[Passport | None, list[str]]:
    """The passport, None without one that can be believed, and what is wrong with it."""
    data = slide.embedded_passport()
    if data is None:
        return None, []
    try:
        passport = parse_passport(data)
        passport.check_grids([(level.rows, level.columns) for level in slide.levels])
    except WsicodecError as error:
        return None, [f"{slide.path}: {error}"]
    return passport, []


def _before_transcoding(
    slide: TiffReader | ZarrReader,
) -> tuple[Sequence[LevelBefore], list[str]]:
    """The levels of a transcoded file as they were, none of another; what is wrong with its tag."""
    record = slide.info.record
    if record is None or TRANSCODE_OPTION not in record.options:
        return (), []
    try:
        return levels_before(slide), []
    except WsicodecError as error:
        return (), [str(error)]


def _faults_beside(slide: TiffReader | ZarrReader) -> list[str]:
    """What is wrong with the model that the file carries, and with the images beside its levels."""
    faults = []
    record, model = slide.info.record, slide.embedded_model()
    if record is not None and model is not None:
        digest = hashlib.sha256(model).hexdigest()
        if digest not in [named.sha256 for named in record.models]:
            faults.append(f"{slide.path}: carries a model {digest[:8]} that it does not name")
    for name in slide.info.associated:
        try:
            slide.read_associated(name)
        except UnsupportedError:
            continue  # of a kind that is not read here: says nothing of the file
        except (RuntimeMissingError, UnknownModelError):
            raise  # nor does what is missing here
        except WsicodecError as error:
            faults.append(str(error))
    return faults


_Outcome = TileFailure | TileQuality | None


class _Checker:
    """Checks single tiles of a file. not_compared: levels, so far."""

    def __init__(
        self,
        slide: TiffReader | ZarrReader,
        source: SlideReader | None,
        passport: Passport | None,
        before: Sequence[LevelBefore],
    ) -> None:
        self._before = before
        self._slide = slide
        self._source = source
        self._passport = passport
        self._mask = None if passport is None else passport.mask
        # levels that the source has nothing to compare with, or too much
        self.not_compared: set[int] = set()

    def check(self, level: Level, row: int, column: int) -> _Outcome:
        slide = self._slide
        try:
            pixels = slide.decode_tile(level.index, row, column)
            if slide.info.record is not None:
                data = slide.tile_bytes(level.index, row, column)
                self._check_length(data, level, row, column)
                if self._before:
                    self._before[level.index].segment(row * level.columns + column)
                _check_stream(data, slide.info.record, level, pixels)
        except (UnknownModelError, ModelError, RuntimeMissingError):
            raise  # says nothing of the tile: this machine cannot decode any of its kind
        except WsicodecError as error:
            reason = str(error)
            if not reason.startswith(str(slide.path)):
                where = f"level {level.index}: tile at row {row}, column {column}"
                reason = f"{slide.path}: {where}: {reason}"
            return TileFailure(level.index, row, column, type(error).__name__, reason)
        if self._source is None:
            return None
        y, x = row * level.tile_height, column * level.tile_width
        # a fault of the source is not one of the file: it ends the check
        place = (y, x, *pixels.shape[:2])
        original = source_region(slide, self._source, level.index, *place)
        if original is None:
            self.not_compared.add(level.index)
            return None
        if self._mask is not None:
            # what was to be coded: glass in one colour
            original[self._mask.glass(level.downsample, *place)] = self._mask.background
        return TileQuality(level.index, y, x, psnr(original, pixels), ssim(original, pixels))

    def _check_length(self, data: bytes, level: Level, row: int, column: int) -> None:
        if self._passport is None:
            return
        length = int(self._passport.levels[level.index].bytes[row, column])
        # tiles that share the level's glass have none in the passport
        if length and length != len(data):
            raise FormatError(f"tile has {len(data)} bytes, the passport says {length}")


def _check_stream(data: bytes, record: FileRecord, level: Level, pixels: Image) -> None:
    """What reading alone would not notice: a tile of another size, codec or model, or cut short.

    pixels: of the tile as read through the file.
    """
    if not data:
        raise SlideError("tile has no bytes")
    if record.codec == "copy" or TRANSCODE_OPTION in record.options:
        return  # streams of whoever wrote the source, which may need the tables of the file
    info = wsicodec.probe(data)
    if (info.height, info.width) != (level.tile_height, level.tile_width):
        raise FormatError(
            f"tile is {info.width} x {info.height}, not {level.tile_width} x {level.tile_height}"
        )
    # a JPEG XL stream does not say whether it is lossless
    written = "jpegxl" if record.codec == "lossless" else record.codec
    if info.codec not in (written, record.codec):
        raise FormatError(f"tile is coded as {info.codec}, the file says {record.codec}")
    if info.codec == "learned":
        if info.model is not None and not any(
            model.sha256.startswith(info.model) for model in record.models
        ):
            raise FormatError(
                f"tile was coded with model {info.model}, which the file does not name "
                f"({', '.join(model.sha256[:8] for model in record.models) or 'none'})"
            )
        return
    # other readers' decoders pad a stream that ends early, and believe the tags about colours
    alone = wsicodec.decode(data)[: pixels.shape[0], : pixels.shape[1]]
    if not np.array_equal(alone, pixels):
        raise FormatError(
            "tile decodes to other pixels through the tags of the file than by itself"
        )
