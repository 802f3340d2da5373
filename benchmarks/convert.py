"""Speed of whole-slide conversion: wsicodec beside the ways that others take.

    python benchmarks/convert.py --slide FILE --json OUT [--contenders ...] [--runs N]

Each run is a fresh process that converts FILE into a folder that is thrown away; runs of all
contenders take turns, so that a busy moment of the machine hits all of them. Figures are medians.

wsicodec-*: ``convert`` with that codec, tiles not measured; wsicodec-default: as the command does
without options, every tile decoded and compared. tifffile: levels read whole, and written with
TiffWriter as JPEG. pyvips: tiffload and tiffsave, tiled JPEG pyramid (its levels are halves, the
others keep the slide's own). openslide: tiles read through OpenSlide by threads, in a loop that
feeds TiffWriter, as wsic and similar scripts do. All JPEG is quality 70, 4:2:0, tiles of 256.

The JSON file: ``convert`` {contender: {wall_s (conversion alone), process_s (with start and
imports), mpx_s (level 0 by wall_s), cpu_s, busy (share of all cores over the whole process),
peak_mb (all its processes together, shared memory divided among them), bytes, of_source (bytes by
the source's), levels, quality, runs}}; ``times_as_fast`` {contender: {baseline: by mpx_s}};
``failed`` {contender: why}; ``slide``, ``machine``, ``versions``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record

TILE = 256
QUALITY_TILES = 48
"""Tiles of level 0 whose fidelity is measured, evenly spread."""
SAMPLE_SECONDS = 0.1
"""Between two looks at the memory of a run."""


# -- the ways; each runs in a process of its own --


def _wsicodec(slide: Path, target: Path, jobs: int, quality: int, **settings: Any) -> None:
    from wsicodec.convert import ConvertSettings, convert

    if settings.get("codec") != "copy":
        settings["quality"] = quality
    convert(slide, target, ConvertSettings(tile_size=TILE, jobs=jobs, **settings))


def _wsicodec_as(codec: str, measure: str = "none") -> Callable[[Path, Path, int, int], None]:
    return lambda slide, target, jobs, quality: _wsicodec(
        slide, target, jobs, quality, codec=codec, measure=measure
    )


def _jpeg_options(jobs: int, quality: int) -> dict[str, Any]:
    return {
        "photometric": "rgb",
        "tile": (TILE, TILE),
        "compression": "jpeg",
        "compressionargs": {"level": quality},
        "subsampling": (2, 2),
        "maxworkers": jobs,
        "metadata": None,
    }


def _tifffile(slide: Path, target: Path, jobs: int, quality: int) -> None:
    import tifffile

    with (
        tifffile.TiffFile(slide) as source,
        tifffile.TiffWriter(target, bigtiff=True) as writer,
    ):
        levels = source.series[0].levels
        for index, level in enumerate(levels):
            pixels = level.asarray(maxworkers=jobs)[..., :3]
            writer.write(pixels, subfiletype=int(index > 0), **_jpeg_options(jobs, quality))


def _pyvips(slide: Path, target: Path, jobs: int, quality: int) -> None:
    os.environ["VIPS_CONCURRENCY"] = str(jobs)
    import pyvips

    image = pyvips.Image.new_from_file(str(slide), access="sequential")
    if image.hasalpha():
        image = image.flatten(background=255)
    image.tiffsave(
        str(target),
        compression="jpeg",
        Q=quality,
        tile=True,
        tile_width=TILE,
        tile_height=TILE,
        pyramid=True,
        bigtiff=True,
    )


def _openslide(slide: Path, target: Path, jobs: int, quality: int) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import openslide
    import tifffile

    with (
        openslide.OpenSlide(slide) as source,
        tifffile.TiffWriter(target, bigtiff=True) as writer,
        ThreadPoolExecutor(jobs) as pool,
    ):
        for index, (width, height) in enumerate(source.level_dimensions):
            scale = source.level_downsamples[index]

            def read(
                place: tuple[int, int], index: int = index, scale: float = scale
            ) -> np.ndarray[Any, Any]:
                y, x = place
                corner = (round(x * scale), round(y * scale))
                tile = source.read_region(corner, index, (TILE, TILE)).convert("RGB")
                return np.asarray(tile)

            places = [(y, x) for y in range(0, height, TILE) for x in range(0, width, TILE)]
            writer.write(
                _some_ahead(pool, read, places, 4 * jobs),
                shape=(height, width, 3),
                dtype="uint8",
                subfiletype=int(index > 0),
                **_jpeg_options(jobs, quality),
            )


def _some_ahead(
    pool: Any, function: Callable[[Any], Any], items: Sequence[Any], ahead: int
) -> Iterator[Any]:
    """Results in order, with a bounded number of them computed before they are asked for."""
    from collections import deque

    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


WAYS: dict[str, Callable[[Path, Path, int, int], None]] = {
    "wsicodec-default": _wsicodec_as("learned", "all"),
    "wsicodec-learned": _wsicodec_as("learned"),
    "wsicodec-jpeg": _wsicodec_as("jpeg"),
    "wsicodec-jpegxl": _wsicodec_as("jpegxl"),
    "wsicodec-copy": _wsicodec_as("copy"),
    "tifffile": _tifffile,
    "pyvips": _pyvips,
    "openslide": _openslide,
}
BASELINES = ("tifffile", "pyvips", "openslide")


def _child(name: str, slide: Path, target: Path, jobs: int, quality: int) -> None:
    """Body of a run: prints the seconds that the conversion took."""
    if name.startswith("wsicodec"):
        import wsicodec.convert  # noqa: F401
    elif name == "pyvips":
        os.environ["VIPS_CONCURRENCY"] = str(jobs)
        import pyvips  # noqa: F401
    else:
        import imagecodecs  # noqa: F401
        import tifffile  # noqa: F401
    start = time.perf_counter()
    WAYS[name](slide, target, jobs, quality)
    print(json.dumps({"wall_s": time.perf_counter() - start}))


# -- measuring --


class _Memory(threading.Thread):
    """Samples the memory of a process and its descendants; peak in bytes, None without /proc."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._stop_now = threading.Event()
        self.peak: int | None = None

    def run(self) -> None:
        while not self._stop_now.wait(SAMPLE_SECONDS):
            sizes = [size for pid in _tree(self._pid) if (size := _proportional(pid)) is not None]
            if sizes:
                self.peak = max(self.peak or 0, sum(sizes))

    def stop(self) -> None:
        self._stop_now.set()
        self.join()


