"""Runs a conversion: blocks are coded on all cores and kept beside the target, then written.

Coding and writing are apart so that a killed conversion can go on, that the file can say of each
tile what became of it, and that the target has no trace of the order in which blocks got done.
Memory follows the settings and the number of jobs, never the slide's size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import wsicodec
from wsicodec.convert.beside import Beside
from wsicodec.convert.blocks import Block, CodedBlock, area_of, blocks_of, pixels_in, tiles_in
from wsicodec.convert.coders import (
    BlockCoder,
    Here,
    Processes,
    level_downsample,
    settings_as_dict,
)
from wsicodec.convert.ordered import as_done
from wsicodec.convert.plan import ConvertPlan, ConvertSettings, LevelPlan, is_zarr, make_plan
from wsicodec.convert.results import ConvertProgress, ConvertReport, LevelReport, Progress
from wsicodec.convert.source import Source, SourceDigest
from wsicodec.convert.space import check_space
from wsicodec.convert.tiles import TileCoder
from wsicodec.convert.work import TARGET_PART, Work
from wsicodec.errors import SlideError, UnsupportedError, VerifyError, WsicodecError
from wsicodec.metrics import METRIC_ARGUMENTS, TileQuality, summarise
from wsicodec.slide.ometiff import CodedLevel, check_slide, write_slide
from wsicodec.slide.opening import open_slide, open_tiles
from wsicodec.slide.passport import LevelMap, Passport, mode_counts, summarise_level
from wsicodec.slide.placing import IS_BACK, atomic_file, put_back
from wsicodec.slide.protocol import SlideReader
from wsicodec.slide.record import (
    AREA_AVERAGE,
    FROM_SOURCE,
    FileRecord,
    FloorRecord,
    GlassRecord,
    ModelId,
    SourceIdentity,
)
from wsicodec.tissue.mask import TissueMask

Image = npt.NDArray[np.uint8]

SMALL = 192
"""Tiles below which processes cost more time to start than they save."""
MODEL_SHARE = 100
"""A model is carried in files that are this many times as large, unless told otherwise."""
# settings that say how to work, not what comes out of it
_NOT_IN_FILE = ("jobs", "in_process", "cache_bytes", "overwrite", "resume")
_BEGUN_ANEW = "tiles that are kept as they are were written anew: there is nothing to resume"


def convert(
    source: str | Path,
    target: str | Path,
    settings: ConvertSettings | None = None,
    progress: Progress | None = None,
    *,
    reserved: int = 0,
) -> ConvertReport:
    """Convert a slide to a tiled pyramid: OME-TIFF, or OME-Zarr where the target ends in ``.zarr``.

    progress: called in the calling thread after each block, and when the target is assembled from
    them; what it raises ends the conversion.
    reserved: bytes that other conversions on the target's disk may still need, at most.

    The target appears when it is complete; on any failure nothing is left, but for the finished
    blocks where ``settings.resume`` keeps them. Raises SlideError (what cannot be read or written,
    a floor that the codec does not reach), UnsupportedError (pixels that are not 8-bit RGB, a codec
    without TIFF value), UnknownModelError, RuntimeMissingError, SettingsError, VerifyError (what
    was written is not what was coded).
    """
    started = time.perf_counter()
    chosen = settings or ConvertSettings()
    with open_slide(source, chosen.cache_bytes, strict=not chosen.accept_damage) as slide:
        plan = make_plan(slide.info, Path(target), chosen)
        warnings = check_space(plan, reserved)
        if chosen.keeps_streams:
            if chosen.resume:
                warnings = (*warnings, _BEGUN_ANEW)
            report = _keep_streams(slide, plan, progress)
            return dataclasses.replace(report, warnings=warnings)
        model, model_bytes = _model_of(chosen)
        # what is missing or wrong must show before the work starts
        TileCoder(chosen).try_out()
        files = Source(plan.source)
        beside = Beside.of(slide, plan)
        _check_output(plan, beside)
        with (
            Work(plan, _same_work(plan, model, files.content), keep=chosen.resume) as work,
            _digesting(plan) as digest,
        ):
            if is_zarr(plan.target) and put_back(plan.target):
                found = f"{plan.target}: {IS_BACK}"
                if not chosen.overwrite:
                    raise SlideError(f"{found}; pass --overwrite (overwrite=True) to replace")
                warnings = (*warnings, found)
            mask = _mask(slide, plan, work)
            downsamples = {lv.index: level_downsample(plan, lv) for lv in plan.levels}
            tile_coder = TileCoder(chosen, mask, downsamples)
            tally = _Tally(plan, work)
            _code(slide, plan, work, tile_coder, mask, tally, progress)
            # all of the file that is read is read by now
            identity = None if digest is None else digest.identity()
            files.check_unchanged(identity)
            passport = Passport(tuple(work.level_map(lv.index) for lv in plan.levels), mask)
            coded_bytes = sum(int(lv.bytes.sum(dtype=np.int64)) for lv in passport.levels)
            if chosen.embed_model is None and model_bytes is not None:
                model_bytes = model_bytes if coded_bytes >= MODEL_SHARE * len(model_bytes) else None
            record = _record(plan, model, beside, passport, identity)
            if progress is not None:
                progress(tally.assembling())
            _write(plan, work, tile_coder, beside, record, passport, model_bytes)
            measured = [_qualities(plan, work, lv.index) for lv in plan.levels]
        return ConvertReport(
            source=slide.info.path,
            target=plan.target,
            codec=chosen.codec,
            model=model,
            quality_setting=chosen.fixed_quality,
            source_bytes=slide.info.file_bytes,
            target_bytes=_size_of(plan.target),
            levels=tuple(
                _level_report(*each)
                for each in zip(plan.levels, passport.levels, measured, strict=True)
            ),
            quality=summarise([tile for tiles in measured for tile in tiles]),
            seconds=time.perf_counter() - started,
            pixels=plan.pixels,
            associated=tuple(image.name for image in beside.associated),
            dropped=beside.dropped,
            modes=mode_counts(passport.levels),
            tissue_share=None if mask is None else mask.tissue_share,
            floor_ssim=chosen.floor_ssim,
            floor_psnr=chosen.floor_psnr,
            below_floor=sum(q.below_floor for q in record.level_quality if q is not None),
            resumed=tally.resumed,
            removed=beside.removed,
            warnings=warnings,
        )


def _check_output(plan: ConvertPlan, beside: Beside) -> None:
    """Raise for what the output cannot hold, or this machine cannot write."""
    levels = [CodedLevel(level.height, level.width, level.tile_size, ()) for level in plan.levels]
    if is_zarr(plan.target):
        from wsicodec.slide import omezarr

        omezarr.check_slide(levels, beside.associated)
    else:
        layout = plan.settings.layout
        check_slide(levels, beside.metadata, layout=layout, associated=beside.associated)


def _keep_streams(
    slide: SlideReader, plan: ConvertPlan, progress: Progress | None
) -> ConvertReport:
    """Convert without coding: the source's compressed tiles, as they are or re-packed."""
    from wsicodec.convert.passthrough import copy_slide, transcode_slide
    from wsicodec.convert.rewrap import PassOptions

    settings = plan.settings
    files = Source(plan.source)
    beside = Beside.of(slide, plan)
    with _digesting(plan) as digest:

        def identity() -> SourceIdentity | None:
            found = None if digest is None else digest.identity()
            files.check_unchanged(found)
            return found

        options = PassOptions(
            layout=settings.layout,
            overwrite=settings.overwrite,
            strip_metadata=settings.deidentify,
            metadata=beside.metadata,
            associated=beside.associated,
            history=beside.history,
            source=identity,
            deidentified=settings.deidentify,
            secrets=beside.secrets,
        )
        if settings.codec == "copy":
            report = copy_slide(slide, plan.target, options, progress)
        else:
            report = transcode_slide(slide, plan.target, options, progress, jobs=settings.jobs)
    return dataclasses.replace(
        report,
        associated=tuple(image.name for image in beside.associated),
        dropped=beside.dropped,
        removed=beside.removed,
    )


