"""What efforts cost and save: time a tile, and bytes at equal quality against the default effort.

    python benchmarks/effort.py --images DIR --json effort.json

One tile an image, its middle, coded at several qualities with every effort. Bytes are compared
along the curves (BD-rates) in SSIM and in PSNR; times are those of the thread, at quality 70.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import wsicodec
from benchmarks import images as pictures
from benchmarks import record
from benchmarks.metrics import QUALITY_SCALES, bd_rate
from wsicodec import metrics
from wsicodec.codec.options import DEFAULT_EFFORT, MAX_EFFORT, TUNES
from wsicodec.metrics import Image

QUALITIES = (42, 50, 56, 62, 70, 76, 82, 88)
TIMED = 70
"""The quality at which times are taken."""

Point = tuple[float, float, float, float]
"""Bits per pixel, PSNR, SSIM, milliseconds of the thread."""


def coded(tile: Image, quality: int, effort: int, tune: str, model: str) -> Point:
    """One tile at one quality."""
    started = time.thread_time()
    data = wsicodec.encode(
        tile, model=model, quality=quality, effort=effort, tune=tune, modes="learned"
    )
    spent = 1e3 * (time.thread_time() - started)
    decoded = wsicodec.decode(data)
    bpp = 8 * len(data) / tile[..., 0].size
    return bpp, metrics.psnr(tile, decoded), metrics.ssim(tile, decoded), spent


def curve_of(tile: Image, effort: int, tune: str, model: str) -> list[Point]:
    return [coded(tile, quality, effort, tune, model) for quality in QUALITIES]


def against(reference: Sequence[Point], tested: Sequence[Point], metric: str) -> float:
    """BD-rate in per cent; nan for curves that do not rise, as those of glass."""
    column, scale = {"psnr": 1, "ssim": 2}[metric], QUALITY_SCALES[metric]
    first, second = (
        [(point[0], scale(point[column])) for point in curve] for curve in (reference, tested)
    )
    try:
        return bd_rate(first, second).pchip
    except ValueError:
        return math.nan


def run(
    tiles: dict[str, Image], efforts: Sequence[int], tunes: Sequence[str], model: str
) -> dict[str, Any]:
    """The report: for every tune and effort, milliseconds a tile and bytes at equal quality."""
    wsicodec.encode(next(iter(tiles.values())), model=model)  # compiled, loaded
    report: dict[str, Any] = {"images": list(tiles), "model": model, "qualities": QUALITIES}
    for tune in tunes:
        # effort by effort within a tile, so that the machine's drift is no effort's cost
        curves = {
            name: {effort: curve_of(tile, effort, tune, model) for effort in efforts}
            for name, tile in tiles.items()
        }
        base = {
            name: found.get(DEFAULT_EFFORT) or curve_of(tiles[name], DEFAULT_EFFORT, tune, model)
            for name, found in curves.items()
        }
        rows = report[tune] = {}
        for effort in efforts:
            timed = {name: curves[name][effort][QUALITIES.index(TIMED)][3] for name in tiles}
            rows[effort] = {
                "ms": statistics.median(timed.values()),
                "mpx_per_second": statistics.median(
                    tile[..., 0].size / timed[name] / 1e3 for name, tile in tiles.items()
                ),
            }
            for metric in ("ssim", "psnr"):
                found = [against(base[n], curves[n][effort], metric) for n in tiles]
                known = [value for value in found if not math.isnan(value)]
                rows[effort][metric] = statistics.fmean(known) if known else None
                rows[effort][f"{metric}_images"] = len(known)
            print(f"{tune} effort {effort}: {line(rows[effort])}", flush=True)
    report |= {"machine": record.machine(), "versions": record.versions()}
    return report


def line(row: dict[str, Any]) -> str:
    saved = ", ".join(
        f"{name} {row[metric]:+.1f} %" if row[metric] is not None else f"{name} unknown"
        for metric, name in (("ssim", "SSIM"), ("psnr", "PSNR"))
    )
    return f"{row['ms']:.1f} ms a tile, {row['mpx_per_second']:.2f} Mpx/s, bytes at equal {saved}"


def middle_tiles(folder: Path, side: int, count: int) -> dict[str, Image]:
    """The middle tile of evenly spread images; images smaller than a tile are one."""
    found = {}
    for path in pictures.spread(pictures.find_images(folder), count):
        tiles = pictures.load_tiles(path, side, sys.maxsize)
        name = path.name if path == folder else path.relative_to(folder).as_posix()
        found[name] = np.ascontiguousarray(tiles[len(tiles) // 2])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--json", type=Path, required=True, help="where to write the report")
    parser.add_argument("--efforts", type=int, nargs="+", default=range(1, MAX_EFFORT + 1))
    parser.add_argument("--tunes", nargs="+", default=TUNES, choices=TUNES)
    parser.add_argument("--count", type=int, default=12, help="images (12)")
    parser.add_argument("--tile", type=int, default=256, help="tile side in pixels (256)")
    parser.add_argument("--model", default="he-fast")
    options = parser.parse_args(arguments)
    tiles = middle_tiles(options.images, options.tile, options.count)
    if not tiles:
        parser.error(f"no images in {options.images}")
    report = run(tiles, list(options.efforts), options.tunes, options.model)
    record.write(report, options.json, sys.argv if arguments is None else arguments)


if __name__ == "__main__":
    main()
