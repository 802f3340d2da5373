"""``wsicodec info``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wsicodec.cli.common import Exit, Subparsers, add_command, print_json, print_table

if TYPE_CHECKING:
    from wsicodec.report.figures import LevelFigures, TileFigures, Worst
    from wsicodec.slide.passport import Passport
    from wsicodec.slide.protocol import SlideInfo
    from wsicodec.slide.record import FileRecord

_WORST = 5  # tiles that people are shown; --json lists ten
_OF_SEVERAL_FILES = ("mirax", "hamamatsu", "dicom")  # formats whose slides may be
_MAX_LISTED = 24  # items of a list in the file that are shown


def add(commands: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "info",
        run,
        summary="show what a slide file says of itself; decodes no pixel",
        example="wsicodec info slide.ome.tiff",
    )
    parser.add_argument("file", help="SVS, OME-TIFF or TIFF")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from wsicodec.report.figures import level_figures, worst_tiles
    from wsicodec.report.stored import find_passport, stored_bytes
    from wsicodec.slide.opening import open_slide

    with open_slide(arguments.file) as slide:
        info = slide.info
        model = slide.embedded_model()
        passport, problem = find_passport(slide)
    levels = level_figures(info, stored_bytes(info), passport)
    worst = None if passport is None else worst_tiles(info, passport)
    carried = None if model is None else len(model)
    if arguments.json:
        print_json(
            {
                **info.as_dict(),
                "embedded_model_bytes": carried,
                "level_figures": [level.as_dict() for level in levels],
                "passport": _passport_dict(passport, worst, problem),
            }
        )
        return Exit.OK
    record = info.record
    _print_slide(info, levels, record is not None and record.floor is not None)
    if info.record is not None:
        _print_record(info.record, carried)
    if passport is not None and worst is not None:
        _print_passport(passport, worst)
    elif info.record is not None:
        print(f"  quality passport: {_line(problem or '')}")
    return Exit.OK


def _passport_dict(
    passport: Passport | None, worst: Worst | None, problem: str | None
) -> dict[str, Any]:
    from wsicodec.slide.passport import mode_counts

    if passport is None or worst is None:
        return {"present": False, "problem": problem}
    mask = passport.mask
    return {
        "present": True,
        "problem": None,
        "modes": mode_counts(passport.levels),
        "worst_by": worst.by,
        "worst": [tile.as_dict() for tile in worst.tiles],
        "mask": None
        if mask is None
        else {
            "rows": mask.tissue.shape[0],
            "columns": mask.tissue.shape[1],
            "cell": mask.cell,
            "method": mask.method,
            "tissue_share": mask.tissue_share,
        },
    }


def _print_slide(info: SlideInfo, levels: Sequence[LevelFigures], floor: bool) -> None:
    """floor: whether one was asked for."""
    from wsicodec.report.text import size_text

    print(
        f"{_line(str(info.path))}: {info.format}, {size_text(info.file_bytes)}, "
        f"{_line(info.compression)} tiles"
    )
    _print_levels(levels, floor)
    sides = ["not stated" if mpp is None else f"{mpp:g}" for mpp in (info.mpp_x, info.mpp_y)]
    print(f"  resolution: {' x '.join(sides)} µm per pixel")
    power = "not stated" if info.magnification is None else f"{info.magnification:g}x"
    print(f"  magnification: {power}")
    profile = "none" if info.icc_profile is None else f"{len(info.icc_profile)} bytes"
    print(f"  ICC profile: {profile}")
    print(f"  lossy history: {_listed(info.history) or 'none known'}")
    print(f"  other images: {_listed(info.associated) or 'none'}")


def _print_levels(levels: Sequence[LevelFigures], floor: bool) -> None:
    """A row a level; fidelity where any level was measured."""
    from wsicodec.report.text import psnr_text, size_text, ssim_text

    header = ["  level", "pixels", "downsample", "tiles", "of", "bytes", "bpp"]
    measured = any(level.quality for level in levels)
    if measured:
        header += ["PSNR mean", "p01", "worst", "SSIM mean", "p01", "worst", "below floor"]
    rows = []
    for figures in levels:
        level, quality = figures.level, figures.quality
        row = [
            f"  {level.index}",
            f"{level.width} x {level.height}",
            f"{level.downsample:.4g}",
            str(level.rows * level.columns),
            f"{level.tile_width} x {level.tile_height}",
            "?" if figures.stored is None else size_text(figures.stored),
            "?" if figures.bpp is None else f"{figures.bpp:.3f}",
        ]
        if quality is not None:
            row += [psnr_text(v) for v in (quality.psnr_mean, quality.psnr_p01, quality.psnr_worst)]
            row += [ssim_text(v) for v in (quality.ssim_mean, quality.ssim_p01, quality.ssim_worst)]
            row.append(f"{quality.below_floor} of {quality.measured}" if floor else "-")
        elif measured:
            row += ["-"] * 7
        rows.append(row)
    print_table(header, rows)


def _print_record(record: FileRecord, carried: int | None) -> None:
    """How wsicodec made the file."""
    from wsicodec.codec import TARGETS
    from wsicodec.report.text import colour_text, share_text, size_text

    targets = [f"{n} {record.options[n]}" for n in TARGETS if n in record.options]
    quality = targets[0] if targets else "without loss"
    if record.quality is not None:
        quality = f"quality {record.quality}"
    print(f"  coded by wsicodec {_line(record.wsicodec)}: {_line(record.codec)}, {_line(quality)}")
    for model in record.models[:_MAX_LISTED]:
        print(f"  model: {_line(model.name)}, SHA-256 {_line(model.sha256)}")
    print(f"  model carried in the file: {'no' if carried is None else size_text(carried)}")
    if record.source is not None:
        source = record.source
        of_one = " of the file by which it is opened" if source.format in _OF_SEVERAL_FILES else ""
        print(
            f"  source: {_line(source.format)}, {_line(source.compression)}, "
            f"{size_text(source.bytes)}, SHA-256{of_one} {_line(source.sha256)}"
        )
    print(f"  de-identified: {'yes, the source is not named' if record.deidentified else 'no'}")
    if record.glass is not None:
        glass = record.glass
        print(
            f"  glass: {_line(glass.mode)}; tissue {share_text(glass.tissue_share)} of the area by "
            f"{_line(glass.method)}; background {colour_text(glass.background)}"
        )
    if record.floor is not None:
        asked = {"SSIM": record.floor.ssim, "PSNR": record.floor.psnr}
        wanted = [f"{name} {value:g}" for name, value in asked.items() if value is not None]
        below = sum(level.below_floor for level in record.level_quality if level)
        count = sum(level.measured for level in record.level_quality if level)
        print(f"  floor: {' and '.join(wanted)}; {below} of {count} measured tiles below")
    for title, values in (
        ("fallbacks", record.fallbacks),
        ("options", record.options),
        ("settings", record.settings),
    ):
        if values:
            print(f"  {title}: {_mapping(values)}")
    names = sorted(record.metrics)
    if names:
        print(f"  metrics: {_listed(names)} (arguments with --json)")


def _print_passport(passport: Passport, worst: Worst) -> None:
    """What the maps say, in short."""
    from wsicodec.report.text import psnr_text, ssim_text
    from wsicodec.slide.passport import mode_counts

    counts = mode_counts(passport.levels)
    modes = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    print(f"  quality passport: {sum(counts.values())} tiles; {modes}")
    if not worst.tiles:
        return
    print(f"  worst tiles by {worst.by} (wsicodec report draws them):")
    header = ["  level", "row", "column", "y", "x", "PSNR", "SSIM", "mode", "bytes", ""]
    rows = [
        [
            f"  {tile.level}",
            *(str(number) for number in (tile.row, tile.column, tile.y, tile.x)),
            psnr_text(tile.psnr),
            ssim_text(tile.ssim),
            tile.mode,
            str(tile.length),
            _remark(tile),
        ]
        for tile in worst.tiles[:_WORST]
    ]
    print_table(header, rows)


def _remark(tile: TileFigures) -> str:
    return "below the floor" if tile.below_floor else ""


def _line(text: str) -> str:
    """A string of the file: no control character of it reaches the terminal."""
    from wsicodec.printing import printable

    return printable(text)


def _listed(values: Sequence[str]) -> str:
    more = [f"and {len(values) - _MAX_LISTED} more"] if len(values) > _MAX_LISTED else []
    return ", ".join([_line(value) for value in values[:_MAX_LISTED]] + more)


def _mapping(values: Mapping[str, Any]) -> str:
    return _listed([f"{name}={value}" for name, value in sorted(values.items())])