@contextlib.contextmanager
def _digesting(plan: ConvertPlan) -> Iterator[SourceDigest | None]:
    """The source's digest being computed; None for a file that must not be linked to its source."""
    digest = None if plan.settings.deidentify else SourceDigest(plan.source)
    try:
        yield digest
    finally:
        if digest is not None:
            digest.stop()


# Coding


def _code(
    slide: SlideReader,
    plan: ConvertPlan,
    work: Work,
    tile_coder: TileCoder,
    mask: TissueMask | None,
    tally: _Tally,
    progress: Progress | None,
) -> None:
    """Code all blocks that are not done yet."""
    jobs = plan.settings.threads
    here = plan.settings.in_process
    if here is None:
        here = jobs == 1 or plan.tiles < SMALL
    coder: BlockCoder = (
        Here(slide, plan.passes, tile_coder) if here else Processes(plan, mask, jobs)
    )
    with ThreadPoolExecutor(jobs, thread_name_prefix="wsicodec") as pool:
        try:
            for number in range(len(plan.passes)):
                _code_pass(number, plan, work, coder, pool, tally, progress)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            coder.stop()


def _code_pass(
    number: int,
    plan: ConvertPlan,
    work: Work,
    coder: BlockCoder,
    pool: ThreadPoolExecutor,
    tally: _Tally,
    progress: Progress | None,
) -> None:
    passed = plan.passes[number]
    # pieces of the pass before are read where this one does not begin with a level of the source
    pieces = None if passed.levels[0].source is not None else _Pieces(plan, work, number - 1)

    def tasks() -> Iterator[Callable[[], CodedBlock]]:
        for block in blocks_of(number, passed):
            if block in work.blocks:
                continue
            pixels = None if pieces is None else pieces.read(block)
            yield functools.partial(_code_block, plan, coder, block, pixels)

    for coded in as_done(pool, tasks(), 2 * plan.settings.threads):
        work.add(coded)
        tally.add(coded)
        if progress is not None:
            progress(tally.progress())


