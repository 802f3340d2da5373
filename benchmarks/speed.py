"""Speed of the learned codec and the reference codecs on tiles of a slide, at equal fidelity.

    python benchmarks/speed.py --slide FILE --json OUT [--codecs ...] [--models ...]

FILE is a slide or an image. For each codec the smallest quality is searched that gives the tiles a
mean SSIM of 0.95; then all codecs encode and decode the same tiles in turn, pass by pass, so that
a busy moment of the machine hits all of them. Figures are medians over the passes.

One core: a fresh process bound to one CPU; CPU time (which other load disturbs least) and wall
time. All cores: as many threads as CPUs, one tile each; wall time, and how many times as fast that
is as one thread in the pass beside it. Learned tiles, and encoding, go through ``wsicodec``;
reference streams are decoded by imagecodecs alone, as a pipeline without wsicodec would. Start:
import and first tile, in fresh processes.

The JSON file: ``speed`` {codec: {one_core | all_cores: {encode | decode: {mpx_s, ...}}}}, with
``against_one_thread`` for all cores; ``ratios`` {codec: {one_core | all_cores: {encode | decode:
{jpeg | jpeg2000 | jpegxl | avif: how many times as fast}}}}; ``matched`` (parameter, SSIM, PSNR and
bits per pixel of each codec), ``start``, ``machine``, ``versions``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from benchmarks.contenders import CODECS, REFERENCES, Contender, contenders
from benchmarks.curves import SSIM_TARGET
from benchmarks.images import load_tiles
from wsicodec import metrics
from wsicodec.metrics import Image

MIN_PASS_SECONDS = 0.05
"""Tiles are repeated within a pass until it takes this long: timers and caches settle."""
RATIOS = {"jpeg": "jpeg420", "jpeg2000": "jpeg2000", "jpegxl": "jpegxl", "avif": "avif"}


def decoder(contender: Contender) -> Callable[[bytes], Image]:
    """How this codec's streams are decoded: references without wsicodec's checks around them."""
    import imagecodecs

    import wsicodec

    one: dict[str, Callable[[bytes], Image]] = {
        "jpeg": imagecodecs.jpeg8_decode,
        "jpeg2000": lambda data: imagecodecs.jpeg2k_decode(data, numthreads=1),
        "jpegxl": lambda data: imagecodecs.jpegxl_decode(data, numthreads=1),
        "avif": lambda data: imagecodecs.avif_decode(data, numthreads=1),
        "webp": imagecodecs.webp_decode,
        "learned": wsicodec.decode,
    }
    return one[contender.codec]


# -- equal fidelity ----------------------------------------------------------------------------


def match(tiles: Sequence[Image], contender: Contender, target: float) -> dict[str, Any]:
    """The cheapest value of the codec's parameter whose mean SSIM meets the target, and what it
    gives; the best value when none does (``reached`` is then False)."""
    decode = decoder(contender)
    tried: dict[float, tuple[float, int, float]] = {}

    def ssim(value: float) -> float:
        if value not in tried:
            streams = [contender.encode(tile, value) for tile in tiles]
            decoded = [decode(stream) for stream in streams]
            pairs = list(zip(tiles, decoded, strict=True))
            tried[value] = (
                statistics.fmean(metrics.ssim(*pair) for pair in pairs),
                sum(map(len, streams)),
                statistics.fmean(min(metrics.psnr(*pair), metrics.PSNR_OF_EQUAL) for pair in pairs),
            )
        return tried[value][0]

    rising = contender.points[0] < contender.points[-1]
    bad, good = (contender.low, contender.high) if rising else (contender.high, contender.low)
    if ssim(good) >= target:
        step = 1.0 if contender.integral else abs(good - bad) / 512
        while abs(good - bad) > step:
            middle = (good + bad) / 2
            if contender.integral:
                middle = int(middle)
            if ssim(middle) >= target:
                good = middle
            else:
                bad = middle
    mean, size, psnr = tried[good]
    pixels = sum(tile.shape[0] * tile.shape[1] for tile in tiles)
    return {
        "parameter": contender.parameter,
        "value": good,
        "ssim": mean,
        "psnr": psnr,
        "bpp": 8 * size / pixels,
        "reached": mean >= target,
    }


# -- timing ------------------------------------------------------------------------------------

Work = Callable[[], object]


def works(
    tiles: Sequence[Image],
    chosen: Mapping[str, tuple[Contender, float]],
    threads: int,
) -> dict[tuple[str, str], Work]:
    """What is timed: by (codec, encode | decode), a function that does it for all tiles."""
    import wsicodec

    pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def over(function: Callable[[Any], object], items: Sequence[Any]) -> Work:
        if pool is None:
            return lambda: [function(item) for item in items]
        return lambda: list(pool.map(function, items))

    result: dict[tuple[str, str], Work] = {}
    for label, (contender, value) in chosen.items():

        def encode(tile: Image, contender: Contender = contender, value: float = value) -> bytes:
            return contender.encode(tile, value)

        streams = [encode(tile) for tile in tiles]
        result[label, "encode"] = over(encode, list(tiles))
        if contender.codec == "learned":
            result[label, "decode"] = lambda streams=streams: wsicodec.decode_batch(  # type: ignore[misc]
                streams, threads=threads
            )
        else:
            result[label, "decode"] = over(decoder(contender), streams)
    return result


@dataclass(frozen=True)
class Passes:
    """Seconds of each pass over all tiles, by the clock and of the CPU."""

    wall: list[float]
    cpu: list[float]
    repeats: int

    def figures(self, pixels: int) -> dict[str, Any]:
        """Medians, and the best pass, in megapixels per second."""
        megapixels = pixels / 1e6
        return {
            "mpx_s_cpu": megapixels / statistics.median(self.cpu),
            "mpx_s_wall": megapixels / statistics.median(self.wall),
            "mpx_s_cpu_best": megapixels / min(self.cpu),
            "mpx_s_wall_best": megapixels / min(self.wall),
            "passes": len(self.wall),
            "repeats": self.repeats,
        }


def time_passes(jobs: Mapping[Any, Work], passes: int) -> dict[Any, Passes]:
    """Interleaved passes of each job."""
    result = {}
    for key, work in jobs.items():
        work()  # warms caches, compiles
        start = time.perf_counter()
        work()
        repeats = 1 + int(MIN_PASS_SECONDS / (time.perf_counter() - start))
        result[key] = Passes([], [], repeats)
    for _ in range(passes):
        for key, work in jobs.items():
            timed = result[key]
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            for _ in range(timed.repeats):
                work()
            timed.cpu.append((time.process_time() - cpu_start) / timed.repeats)
            timed.wall.append((time.perf_counter() - wall_start) / timed.repeats)
    return result


def times_as_fast(one: Passes, other: Passes) -> float:
    """Median, over pairs of passes that were next to each other, of how many times as fast the
    other is by the clock."""
    return statistics.median(a / b for a, b in zip(one.wall, other.wall, strict=True))


def _measure(
    tiles: Sequence[Image],
    chosen: Mapping[str, tuple[Contender, float]],
    passes: int,
    cpu: int | None,
    answer: Any,
) -> None:
    """Body of a fresh process: time everything on one CPU, or on all when ``cpu`` is None."""
    if cpu is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cpu})
    threads = 1 if cpu is not None else _usable_cores()
    os.environ["WSICODEC_NUM_THREADS"] = str(threads)
    pixels = sum(tile.shape[0] * tile.shape[1] for tile in tiles)
    by_threads = {n: works(tiles, chosen, n) for n in sorted({1, threads})}
    # one thread and all of them next to each other: clocks and other load change within seconds
    jobs = {
        (label, operation, n): by_threads[n][label, operation]
        for label, operation in by_threads[1]
        for n in by_threads
    }
    timed = time_passes(jobs, passes)
    speeds: dict[str, dict[str, dict[str, Any]]] = {}
    for label, operation in by_threads[1]:
        figures = timed[label, operation, threads].figures(pixels)
        if cpu is None:
            one = timed[label, operation, 1]
            figures["against_one_thread"] = times_as_fast(one, timed[label, operation, threads])
        speeds.setdefault(label, {})[operation] = figures
    answer.put(speeds)


def in_fresh_process(
    tiles: Sequence[Image],
    chosen: Mapping[str, tuple[Contender, float]],
    passes: int,
    cpu: int | None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures of all codecs, measured in a process of its own. ``mpx_s`` is from CPU time on one
    core, which other load disturbs least, and from wall time on all.

    Raises RuntimeError when the process fails; it prints why.
    """
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=_measure, args=(tiles, chosen, passes, cpu, answer))
    process.start()
    while answer.empty():
        process.join(0.05)
        if process.exitcode not in (None, 0):
            raise RuntimeError(f"the measuring process ended with {process.exitcode}")
    speeds: dict[str, dict[str, dict[str, Any]]] = answer.get()
    process.join()
    for operations in speeds.values():
        for figures in operations.values():
            figures["mpx_s"] = figures["mpx_s_wall" if cpu is None else "mpx_s_cpu"]
    return speeds


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_START = """
import sys, time
sys.path.insert(0, sys.argv[1])
data = open(sys.argv[2], "rb").read()
a = time.perf_counter()
import wsicodec
b = time.perf_counter()
wsicodec.decode(data)
c = time.perf_counter()
wsicodec.decode(data)
d = time.perf_counter()
print(b - a, c - b, d - c)
"""


