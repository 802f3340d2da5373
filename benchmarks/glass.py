"""What removing glass saves, for each codec, beside what the codec itself saves.

    python benchmarks/glass.py --slides FILE [FILE ...] --json OUT [--codecs jpeg jpegxl learned]

The table of Høibø et al. (2026). Each slide is converted with every codec in three ways: glass
kept, filled with the slide's background colour, and dropped. Codecs are compared at equal quality:
for each the lowest quality at which a sample of the slide's tissue tiles has a mean SSIM of 0.95.
Bytes are those of all tiles of all levels, without what is beside the pyramid.

The JSON file: ``slides`` {slide: {``tissue_share``, ``stored_bytes``, ``quality`` {codec: n},
``ssim`` {codec: mean of the sample}, ``bytes`` {codec: {keep | fill | drop: n}}, ``saved`` {codec:
{keep | fill | drop: {``against_jpeg``, ``against_stored``, ``by_glass``: %}}}}}, ``machine``,
``versions``. ``against_jpeg``: the slide's pixels as JPEG with glass kept, in this run;
``against_stored``: the tiles that the file came with; ``by_glass``: the same codec keeping glass.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import wsicodec
from benchmarks import record
from benchmarks.images import spread
from wsicodec.convert import ConvertSettings, convert
from wsicodec.metrics import Image, ssim
from wsicodec.slide.opening import open_slide
from wsicodec.slide.protocol import SlideReader
from wsicodec.slide.tiff import TiffReader
from wsicodec.tissue import TissueMask, find_tissue

CODECS = ("jpeg", "jpegxl", "learned")
MODES = ("keep", "fill", "drop")
SSIM_TARGET = 0.95
TILE = 256


def sample(slide: SlideReader, mask: TissueMask, count: int) -> list[Image]:
    """Tiles of level 0 that hold no glass, evenly spread; where there are none, any."""
    level = slide.levels[0]
    places = [
        (y, x)
        for y in range(0, level.height - TILE + 1, TILE)
        for x in range(0, level.width - TILE + 1, TILE)
    ]
    tissue = [p for p in places if not mask.glass(1.0, *p, TILE, TILE).any()]
    return [slide.read_region(0, y, x, TILE, TILE) for y, x in spread(tissue or places, count)]


def matched(tiles: Sequence[Image], codec: str) -> tuple[int, float]:
    """(lowest quality whose mean SSIM over the tiles is SSIM_TARGET, that SSIM)."""

    def at(quality: int) -> float:
        coded = [wsicodec.encode(tile, codec=codec, quality=quality) for tile in tiles]
        pairs = zip(tiles, map(wsicodec.decode, coded), strict=True)
        return float(np.mean([ssim(a, b) for a, b in pairs]))

    low, high, best = 1, 100, (100, at(100))
    while low <= high:
        middle = (low + high) // 2
        reached = at(middle)
        if reached >= SSIM_TARGET:
            best, high = (middle, reached), middle - 1
        else:
            low = middle + 1
    return best


def stored_bytes(slide: SlideReader) -> int | None:
    """Bytes of the tiles that the file came with; None where it is no TIFF."""
    if not isinstance(slide, TiffReader):
        return None
    return sum(
        len(slide.tile_bytes(level.index, row, column))
        for level in slide.levels
        for row in range(level.rows)
        for column in range(level.columns)
    )


def of_slide(
    path: Path, codecs: Sequence[str], *, tiles: int, tissue: str, jobs: int | None, folder: Path
) -> dict[str, Any]:
    """The figures of one slide."""
    with open_slide(path) as slide:
        mask = find_tissue(slide, tissue)
        chosen = sample(slide, mask, tiles)
        stored = stored_bytes(slide)
    quality = {codec: matched(chosen, codec) for codec in codecs}
    found: dict[str, dict[str, int]] = {}
    for codec in codecs:
        found[codec] = {}
        for mode in MODES:
            target = folder / f"{codec}-{mode}.ome.tiff"
            settings = ConvertSettings(
                codec,
                quality=quality[codec][0],
                glass=mode,
                tissue=tissue,
                measure="none",
                associated=False,
                jobs=jobs,
            )
            report = convert(path, target, settings)
            found[codec][mode] = sum(level.coded_bytes for level in report.levels)
            target.unlink()
    jpeg = found.get("jpeg", {}).get("keep")
    return {
        "tissue_share": mask.tissue_share,
        "stored_bytes": stored,
        "quality": {codec: q for codec, (q, _) in quality.items()},
        "ssim": {codec: s for codec, (_, s) in quality.items()},
        "bytes": found,
        "saved": {
            codec: {
                mode: {
                    "against_jpeg": _saved(count, jpeg),
                    "against_stored": _saved(count, stored),
                    "by_glass": _saved(count, modes["keep"]),
                }
                for mode, count in modes.items()
            }
            for codec, modes in found.items()
        },
    }


def _saved(count: int, reference: int | None) -> float | None:
    return None if not reference else round(100 * (1 - count / reference), 2)


def print_report(report: Mapping[str, Any]) -> None:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{-value:+.1f} %"

    for name, slide in report["slides"].items():
        print(f"\n{name}: {slide['tissue_share']:.0%} tissue")
        print(f"{'':18}{'quality':>8}{'SSIM':>8}{'MB':>10}{'JPEG':>10}{'stored':>10}{'keep':>10}")
        for codec, modes in slide["bytes"].items():
            for mode, count in modes.items():
                saved = slide["saved"][codec][mode]
                print(
                    f"{codec + ' ' + mode:18}{slide['quality'][codec]:8}{slide['ssim'][codec]:8.4f}"
                    f"{count / 1e6:10.3f}{percent(saved['against_jpeg']):>10}"
                    f"{percent(saved['against_stored']):>10}{percent(saved['by_glass']):>10}"
                )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="What removing glass saves, for each codec.",
        epilog="example: python benchmarks/glass.py --slides slide.svs --json glass.json",
    )
    parser.add_argument("--slides", type=Path, nargs="+", required=True)
    parser.add_argument("--json", type=Path, required=True, help="where to write the report")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), help="default: all three")
    parser.add_argument("--tiles", type=int, default=24, help="of the sample (24)")
    parser.add_argument("--tissue", choices=("network", "otsu"), default="network")
    parser.add_argument("--jobs", type=int, help="default: all cores")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {"slides": {}, "tissue": options.tissue, "tile": TILE}
    with tempfile.TemporaryDirectory() as folder:
        for path in options.slides:
            report["slides"][path.name] = of_slide(
                path,
                options.codecs,
                tiles=options.tiles,
                tissue=options.tissue,
                jobs=options.jobs,
                folder=Path(folder),
            )
    report |= {"machine": record.machine(), "versions": record.versions()}
    record.write(report, options.json, sys.argv if arguments is None else arguments)
    print_report(report)


if __name__ == "__main__":
    main()