def _code_block(
    plan: ConvertPlan, coder: BlockCoder, block: Block, pixels: Image | None
) -> CodedBlock:
    try:
        return coder.code(block, pixels)
    except WsicodecError as error:
        text = str(error)
        path = str(plan.source.path)
        raise type(error)(text if text.startswith(path) else f"{path}: {text}") from error


class _Tally:
    """Counts of what is done, by an earlier run and by this one."""

    def __init__(self, plan: ConvertPlan, work: Work) -> None:
        self._plan = plan
        self.resumed = sum(tiles_in(block, plan.passes[block.number]) for block in work.blocks)
        self._tiles = self.resumed
        self._pixels = sum(pixels_in(block, plan.passes[block.number]) for block in work.blocks)
        self._taken_over = self._pixels
        self._bytes = sum(work.coded_bytes(level.index) for level in plan.levels)
        self._level = plan.passes[-1].levels[0].index

    def add(self, coded: CodedBlock) -> None:
        """Count a block of this run."""
        self._level = self._plan.passes[coded.block.number].levels[0].index
        self._tiles += len(coded.tiles)
        self._pixels += pixels_in(coded.block, self._plan.passes[coded.block.number])
        self._bytes += sum(len(tile.data or b"") for tile in coded.tiles)

    def assembling(self) -> ConvertProgress:
        """How far the conversion is when all blocks are coded."""
        return dataclasses.replace(self.progress(), assembling=True)

    def progress(self) -> ConvertProgress:
        """How far the conversion is."""
        plan = self._plan
        share = self._pixels / plan.pixels
        return ConvertProgress(
            self._level,
            self._tiles,
            plan.tiles,
            self._pixels,
            plan.pixels,
            self._bytes,
            round(plan.source.file_bytes * share) - self._bytes,
            self._taken_over,
        )