def start_times(streams: Mapping[str, bytes], starts: int) -> dict[str, dict[str, float]]:
    """Milliseconds in fresh processes, medians: bare Python, importing wsicodec, the first tile
    (libraries load, kernels compile or come from their cache), the second, the whole process.

    starts: processes a figure.
    """
    root = str(Path(__file__).resolve().parents[1])

    def whole(*arguments: str) -> tuple[float, str]:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *arguments], check=True, capture_output=True, text=True
        )
        return time.perf_counter() - start, done.stdout

    bare = statistics.median(whole("-c", "pass")[0] for _ in range(starts))
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, stream in streams.items():
            file = Path(folder, "tile")
            file.write_bytes(stream)
            runs = []
            for _ in range(starts):
                total, printed = whole("-c", _START, root, str(file))
                runs.append([total, *map(float, printed.split())])
            total, imported, first, second = (
                1000 * statistics.median(column) for column in zip(*runs, strict=True)
            )
            result[label] = {
                "python_ms": 1000 * bare,
                "import_ms": imported,
                "first_tile_ms": first,
                "second_tile_ms": second,
                "process_ms": total,
            }
    return result


# -- report ------------------------------------------------------------------------------------


def ratios(speed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How many times as fast each codec is as JPEG, JPEG-2000, JPEG XL and AVIF in this run."""
    return {
        label: {
            cores: {
                operation: {
                    name: figures["mpx_s"] / speed[reference][cores][operation]["mpx_s"]
                    for name, reference in RATIOS.items()
                    if reference in speed
                }
                for operation, figures in operations.items()
            }
            for cores, operations in by_cores.items()
        }
        for label, by_cores in speed.items()
    }


def run(
    slide: Path,
    labels: Mapping[str, Contender],
    *,
    tile: int = 256,
    tiles: int = 24,
    passes: int = 7,
    starts: int = 5,
    cpu: int | None = None,
    target: float = SSIM_TARGET.value,
) -> dict[str, Any]:
    """The report. cpu: the CPU for one-core figures; None takes the last usable one.

    Raises ValueError when the slide has no tile.
    """
    images = load_tiles(slide, tile, tiles)
    if not images:
        raise ValueError(f"{slide} holds no tile of {tile} pixels")
    if cpu is None:
        cpu = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    before = record.machine()
    matched = {}
    for label, contender in labels.items():
        matched[label] = match(images, contender, target)
        print(f"{label}: {matched[label]}", file=sys.stderr, flush=True)
    chosen = {label: (labels[label], matched[label]["value"]) for label in labels}
    one = in_fresh_process(images, chosen, passes, cpu)
    every = in_fresh_process(images, chosen, passes, None)
    speed = {label: {"one_core": one[label], "all_cores": every[label]} for label in labels}
    streams = {label: c.encode(images[0], value) for label, (c, value) in chosen.items()}
    return {
        "speed": speed,
        "ratios": ratios(speed),
        "matched": matched,
        "start": start_times(streams, starts),
        "slide": slide.name,
        "tile": tile,
        "tiles": len(images),
        "target_ssim": target,
        "contenders": {label: contender.as_dict() for label, contender in labels.items()},
        "machine": {
            **before,
            "cpu_of_one_core": cpu if hasattr(os, "sched_setaffinity") else None,
            "load_after": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        },
        "versions": record.versions(),
    }


def print_report(report: Mapping[str, Any]) -> None:
    cores = report["machine"]["usable_cores"]
    print(f"\n{report['tiles']} tiles of {report['tile']} from {report['slide']}; Mpx/s, median")
    print(
        f"{'codec':18}{'SSIM':>8}{'PSNR':>7}{'bpp':>7}"
        f"{'encode 1':>11}{'decode 1':>11}{f'encode {cores}':>11}{f'decode {cores}':>11}"
    )
    for label, by_cores in report["speed"].items():
        at = report["matched"][label]
        figures = [
            by_cores[c][o]["mpx_s"] for c in ("one_core", "all_cores") for o in ("encode", "decode")
        ]
        print(
            f"{label[:17]:18}{at['ssim']:8.4f}{at['psnr']:7.2f}{at['bpp']:7.3f}"
            + "".join(f"{figure:11.1f}" for figure in figures)
            + ("" if at["reached"] else f"   below SSIM {report['target_ssim']}")
        )
    print("\ntimes as fast on one core, encode / decode, against")
    for label, by_cores in report["ratios"].items():
        one = by_cores["one_core"]
        cells = [
            f"{name} {one['encode'][name]:.2f} / {one['decode'][name]:.2f}"
            for name in one["decode"]
        ]
        print(f"{label[:17]:18}" + "   ".join(cells))
    print(f"\ntimes as fast on {cores} cores as on one, encode / decode")
    for label, by_cores in report["speed"].items():
        every = by_cores["all_cores"]
        cells = [f"{every[o]['against_one_thread']:.2f}" for o in ("encode", "decode")]
        print(f"{label[:17]:18}" + " / ".join(cells))
    print("\nfresh process, ms: Python alone, import, first tile, second tile")
    for label, at in report["start"].items():
        print(
            f"{label[:17]:18}{at['python_ms']:8.0f}{at['import_ms']:8.1f}"
            f"{at['first_tile_ms']:8.1f}{at['second_tile_ms']:8.2f}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Speed of the learned codec and the reference codecs at equal fidelity.",
        epilog="example: python benchmarks/speed.py --slide slide.svs --json speed.json",
    )
    parser.add_argument("--slide", type=Path, required=True, help="a slide or an image")
    parser.add_argument("--json", type=Path, required=True, help="where to write the report")
    parser.add_argument(
        "--codecs",
        nargs="+",
        choices=CODECS,
        default=[*REFERENCES, "learned"],
        help="default: all but the other tunes",
    )
    parser.add_argument("--models", nargs="+", help="learned models; default: the default one")
    parser.add_argument("--tile", type=int, default=256, help="tile side in pixels (256)")
    parser.add_argument("--tiles", type=int, default=24, help="how many tiles (24)")
    parser.add_argument("--passes", type=int, default=7, help="interleaved passes (7)")
    parser.add_argument("--starts", type=int, default=5, help="fresh processes a start time (5)")
    parser.add_argument("--cpu", type=int, help="CPU of the one-core figures; default: the last")
    parser.add_argument(
        "--ssim", type=float, default=SSIM_TARGET.value, help="fidelity matched (0.95)"
    )
    options = parser.parse_args(arguments)
    if not 16 <= options.tile <= 4096:
        parser.error("--tile must be 16 ... 4096")
    if min(options.tiles, options.passes, options.starts) < 1 or not 0 < options.ssim < 1:
        parser.error("--tiles, --passes, --starts must be positive, --ssim within 0 ... 1")
    if not options.slide.is_file():
        parser.error(f"--slide {options.slide} is not a file")
    if options.cpu is not None and hasattr(os, "sched_getaffinity"):
        usable = os.sched_getaffinity(0)
        if options.cpu not in usable:
            parser.error(f"--cpu {options.cpu} is none of the usable {sorted(usable)}")
    models = options.models
    if models is None:
        from wsicodec.codec import DEFAULT_MODEL

        models = [DEFAULT_MODEL]
    report = run(
        options.slide,
        contenders(options.codecs, models),
        tile=options.tile,
        tiles=options.tiles,
        passes=options.passes,
        starts=options.starts,
        cpu=options.cpu,
        target=options.ssim,
    )
    record.write(report, options.json, sys.argv if arguments is None else arguments)
    print_report(report)


if __name__ == "__main__":
    main()
