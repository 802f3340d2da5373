"""Everything a report shows, gathered from the file and, where there is one, its source."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.convert.against import check_source, source_region
from wsicodec.errors import (
    LimitError,
    ModelError,
    RuntimeMissingError,
    SettingsError,
    UnknownModelError,
    UnsupportedError,
)
from wsicodec.report.figures import (
    LevelFigures,
    TileFigures,
    Worst,
    level_figures,
    worst_tiles,
)
from wsicodec.report.measure import TileReader, measure
from wsicodec.report.stored import find_passport, stored_bytes
from wsicodec.slide.opening import open_slide
from wsicodec.slide.passport import MAX_TILES, Passport
from wsicodec.slide.protocol import Image, SlideInfo, SlideReader
from wsicodec.slide.record import LevelQuality
from wsicodec.tissue.mask import TissueMask

STORED, MEASURED, LENGTHS = "stored", "measured", "lengths"
OVERVIEW_SIDE = 1000
CROP_SIDE = 256
"""Of the pictures of a tile; of a larger tile the part with the largest error is shown."""


@dataclass(frozen=True)
class TilePicture:
    """A tile as it is in the file and in the source; None where either cannot be had.

    top, left: of the pictures within the tile, pixels.
    """

    tile: TileFigures
    top: int
    left: int
    ours: Image | None
    source: Image | None


@dataclass(frozen=True)
class SourceCheck:
    """The slide that a file is compared with.

    sha256: of its file, None for a slide of several. same: it is the recorded one; None where
    either is not known.
    """

    sha256: str | None
    same: bool | None


@dataclass(frozen=True)
class Findings:
    """What is known of a file.

    passport: None where not even lengths of tiles are known. basis: what it is from, STORED in the
    file, MEASURED now against the source, or the LENGTHS of the file's tiles alone.
    problem: why there is no passport to go by, or what is missing in it; None if nothing is.
    overview: uint8 (rows, columns, 3) of the whole slide, None where it cannot be decoded, and
    ``no_overview`` says why.
    """

    info: SlideInfo
    model_bytes: int | None
    levels: tuple[LevelFigures, ...]
    passport: Passport | None
    basis: str | None
    problem: str | None
    worst: Worst | None
    overview: Image | None
    no_overview: str | None
    source: SourceCheck | None
    pictures: tuple[TilePicture, ...]

    @property
    def below_floor(self) -> int:
        """Measured tiles of all levels that miss the floor."""
        return sum(level.quality.below_floor for level in self.levels if level.quality)

    @property
    def tiles(self) -> int:
        """Tiles of all levels."""
        return sum(level.level.rows * level.level.columns for level in self.levels)

    @property
    def measured_tiles(self) -> int:
        """Of them, how many were compared with their source."""
        return sum(level.quality.measured for level in self.levels if level.quality)

    @property
    def shared_glass(self) -> int:
        """Tiles that are all glass and have no stream of their own."""
        if self.passport is None:
            return 0
        return sum(
            int(((level.bytes == 0) & ~level.measured).sum()) for level in self.passport.levels
        )

    @property
    def overall(self) -> LevelQuality | None:
        """Figures of level 0, by which people know a slide."""
        return self.levels[0].quality

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "slide": self.info.as_dict(),
            "basis": self.basis,
            "problem": self.problem,
            "levels": [level.as_dict() for level in self.levels],
            "tiles": self.tiles,
            "measured_tiles": self.measured_tiles,
            "below_floor": self.below_floor,
            "worst_by": None if self.worst is None else self.worst.by,
            "worst": [] if self.worst is None else [tile.as_dict() for tile in self.worst.tiles],
            "source": None
            if self.source is None
            else {"sha256": self.source.sha256, "is_the_recorded_one": self.source.same},
        }


def collect(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    measure_anew: bool = False,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Findings:
    """Gather what a report shows.

    against: the slide that the file was made from: the worst tiles are shown beside its pixels.
    measure_anew: decode every tile and compare it with ``against`` instead of believing the file.
    Memory is bounded by the number of tiles and the readers' caches.

    Raises SettingsError for ``measure_anew`` without ``against``, SlideError or UnsupportedError
    where a file cannot be opened, VerifyError where ``against`` has another size, UnsupportedError
    or LimitError where ``measure_anew`` cannot be done. A file that this machine cannot decode, for
    want of its model or runtime, is reported without pictures.
    """
    if measure_anew and against is None:
        raise SettingsError("measuring needs the source: give --against SOURCE with --measure")
    with contextlib.ExitStack() as stack:
        slide = stack.enter_context(open_slide(path))
        source = None if against is None else stack.enter_context(open_slide(against))
        if source is not None:
            check_source(slide, source)
        passport, problem = find_passport(slide)
        stored = stored_bytes(slide.info)
        basis = None if passport is None else STORED
        if measure_anew and not isinstance(slide, TileReader):
            raise UnsupportedError(
                f"{path}: cannot be measured: only TIFF and OME-Zarr hand out their tiles"
            )
        if isinstance(slide, TileReader) and (measure_anew or passport is None):
            fresh = measure(
                slide,
                source if measure_anew else None,
                _filled_by(slide.info, passport),
                jobs=jobs,
                progress=progress,
            )
            if fresh is None and measure_anew:
                raise LimitError(f"{path}: cannot be measured: it has more than {MAX_TILES} tiles")
            if fresh is not None:
                mask = None if passport is None else passport.mask
                passport = Passport(fresh.levels, mask)
                basis = MEASURED if measure_anew else LENGTHS
        worst = None if passport is None else worst_tiles(slide.info, passport)
        overview, why = _overview(slide)
        model = slide.embedded_model()
        return Findings(
            info=slide.info,
            model_bytes=None if model is None else len(model),
            levels=level_figures(slide.info, stored, passport),
            passport=passport,
            basis=basis,
            problem=problem,
            worst=worst,
            overview=overview,
            no_overview=why,
            source=None if source is None else _check(slide.info, source),
            pictures=()
            if worst is None
            else tuple(_picture(slide, source, tile) for tile in worst.tiles),
        )


def _filled_by(info: SlideInfo, passport: Passport | None) -> TissueMask | None:
    """The mask that glass was filled by, None where glass was kept as it was."""
    glass = None if info.record is None else info.record.glass
    if passport is None or glass is None or glass.mode == "keep":
        return None
    return passport.mask


def _check(info: SlideInfo, source: SlideReader) -> SourceCheck:
    """Whether a slide is the one that the file's record names."""
    path = Path(source.info.path)
    if not path.is_file():
        return SourceCheck(None, None)  # a slide of several files has no digest
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    recorded = None if info.record is None else info.record.source
    return SourceCheck(digest, None if recorded is None else recorded.sha256 == digest)