class _Pieces:
    """The level that the blocks of a finished pass left, as a picture to read from."""

    def __init__(self, plan: ConvertPlan, work: Work, number: int) -> None:
        self._work = work
        self._number = number
        self._side = plan.passes[number].piece_side
        self._next = plan.passes[number + 1]

    def read(self, block: Block) -> Image:
        """Pixels of a block of the next pass."""
        area, side = area_of(block, self._next), self._side
        pixels = np.empty((area.height, area.width, 3), np.uint8)
        for row in range(area.y // side, -(-(area.y + area.height) // side)):
            for column in range(area.x // side, -(-(area.x + area.width) // side)):
                piece = self._work.piece(Block(self._number, row, column))
                y, x = row * side - area.y, column * side - area.x
                pixels[y : y + piece.shape[0], x : x + piece.shape[1]] = piece
        return pixels


def _mask(slide: SlideReader, plan: ConvertPlan, work: Work) -> TissueMask | None:
    """Where the tissue is, for settings that ask; as an earlier run found it where one did."""
    if plan.settings.glass == "keep":
        return None
    if (packed := work.mask()) is not None:
        return TissueMask.parse(packed)
    from wsicodec.tissue import find_tissue

    mask = find_tissue(slide, plan.settings.tissue)
    work.keep_mask(mask.pack())
    return mask


# Writing


def _write(
    plan: ConvertPlan,
    work: Work,
    tile_coder: TileCoder,
    beside: Beside,
    record: FileRecord,
    passport: Passport,
    model: bytes | None,
) -> None:
    settings = plan.settings
    glass = None
    if settings.glass == "drop":
        glass = tile_coder.glass_tile
    levels = [
        CodedLevel(level.height, level.width, level.tile_size, work.tiles(level.index), glass)
        for level in plan.levels
    ]

    def check(written: Path) -> None:
        _check_written(written, plan, work, glass)
        beside.check(written, plan.target)

    if is_zarr(plan.target):
        from wsicodec.slide.omezarr import write_omezarr

        write_omezarr(
            plan.target,
            levels,
            settings.codec,
            beside.metadata,
            record,
            model=model,
            associated=beside.associated,
            passport=passport.pack(),
            overwrite=settings.overwrite,
            check=check,
            part=work.folder / TARGET_PART,
        )
        return
    part = work.folder / TARGET_PART
    with atomic_file(plan.target, overwrite=settings.overwrite, part=part) as file:
        write_slide(
            file,
            levels,
            settings.codec,
            beside.metadata,
            record,
            model=model,
            layout=settings.layout,
            associated=beside.associated,
            passport=passport.pack(),
        )
        file.flush()
        check(Path(file.name))


def _check_written(path: Path, plan: ConvertPlan, work: Work, glass: bytes | None) -> None:
    """Every tile that the file holds is the one that was coded. Raises VerifyError."""
    with open_tiles(path) as slide:
        if len(slide.levels) != len(plan.levels):
            raise VerifyError(f"{plan.target}: {len(slide.levels)} levels were written")
        for level in plan.levels:
            places = ((r, c) for r in range(level.rows) for c in range(level.columns))
            for (row, column), data in zip(places, work.tiles(level.index), strict=True):
                wanted = glass if data is None else data
                if slide.tile_bytes(level.index, row, column) != wanted:
                    raise VerifyError(
                        f"{plan.target}: level {level.index}: tile at row {row}, column {column} "
                        "is not on the disk as it was coded"
                    )


def _model_of(settings: ConvertSettings) -> tuple[ModelId | None, bytes | None]:
    """The model's identity, and its bytes where they may be embedded."""
    if settings.codec != "learned" or settings.lossless:
        if settings.embed_model:
            raise UnsupportedError("only lossy learned tiles have a model that could be embedded")
        return None, None
    from wsicodec.models import find_model

    found = find_model(settings.model)
    content = None if settings.embed_model is False else found.path.read_bytes()
    return ModelId(found.name, found.digest), content


def _same_work(plan: ConvertPlan, model: ModelId | None, source: str) -> dict[str, Any]:
    """What two runs must share for one to go on where the other stopped."""
    settings = settings_as_dict(plan.settings)
    return {
        "wsicodec": wsicodec.__version__,
        "source": source,
        "settings": {k: v for k, v in settings.items() if k not in _NOT_IN_FILE},
        "model": None if model is None else model.sha256,
        "levels": [[level.height, level.width, level.source] for level in plan.levels],
    }


def _record(
    plan: ConvertPlan,
    model: ModelId | None,
    beside: Beside,
    passport: Passport,
    identity: SourceIdentity | None,
) -> FileRecord:
    settings, mask = plan.settings, passport.mask
    step: tuple[str, ...] = ()
    if settings.target is not None:
        step = (f"{settings.codec} {settings.target} {settings.options[settings.target]:g}",)
    elif not settings.lossless:
        step = (f"{settings.codec} quality {settings.quality}",)
    floor = FloorRecord(settings.floor_ssim, settings.floor_psnr) if settings.has_floor else None
    counts = mode_counts(passport.levels)
    own = ("plain", "shared glass", "constant", settings.codec)
    return FileRecord(
        wsicodec=wsicodec.__version__,
        codec=settings.codec,
        quality=settings.fixed_quality,
        models=() if model is None else (model,),
        history=(*beside.history, *step),
        levels=tuple(
            AREA_AVERAGE if level.source is None else FROM_SOURCE for level in plan.levels
        ),
        options=dict(settings.options),
        metrics=METRIC_ARGUMENTS,
        settings={
            "tile_size": settings.tile_size,
            "levels": settings.levels,
            "layout": settings.layout,
            "measure": settings.measure,
        },
        source=identity,
        deidentified=settings.deidentify,
        glass=None
        if mask is None
        else GlassRecord(settings.glass, mask.method, mask.background, mask.tissue_share),
        floor=floor,
        level_bytes=tuple(int(lv.bytes.sum(dtype=np.int64)) for lv in passport.levels),
        level_quality=tuple(summarise_level(lv, floor) for lv in passport.levels),
        fallbacks={mode: count for mode, count in counts.items() if mode not in own},
    )


def _qualities(plan: ConvertPlan, work: Work, index: int) -> Sequence[TileQuality]:
    size = plan.settings.tile_size
    return [
        TileQuality(index, row * size, column * size, psnr, ssim)
        for row, column, psnr, ssim in work.measured(index)
    ]


def _level_report(
    level: LevelPlan, found: LevelMap, measured: Sequence[TileQuality]
) -> LevelReport:
    coded_bytes = int(found.bytes.sum(dtype=np.int64))
    quality = summarise(measured)
    return LevelReport(level.index, level.height, level.width, level.tiles, coded_bytes, quality)


def _size_of(target: Path) -> int:
    if target.is_dir():
        return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return target.stat().st_size
