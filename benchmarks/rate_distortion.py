"""Rate against distortion of the learned codec and the reference codecs.

    python benchmarks/rate_distortion.py --images DIR --json OUT [--codecs ...] [--models ...]

DIR holds images (.jpg .png .webp .jxl .tif) or slides that tifffile reads, in any order; nothing
is fetched. Each image is cut into tiles of ``--tile`` pixels as it is, without resampling; what
remains at its right and lower edges is left out, except that a side shorter than the tile is taken
whole. Large images and slides are represented by ``--max-tiles`` of their tiles.

Per image: bits per pixel count every byte of every tile's stream with all headers; PSNR is that of
the squared error pooled over the tiles; SSIM and MS-SSIM are means over the tiles. Figures at a
target, and BD-rates, are found on each image's curve and then averaged over images.

The learned model has three curves: ``learned`` as it is, ``learned-ssim`` and ``learned-psnr`` with
``tune="ssim"`` and ``tune="psnr"``.

The JSON file:

- ``curves`` {image: {codec: [[bpp, psnr, ssim, ms_ssim], ...]}}, cheapest first (PSNR 100 when
  equal, MS-SSIM null below 176 pixels); ``details``, point by point, the value of the native
  parameter (named in ``contenders``), worst and 1st-percentile SSIM, CIEDE2000;
- ``bd_rate`` {codec: {reference: {metric: figures in per cent}}}, means over images;
  ``bd_rate_by_group`` {kind: {name: the same}}, ``bd_rate_by_image``;
- ``at_ssim`` and ``at_ms_ssim``, bytes where SSIM is 0.95 and where MS-SSIM is 0.99, against JPEG
  4:2:0, with the images that do not get there; ``colour_at_ssim``, CIEDE2000 where SSIM is 0.95;
- each over all images and by kind of group: ``set`` (a file's name up to its last underscore) and,
  where ``manifest.csv`` in the folder or above it tells, ``history`` (none, JPEG, JPEG-2000),
  ``stain``, ``domain`` (H&E or not); ``groups`` says which images these are;
- ``images``, ``skipped``, ``metrics``, ``machine``, ``versions``, ``command``.

The tables printed at the end hold all of it but the curves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import metrics as measures
from benchmarks import record
from benchmarks.contenders import CODECS, Contender, contenders
from benchmarks.curves import (
    MS_SSIM_TARGET,
    SSIM_TARGET,
    Curve,
    at_target,
    bd_means,
    bd_rates,
    colour_at_target,
)
from benchmarks.groups import group, read_manifest
from benchmarks.images import find_images, load_tiles
from benchmarks.report import images_text, plot, summary_text
from wsicodec import metrics
from wsicodec.metrics import Image

CACHE_VERSION = 1

# -- measuring ---------------------------------------------------------------------------------


def measure(tiles: Sequence[Image], contender: Contender, value: float) -> dict[str, Any]:
    """One point of a curve: rate and fidelity of all tiles at one value of the parameter."""
    import wsicodec

    size = squares = 0
    ssims, ms_ssims, means, p95s = [], [], [], []
    for tile in tiles:
        stream = contender.encode(tile, value)
        decoded = wsicodec.decode(stream)
        size += len(stream)
        error = tile.astype(np.int32) - decoded
        squares += int(np.square(error).sum(dtype=np.int64))
        ssims.append(metrics.ssim(tile, decoded))
        ms_ssims.append(measures.ms_ssim(tile, decoded))
        mean, p95 = measures.ciede2000(tile, decoded)
        means.append(mean)
        p95s.append(p95)
    samples = sum(tile.size for tile in tiles)
    psnr = 10 * math.log10(255**2 * samples / squares) if squares else metrics.PSNR_OF_EQUAL
    ms_ssim = statistics.fmean(ms_ssims)
    return {
        "value": value,
        "bytes": size,
        "bpp": 8 * size / (samples / 3),
        "psnr": min(psnr, metrics.PSNR_OF_EQUAL),
        "ssim": statistics.fmean(ssims),
        "ssim_worst": min(ssims),
        "ssim_p01": float(np.percentile(ssims, 1)),
        "ms_ssim": None if math.isnan(ms_ssim) else ms_ssim,
        "ciede2000_mean": statistics.fmean(means),
        "ciede2000_p95": statistics.fmean(p95s),
    }


def _cache_file(
    cache: Path | None, tiles: Sequence[Image], contender: Contender
) -> tuple[Path | None, str]:
    """Where the curve of these pixels and this codec is kept, and the digest of the pixels.

    Learned curves are not cached: a model is known by its name only until it is loaded.
    """
    digest = hashlib.sha256()
    for tile in tiles:
        digest.update(repr(tile.shape).encode())
        digest.update(tile.data)
    pixels = digest.hexdigest()
    if cache is None or contender.codec == "learned":
        return None, pixels
    import imagecodecs

    key = json.dumps(
        [
            CACHE_VERSION,
            pixels,
            contender.codec,
            contender.parameter,
            contender.points,
            sorted(contender.options.items()),
            imagecodecs.__version__,
            metrics.METRIC_ARGUMENTS,
            measures.METRIC_ARGUMENTS,
        ]
    )
    return cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json", pixels


@dataclass(frozen=True)
class Task:
    """One image for one worker: all contenders, so that it is read once."""

    name: str
    path: Path
    contenders: Mapping[str, Contender]
    tile: int
    max_tiles: int
    cache: Path | None


def run_task(task: Task) -> dict[str, Any]:
    """The curves of one image: points by codec, cheapest first."""
    tiles = load_tiles(task.path, task.tile, task.max_tiles)
    if not tiles:
        raise ValueError("holds no tile")
    points: dict[str, list[dict[str, Any]]] = {}
    pixels = ""
    for label, contender in task.contenders.items():
        file, pixels = _cache_file(task.cache, tiles, contender)
        if file is not None and file.exists():
            points[label] = json.loads(file.read_text())
            continue
        curve = [measure(tiles, contender, value) for value in contender.points]
        points[label] = sorted(curve, key=lambda point: (point["bpp"], point["psnr"]))
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(points[label]))
            part.replace(file)  # never a torn file, whoever else writes the same
    return {
        "points": points,
        "tiles": len(tiles),
        "pixels": sum(t.shape[0] * t.shape[1] for t in tiles),
        "sha256": pixels,
    }


def _start_worker() -> None:
    # the processes share the cores: no threads inside
    os.environ["WSICODEC_NUM_THREADS"] = "1"


# -- report ------------------------------------------------------------------------------------


def run(
    images: Path,
    labels: Mapping[str, Contender],
    *,
    tile: int = 256,
    max_tiles: int = 64,
    jobs: int = 1,
    cache: Path | None = None,
) -> dict[str, Any]:
    """The report on a folder. Raises ValueError when it has no usable image."""
    files = find_images(images)
    root = images if images.is_dir() else images.parent
    tasks = [Task(f.relative_to(root).as_posix(), f, labels, tile, max_tiles, cache) for f in files]
    results: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}

    def note(task: Task, outcome: dict[str, Any] | Exception) -> None:
        done = f"[{len(results) + len(skipped) + 1}/{len(tasks)}] {task.name}"
        if isinstance(outcome, Exception):
            skipped[task.name] = f"{type(outcome).__name__}: {outcome}"
            print(f"{done} skipped: {skipped[task.name]}", file=sys.stderr)
        else:
            results[task.name] = outcome
            print(f"{done}: {outcome['tiles']} tiles", file=sys.stderr, flush=True)

    if jobs == 1:
        for task in tasks:
            note(task, _attempt(task))
    else:
        # spawn: the libraries below have threads of their own, which a fork would lose
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, _start_worker) as pool:
            futures = {pool.submit(_attempt, task): task for task in tasks}
            for future in as_completed(futures):
                note(futures[future], future.result())
    if not results:
        raise ValueError(f"no usable image in {images}: {skipped or 'it holds none'}")

    ordered = {task.name: results[task.name] for task in tasks if task.name in results}
    curves: dict[str, dict[str, Curve]] = {
        name: {
            label: [[p["bpp"], p["psnr"], p["ssim"], p["ms_ssim"]] for p in points]
            for label, points in result["points"].items()
        }
        for name, result in ordered.items()
    }
    manifest = read_manifest(root)
    groups = group(list(curves), manifest)
    pixels = {name: result["pixels"] for name, result in ordered.items()}
    details = {name: result["points"] for name, result in ordered.items()}
    rates = bd_rates(curves)
    means = bd_means(curves, rates, groups)
    return {
        "curves": curves,
        "bd_rate": means.pop("all"),
        "bd_rate_by_group": means,
        "bd_rate_by_image": rates,
        "at_ssim": at_target(curves, SSIM_TARGET, groups, pixels),
        "at_ms_ssim": at_target(curves, MS_SSIM_TARGET, groups, pixels),
        "colour_at_ssim": colour_at_target(details, SSIM_TARGET, groups),
        "details": details,
        "images": {
            name: {
                **{key: result[key] for key in ("tiles", "pixels", "sha256")},
                **manifest.get(Path(name).name, {}),
            }
            for name, result in ordered.items()
        },
        "groups": groups,
        "skipped": skipped,
        "tile": tile,
        "metrics": {**metrics.METRIC_ARGUMENTS, **measures.METRIC_ARGUMENTS},
        "contenders": {label: contender.as_dict() for label, contender in labels.items()},
        "machine": record.machine(),
        "versions": record.versions(),
    }


def _attempt(task: Task) -> dict[str, Any] | Exception:
    """The result of a task, or what went wrong; one bad image must not end a long run."""
    from wsicodec.errors import RuntimeMissingError, SettingsError, UnknownModelError

    try:
        return run_task(task)
    except (RuntimeMissingError, SettingsError, UnknownModelError):
        raise  # would be the same for every image
    except Exception as error:
        return error


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Rate against distortion of the learned codec and the reference codecs.",
        epilog="example: python benchmarks/rate_distortion.py --images ../shared/data/val "
        "--json rd.json --jobs 2 --cache ~/.cache/wsicodec-rd --plot rd.png",
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of images or slides")
    parser.add_argument("--json", type=Path, required=True, help="where to write the report")
    parser.add_argument(
        "--codecs",
        nargs="+",
        choices=CODECS,
        default=CODECS,
        help="default: all",
    )
    parser.add_argument("--models", nargs="+", help="learned models; default: the default one")
    parser.add_argument("--tile", type=int, default=256, help="tile side in pixels (256)")
    parser.add_argument(
        "--max-tiles", type=int, default=64, help="tiles taken of one image or slide (64)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="images at once (1)")
    parser.add_argument("--cache", type=Path, help="folder that keeps curves of references")
    parser.add_argument("--plot", type=Path, help="PNG of the mean curves")
    options = parser.parse_args(arguments)
    if not 16 <= options.tile <= 4096:
        parser.error("--tile must be 16 ... 4096")
    if options.jobs < 1 or options.max_tiles < 1:
        parser.error("--jobs and --max-tiles must be positive")
    if not options.images.exists():
        parser.error(f"--images {options.images} does not exist")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    models = options.models
    if models is None:
        from wsicodec.codec import DEFAULT_MODEL

        models = [DEFAULT_MODEL]
    report = run(
        options.images,
        contenders(options.codecs, models),
        tile=options.tile,
        max_tiles=options.max_tiles,
        jobs=options.jobs,
        cache=options.cache,
    )
    record.write(report, options.json, sys.argv if arguments is None else arguments)
    print(f"\n{images_text(report)}\n\n{summary_text(report)}")
    if options.plot:
        plot(report, options.plot)


if __name__ == "__main__":
    main()