def _tree(root: int) -> list[int]:
    """A process and its descendants."""
    found, position = [root], 0
    while position < len(found):
        for task in Path(f"/proc/{found[position]}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(pid) for pid in task.read_text().split()]
        position += 1
    return found


def _proportional(pid: int) -> int | None:
    """Bytes of memory, what several processes share divided among them."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return None


def one_run(name: str, slide: Path, folder: Path, jobs: int, quality: int) -> dict[str, Any]:
    """Figures of one run; its output is left in ``folder``.

    Raises RuntimeError with the last line of what the process said when it fails.
    """
    target = folder / f"{name}.tiff"
    target.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--child", name, str(slide), str(target)]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, str(jobs), str(quality)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "WSICODEC_NUM_THREADS": str(jobs)},
    )
    memory = _Memory(process.pid)
    memory.start()
    before = os.times()
    out, errors = process.communicate()
    after = os.times()
    seconds = time.perf_counter() - start
    memory.stop()
    if process.returncode:
        last = errors.strip().rpartition("\n")[2]
        raise RuntimeError(last or f"exit code {process.returncode}")
    cpu = (
        after.children_user - before.children_user + after.children_system - before.children_system
    )
    return {
        "wall_s": json.loads(out.strip().rpartition("\n")[2])["wall_s"],
        "process_s": seconds,
        "cpu_s": cpu,
        "busy": cpu / seconds / _usable_cores(),
        "peak_mb": None if memory.peak is None else memory.peak / 1e6,
        "bytes": target.stat().st_size,
    }


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fidelity(slide: Path, target: Path) -> dict[str, Any]:
    """Of a sample of level 0: mean and worst SSIM and PSNR of tiles, as wsicodec reads both files.

    Raises WsicodecError where the output cannot be read, or has another size.
    """
    from wsicodec import metrics
    from wsicodec.slide.opening import open_slide

    with open_slide(slide) as source, open_slide(target) as written:
        level = source.levels[0]
        same = written.levels[0]
        height, width = min(level.height, same.height), min(level.width, same.width)
        places = [
            (y, x)
            for y in range(0, height - TILE + 1, TILE)
            for x in range(0, width - TILE + 1, TILE)
        ] or [(0, 0)]
        chosen = places[:: -(-len(places) // QUALITY_TILES)]
        rows, columns = min(TILE, height), min(TILE, width)
        ssim, psnr = [], []
        for y, x in chosen:
            reference = source.read_region(0, y, x, rows, columns)
            decoded = written.read_region(0, y, x, rows, columns)
            ssim.append(metrics.ssim(reference, decoded))
            psnr.append(min(metrics.psnr(reference, decoded), metrics.PSNR_OF_EQUAL))
        return {
            "tiles": len(chosen),
            "ssim_mean": statistics.fmean(ssim),
            "ssim_worst": min(ssim),
            "psnr_mean": statistics.fmean(psnr),
            "psnr_worst": min(psnr),
            "levels": [[item.height, item.width] for item in written.levels],
        }


def times_as_fast(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times as fast each contender is as each baseline of the same report."""
    return {
        name: {
            baseline: figures["mpx_s"] / found[baseline]["mpx_s"]
            for baseline in BASELINES
            if baseline in found
        }
        for name, figures in found.items()
    }


def versions() -> dict[str, str]:
    """Of what took part."""
    known = record.versions()
    for package in ("pyvips", "pyvips-binary", "openslide-python", "openslide-bin"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            known[package] = importlib.metadata.version(package)
    return known


def run(
    slide: Path, names: Sequence[str], *, runs: int, jobs: int, quality: int, folder: Path
) -> dict[str, Any]:
    """The report. folder: where outputs are written, one of each contender at a time.

    A contender that fails (a library that is missing, a format that it does not take) is named
    under ``failed``.
    """
    from wsicodec.slide.opening import open_slide

    with open_slide(slide) as opened:
        info = opened.info
    size = info.file_bytes
    pixels = info.levels[0].height * info.levels[0].width
    with slide.open("rb") as file:  # into the system's cache, for all alike
        while file.read(2**24):
            pass
    before = record.machine()
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    checked: dict[str, dict[str, Any]] = {}
    for turn in range(runs):
        for name in names:
            if name in failed:
                continue
            try:
                figures = one_run(name, slide, folder, jobs, quality)
                if not turn:
                    checked[name] = fidelity(slide, folder / f"{name}.tiff")
            except (RuntimeError, ValueError, OSError) as error:
                failed[name] = str(error)
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                continue
            finally:
                (folder / f"{name}.tiff").unlink(missing_ok=True)
            measured[name].append(figures)
            print(f"{name}: {figures}", file=sys.stderr, flush=True)
    found = {}
    for name in names:
        if name in failed:
            continue
        every = measured[name]
        found[name] = {
            key: None
            if every[0][key] is None
            else statistics.median(figures[key] for figures in every)
            for key in every[0]
        }
        quality_found = dict(checked[name])
        found[name] |= {
            "mpx_s": pixels / 1e6 / found[name]["wall_s"],
            "of_source": found[name]["bytes"] / size,
            "levels": quality_found.pop("levels"),
            "quality": quality_found,
            "runs": every,
        }
    return {
        "convert": found,
        "times_as_fast": times_as_fast(found),
        "failed": failed,
        "slide": slide.name,
        "source": {
            "bytes": size,
            "compression": info.compression,
            "levels": [[level.height, level.width] for level in info.levels],
        },
        "jobs": jobs,
        "quality": quality,
        "tile": TILE,
        "machine": {
            **before,
            "load_after": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        },
        "versions": versions(),
    }


def print_report(report: Mapping[str, Any]) -> None:
    height, width = report["source"]["levels"][0]
    print(
        f"\n{report['slide']}: {width} x {height}, {report['source']['bytes'] / 1e6:.1f} MB, "
        f"{report['jobs']} jobs; medians"
    )
    print(
        f"{'':18}{'Mpx/s':>8}{'wall s':>8}{'process':>9}{'CPU s':>8}{'busy':>7}{'MB peak':>9}"
        f"{'MB out':>9}{'of source':>11}{'SSIM':>8}{'worst':>8}{'PSNR':>7}"
    )
    for name, at in report["convert"].items():
        peak = "-" if at["peak_mb"] is None else f"{at['peak_mb']:.0f}"
        fair = at["quality"]
        print(
            f"{name:18}{at['mpx_s']:8.1f}{at['wall_s']:8.1f}{at['process_s']:9.1f}"
            f"{at['cpu_s']:8.1f}{at['busy']:7.0%}{peak:>9}{at['bytes'] / 1e6:9.2f}"
            f"{at['of_source']:11.1%}{fair['ssim_mean']:8.4f}{fair['ssim_worst']:8.4f}"
            f"{fair['psnr_mean']:7.2f}"
        )
    for name, why in report["failed"].items():
        print(f"{name:18}failed: {why}")


def main(arguments: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["--child"]:
        name, slide, target, jobs, quality = words[1:]
        _child(name, Path(slide), Path(target), int(jobs), int(quality))
        return
    parser = argparse.ArgumentParser(
        description="Speed of whole-slide conversion, beside the ways that others take.",
        epilog="example: python benchmarks/convert.py --slide slide.svs --json convert.json",
    )
    parser.add_argument("--slide", type=Path, required=True, help="a slide")
    parser.add_argument("--json", type=Path, required=True, help="where to write the report")
    parser.add_argument(
        "--contenders", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="default: all"
    )
    parser.add_argument("--runs", type=int, default=3, help="of each contender (3)")
    parser.add_argument("--jobs", type=int, help="threads or processes; default: all cores")
    parser.add_argument("--quality", type=int, default=70, help="1 ... 100 (70)")
    parser.add_argument("--folder", type=Path, help="where outputs go; default: a temporary one")
    options = parser.parse_args(arguments)
    if not options.slide.is_file():
        parser.error(f"--slide {options.slide} is not a file")
    if options.runs < 1 or not 1 <= options.quality <= 100:
        parser.error("--runs must be positive, --quality within 1 ... 100")
    if options.jobs is not None and options.jobs < 1:
        parser.error("--jobs must be positive")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        report = run(
            options.slide.resolve(),
            options.contenders,
            runs=options.runs,
            jobs=options.jobs or _usable_cores(),
            quality=options.quality,
            folder=Path(folder),
        )
    record.write(report, options.json, sys.argv if arguments is None else arguments)
    print_report(report)


if __name__ == "__main__":
    main()