def _overview(slide: SlideReader) -> tuple[Image | None, str | None]:
    """The whole slide, at most OVERVIEW_SIDE pixels a side, or None and why not."""
    from wsicodec.tissue.overview import read_overview

    first = slide.levels[0]
    cell = max(1, -(-max(first.height, first.width) // OVERVIEW_SIDE))
    try:
        return read_overview(slide, cell), None
    except (UnknownModelError, ModelError, RuntimeMissingError) as error:
        return None, str(error)


def _picture(slide: SlideReader, source: SlideReader | None, tile: TileFigures) -> TilePicture:
    place = (tile.level, tile.y, tile.x, tile.height, tile.width)
    ours: Image | None = None
    with contextlib.suppress(UnknownModelError, ModelError, RuntimeMissingError):
        ours = slide.read_region(*place)
    theirs = None if source is None else source_region(slide, source, *place)
    top = left = 0
    if ours is not None and max(ours.shape) > CROP_SIDE:
        top, left = (
            (tile.height - CROP_SIDE) // 2 if theirs is None else _worst_start(ours, theirs, 0),
            (tile.width - CROP_SIDE) // 2 if theirs is None else _worst_start(ours, theirs, 1),
        )
    crop = np.s_[max(top, 0) : max(top, 0) + CROP_SIDE, max(left, 0) : max(left, 0) + CROP_SIDE]
    return TilePicture(
        tile=tile,
        top=max(top, 0),
        left=max(left, 0),
        ours=None if ours is None else ours[crop],
        source=None if theirs is None else theirs[crop],
    )


def _worst_start(ours: Image, theirs: Image, axis: int) -> int:
    """Where along an axis the CROP_SIDE pixels with the largest squared error begin."""
    error: npt.NDArray[np.int64] = np.square(ours.astype(np.int32) - theirs).sum(
        axis=(1 - axis, 2), dtype=np.int64
    )
    if error.size <= CROP_SIDE:
        return 0
    total = np.concatenate([[0], np.cumsum(error)])
    return int(np.argmax(total[CROP_SIDE:] - total[:-CROP_SIDE]))
