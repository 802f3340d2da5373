"""Rate against distortion of the learned codec and the reference codecs.

    python benchmarks/rate_distortion.py --images DIR --json OUT [--codecs ...] [--models ...]

DIR holds images (.jpg .png .webp .jxl .tif) or slides that tifffile reads, in any order; nothing
is fetched. Each image is cut into tiles of ``--tile`` pixels as it is, without resampling; what
remains at its right and lower edges is left out, except that a side shorter than the tile is taken
whole. Large images and slides are represented by ``--max-tiles`` of their tiles.

Per image: bits per pixel count every byte of every tile's stream with all headers; PSNR is that of
the squared error pooled over the tiles; SSIM and MS-SSIM are means over the tiles.

The JSON file: ``curves`` {image: {codec: [[bpp, psnr, ssim, ms_ssim], ...]}}, cheapest first
(PSNR 100 when equal, MS-SSIM null below 176 pixels); ``details``, point by point, the value of the
native parameter (named in ``contenders``), worst and 1st-percentile SSIM, CIEDE2000; ``bd_rate``
{codec: {reference: {metric: figures in per cent}}}, means over images; ``at_ssim``, bytes where
SSIM is 0.95, against JPEG 4:2:0, over all images and by JPEG history and stain where
``manifest.csv`` tells; ``images``, ``skipped``, ``metrics``, ``machine``, ``versions``.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import metrics as measures
from wsicodec import metrics

Image = npt.NDArray[np.uint8]
Curve = list[list[float | None]]

TARGET_SSIM = 0.95
BASELINE = "jpeg420"
METRICS = ("psnr", "ssim", "ms_ssim")
CACHE_VERSION = 1

# -- codecs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """A codec with fixed options and the native parameter that is varied.

    codec: name as for ``wsicodec.encode``. points: values of the parameter, cheapest first.
    low, high: the range in which another value may be searched for; integral: whole numbers only.
    """

    codec: str
    parameter: str
    points: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    low: float = 1
    high: float = 100
    integral: bool = True

    def encode(self, image: Image, value: float) -> bytes:
        import wsicodec

        settings: dict[str, Any] = {**self.options, self.parameter: value}
        stream: bytes = wsicodec.encode(image, codec=self.codec, **settings)
        return stream


_JPEG = (20, 32, 44, 55, 64, 72, 79, 85, 90, 94, 97, 99)
_LEARNED = (1, 8, 16, 25, 34, 43, 52, 61, 70, 78, 86, 93, 100)

REFERENCES: dict[str, Contender] = {
    "jpeg420": Contender("jpeg", "level", _JPEG, {"subsampling": "420", "optimize": True}),
    "jpeg444": Contender("jpeg", "level", _JPEG, {"subsampling": "444", "optimize": True}),
    "jpeg2000": Contender(
        "jpeg2000",
        "psnr",
        (24.5, 26.5, 28.5, 30.5, 32.5, 34.5, 36.5, 38.5, 41, 44, 48),
        low=20,
        high=55,
        integral=False,
    ),
    "jpegxl": Contender(
        "jpegxl",
        "distance",
        (9, 6.5, 4.8, 3.6, 2.7, 2.0, 1.5, 1.1, 0.8, 0.5, 0.25, 0.12),
        {"effort": 7},
        low=0.05,
        high=15,
        integral=False,
    ),
    "avif": Contender(
        "avif",
        "level",
        (22, 32, 40, 47, 53, 59, 65, 71, 78, 85, 92, 97),
        {"speed": 6, "subsampling": "444"},
        high=99,
    ),
    "webp": Contender(
        "webp", "level", (4, 14, 26, 38, 50, 61, 71, 79, 85, 90, 95, 98), {"method": 6}, high=98
    ),
}


def contenders(codecs: Sequence[str], models: Sequence[str]) -> dict[str, Contender]:
    """Contenders by label: "learned" stands for the model, or "learned:NAME" for several each."""
    chosen: dict[str, Contender] = {}
    for codec in codecs:
        if codec != "learned":
            chosen[codec] = REFERENCES[codec]
            continue
        for model in models:
            label = "learned" if len(models) == 1 else f"learned:{model}"
            chosen[label] = Contender("learned", "quality", _LEARNED, {"model": model})
    return chosen


# -- images ------------------------------------------------------------------------------------

IMAGE_SUFFIXES = {
    ".jpg": "jpeg8_decode",
    ".jpeg": "jpeg8_decode",
    ".png": "png_decode",
    ".webp": "webp_decode",
    ".jxl": "jpegxl_decode",
}
SLIDE_SUFFIXES = {".tif", ".tiff", ".svs", ".ndpi", ".scn", ".bif", ".qptiff"}
OVERVIEW_SIDE = 4096
"""Tiles of a slide are chosen on its largest level of at most this side."""
GLASS_DEVIATION = 4.0
"""A place is glass where luma deviates by less than this many levels."""


def find_images(folder: Path) -> list[Path]:
    """Images and slides below a folder, sorted; or the file itself."""
    if folder.is_file():
        return [folder]
    known = {*IMAGE_SUFFIXES, *SLIDE_SUFFIXES}
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in known)


def grid(height: int, width: int, tile: int) -> list[tuple[int, int, int, int]]:
    """(y, x, rows, columns) of the whole tiles; a side shorter than the tile is one row of it."""
    rows, columns = min(height, tile), min(width, tile)
    return [
        (y, x, rows, columns)
        for y in range(0, height - rows + 1, rows)
        for x in range(0, width - columns + 1, columns)
    ]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """``count`` of the items, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def load_tiles(path: Path, tile: int, max_tiles: int) -> list[Image]:
    """Tiles of an image or a slide; ValueError, OSError or a codec's error when it has none."""
    suffix = path.suffix.lower()
    if suffix in SLIDE_SUFFIXES:
        return _slide_tiles(path, tile, max_tiles)
    import imagecodecs

    image = _rgb(getattr(imagecodecs, IMAGE_SUFFIXES[suffix])(path.read_bytes()))
    places = grid(image.shape[0], image.shape[1], tile)
    return [_cut(image, *place) for place in spread(places, max_tiles)]


def _rgb(image: npt.NDArray[Any]) -> Image:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4):
        raise ValueError(f"not 8-bit RGB: {image.dtype} {image.shape}")
    if image.shape[2] == 4 and (image[..., 3] != 255).any():
        raise ValueError("has transparency")
    return image[..., :3]


def _cut(image: Image, y: int, x: int, rows: int, columns: int) -> Image:
    return np.ascontiguousarray(image[y : y + rows, x : x + columns])


def _slide_tiles(path: Path, tile: int, max_tiles: int) -> list[Image]:
    """Tiles of the largest level that hold tissue, found on an overview."""
    import tifffile

    with tifffile.TiffFile(path) as tif:
        levels = [level.keyframe for level in tif.series[0].levels]
        page = levels[0]
        height, width = page.imagelength, page.imagewidth
        if page.samplesperpixel not in (3, 4) or page.dtype != np.uint8 or page.planarconfig != 1:
            raise ValueError(f"not 8-bit RGB: {page.dtype} {page.shape}")
        small = [p for p in levels[1:] if max(p.imagelength, p.imagewidth) <= OVERVIEW_SIDE]
        places = grid(height, width, tile)
        if len(places) > max_tiles:
            overview = small[0] if small else page if max(height, width) <= OVERVIEW_SIDE else None
            if overview is not None:
                places = _tissue(_rgb(overview.asarray()), places, height, width)
        return [_region(page, *place) for place in spread(places, max_tiles)]


def _tissue(
    overview: Image, places: list[tuple[int, int, int, int]], height: int, width: int
) -> list[tuple[int, int, int, int]]:
    """The places that are not plain glass; all of them when none is left."""
    luma = metrics.luma(overview)
    down, right = luma.shape[0] / height, luma.shape[1] / width
    kept = []
    for y, x, rows, columns in places:
        top, left = int(y * down), int(x * right)
        bottom, end = math.ceil((y + rows) * down), math.ceil((x + columns) * right)
        if luma[top:bottom, left:end].std() >= GLASS_DEVIATION:
            kept.append((y, x, rows, columns))
    return kept or places


def _region(page: Any, y: int, x: int, rows: int, columns: int) -> Image:
    """A part of a page, by decoding only the segments (tiles or strips) that it touches."""
    if page.is_tiled:
        step_y, step_x = page.tilelength, page.tilewidth
    else:
        step_y, step_x = page.rowsperstrip, page.imagewidth
    across = -(-page.imagewidth // step_x)
    out = np.empty((rows, columns, 3), np.uint8)
    for row in range(y // step_y, (y + rows - 1) // step_y + 1):
        for column in range(x // step_x, (x + columns - 1) // step_x + 1):
            index = row * across + column
            page.parent.filehandle.seek(page.dataoffsets[index])
            data = page.parent.filehandle.read(page.databytecounts[index])
            segment, _, shape = page.decode(
                data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader
            )
            if segment is None:
                raise ValueError(f"segment {index} is empty")
            pixels = _rgb(segment[0])
            top, left = row * step_y, column * step_x
            y0, x0 = max(y, top), max(x, left)
            y1, x1 = min(y + rows, top + shape[1]), min(x + columns, left + shape[2])
            out[y0 - y : y1 - y, x0 - x : x1 - x] = pixels[
                y0 - top : y1 - top, x0 - left : x1 - left
            ]
    return out


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
        digest.update(tile)
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


# -- summaries ---------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, dict[str, str]]:
    """{file name: {"history": ..., "stain": ...}} of manifest.csv in the folder or above it."""
    for place in (folder, folder.parent):
        file = place / "manifest.csv"
        if not file.is_file():
            continue
        with file.open(newline="", encoding="utf-8") as f:
            return {
                Path(row["path"]).name: {
                    "history": _history(row.get("jpeg_history_quality_or_none") or ""),
                    "stain": row.get("stain") or "unknown",
                }
                for row in csv.DictReader(f)
                if row.get("path")
            }
    return {}


def _history(text: str) -> str:
    lower = text.lower()
    if "2000" in lower or "j2k" in lower or "jp2" in lower:
        return "JPEG-2000"
    return "none" if not lower or lower.startswith("none") else "JPEG"


def _scaled(curve: Curve, metric: str) -> list[tuple[float, float]]:
    """(bpp, quality) points, quality on the scale of BD-rates; nan where not measured."""
    scale = measures.QUALITY_SCALES[metric]
    column = 1 + METRICS.index(metric)
    return [
        (point[0] or 0.0, math.nan if point[column] is None else scale(point[column]))
        for point in curve
    ]


def bd_table(
    curves: Mapping[str, Mapping[str, Curve]],
) -> tuple[dict[str, Any], dict[str, dict[str, dict[str, dict[str, Any]]]]]:
    """Mean BD-rates {codec: {reference: {metric: figures}}}, and the same by image.

    Learned codecs against every reference; without a learned codec, each against every other.
    """
    labels = list(dict.fromkeys(label for codecs in curves.values() for label in codecs))
    learned = [label for label in labels if label not in REFERENCES]
    by_image: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    means: dict[str, Any] = {}
    for tested in learned or labels:
        for reference in (label for label in labels if label in REFERENCES and label != tested):
            for metric in METRICS:
                found = []
                for image, codecs in curves.items():
                    if tested not in codecs or reference not in codecs:
                        continue
                    with contextlib.suppress(ValueError):  # too few points: not counted
                        rate = measures.bd_rate(
                            _scaled(codecs[reference], metric), _scaled(codecs[tested], metric)
                        )
                        if not math.isnan(rate.pchip):
                            found.append(rate)
                            here = by_image.setdefault(image, {}).setdefault(tested, {})
                            here.setdefault(reference, {})[metric] = rate.as_dict()
                means.setdefault(tested, {}).setdefault(reference, {})[metric] = {
                    "pchip": _mean(r.pchip for r in found),
                    "akima": _mean(r.akima for r in found),
                    "median": statistics.median(r.pchip for r in found) if found else None,
                    "overlap_low": _mean(r.low for r in found),
                    "overlap_high": _mean(r.high for r in found),
                    "coverage": _mean(r.coverage for r in found),
                    "images": len(found),
                }
    return means, by_image


def _mean(values: Iterable[float]) -> float | None:
    known = [v for v in values if not math.isnan(v)]
    return statistics.fmean(known) if known else None


def at_ssim(
    curves: Mapping[str, Mapping[str, Curve]], groups: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Rate of each codec where its mean SSIM is 0.95, and against JPEG 4:2:0.

    {"target", "all": summary, "history": {kind: summary}, "stain": {...}, "images": {image: {codec:
    {"bpp", "ratio"}}}, "not_reached": {codec: {image: why}}}; a summary is {codec: {"bpp",
    "ratio_mean", "ratio_median", "images"}}.
    """
    images: dict[str, dict[str, dict[str, float | None]]] = {}
    not_reached: dict[str, dict[str, str]] = {}
    for image, codecs in curves.items():
        rates = {}
        for label, curve in codecs.items():
            ssims = [point[2] or 0.0 for point in curve]
            rate = measures.rate_at(
                [(point[0] or 0.0, ssim) for point, ssim in zip(curve, ssims, strict=True)],
                TARGET_SSIM,
            )
            rates[label] = rate
            if math.isnan(rate):
                not_reached.setdefault(label, {})[image] = (
                    f"best SSIM {max(ssims):.4f}"
                    if max(ssims) < TARGET_SSIM
                    else f"SSIM {min(ssims):.4f} at the cheapest point"
                )
        base = rates.get(BASELINE, math.nan)
        images[image] = {
            label: {"bpp": _finite(rate), "ratio": _finite(rate / base)}
            for label, rate in rates.items()
        }
    summary: dict[str, Any] = {"target": TARGET_SSIM, "all": _summary(images)}
    for kind in ("history", "stain"):
        names: dict[str, list[str]] = {}
        for image in images:
            if image in groups:
                names.setdefault(groups[image][kind], []).append(image)
        summary[kind] = {
            name: _summary({image: images[image] for image in members})
            for name, members in sorted(names.items())
        }
    return {**summary, "images": images, "not_reached": not_reached}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _summary(images: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> dict[str, Any]:
    labels = dict.fromkeys(label for codecs in images.values() for label in codecs)
    result = {}
    for label in labels:
        here = [codecs[label] for codecs in images.values() if label in codecs]
        ratios = [r["ratio"] for r in here if r["ratio"] is not None]
        rates = [r["bpp"] for r in here if r["bpp"] is not None]
        result[label] = {
            "bpp": statistics.fmean(rates) if rates else None,
            "ratio_mean": statistics.fmean(ratios) if ratios else None,
            "ratio_median": statistics.median(ratios) if ratios else None,
            "images": len(rates),
        }
    return result


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    usable = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "usable_cores": len(usable(0)) if usable else os.cpu_count(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def versions() -> dict[str, str]:
    """Versions of Python, of the packages that took part, and of the libraries in imagecodecs."""
    import imagecodecs

    import wsicodec

    found = {"python": platform.python_version(), "wsicodec": wsicodec.__version__}
    for package in ("numpy", "scipy", "scikit-image", "tifffile", "imagecodecs"):
        found[package] = importlib.metadata.version(package)
    for package in ("numba", "onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    for codec in ("jpeg8", "jpeg2k", "jpegxl", "avif", "webp"):
        found[f"imagecodecs.{codec}"] = getattr(imagecodecs, f"{codec}_version")()
    return found


# -- output ------------------------------------------------------------------------------------


def print_report(report: Mapping[str, Any]) -> None:
    """The tables: rate at the target per image, BD-rates, summaries."""
    at = report["at_ssim"]
    labels = list(dict.fromkeys(label for codecs in at["images"].values() for label in codecs))
    print(f"\nbits per pixel at SSIM {TARGET_SSIM}, in brackets against JPEG 4:2:0")
    print(f"{'image':36}" + "".join(f"{label:>17}" for label in labels))
    for image, codecs in at["images"].items():
        cells = (_cell(codecs.get(label, {})) for label in labels)
        print(f"{image[:35]:36}" + "".join(f"{cell:>17}" for cell in cells))
    for kind in ("all", "history", "stain"):
        summaries = {"all images": at["all"]} if kind == "all" else at[kind]
        for name, summary in summaries.items():
            count = max(entry["images"] for entry in summary.values())
            title = f"{'' if kind == 'all' else kind + ' '}{name} ({count})"
            for figure in ("ratio_mean", "ratio_median"):
                cells = (
                    "-" if summary[label][figure] is None else f"{summary[label][figure]:.3f}"
                    for label in labels
                )
                suffix = figure.removeprefix("ratio_")
                print(f"{title[:29]:29} {suffix:6}" + "".join(f"{cell:>17}" for cell in cells))
    for label, missed in at["not_reached"].items():
        for image, why in missed.items():
            print(f"{label} does not meet SSIM {TARGET_SSIM} on {image}: {why}")
    for tested, against in report["bd_rate"].items():
        print(f"\nBD-rate of {tested} in % (PCHIP / Akima; images; mean overlap)")
        for reference, by_metric in against.items():
            texts = []
            for metric, figures in by_metric.items():
                if figures["pchip"] is None:
                    texts.append(f"{metric} none")
                    continue
                texts.append(
                    f"{metric} {figures['pchip']:+.1f} / {figures['akima']:+.1f} "
                    f"({figures['images']}; {figures['overlap_low']:.1f} ... "
                    f"{figures['overlap_high']:.1f} dB)"
                )
            print(f"  against {reference:10} " + "   ".join(texts))


def _cell(entry: Mapping[str, float | None]) -> str:
    bpp, ratio = entry.get("bpp"), entry.get("ratio")
    if bpp is None:
        return "-"
    return f"{bpp:.3f} ({ratio:.2f})" if ratio is not None else f"{bpp:.3f}"


def plot(report: Mapping[str, Any], file: Path) -> None:
    """Mean curves over the images that have them, as PNG: three panels, one a metric."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    curves = report["curves"]
    labels = list(dict.fromkeys(label for codecs in curves.values() for label in codecs))
    figure, axes = pyplot.subplots(1, 3, figsize=(18, 6))
    for axis, metric in zip(axes, METRICS, strict=True):
        for label in labels:
            # codecs have as many points on every image: average point by point
            stack = [
                [(rate, quality) for rate, quality in _scaled(codecs[label], metric)]
                for codecs in curves.values()
                if label in codecs
            ]
            usual = statistics.mode(len(points) for points in stack)
            mean = np.array([points for points in stack if len(points) == usual]).mean(0)
            axis.plot(mean[:, 0], mean[:, 1], marker=".", label=label)
        axis.set_xscale("log")
        axis.set_xlabel("bits per pixel")
        axis.set_ylabel("PSNR, dB" if metric == "psnr" else f"{metric.upper()}, -10 log10(1 - x)")
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"Mean over {len(curves)} images, tiles of {report['tile']} pixels")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


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
    groups = {n: manifest[Path(n).name] for n in curves if Path(n).name in manifest}
    means, by_image = bd_table(curves)
    return {
        "curves": curves,
        "bd_rate": means,
        "bd_rate_by_image": by_image,
        "at_ssim": at_ssim(curves, groups),
        "details": {name: result["points"] for name, result in ordered.items()},
        "images": {
            name: {
                **{key: result[key] for key in ("tiles", "pixels", "sha256")},
                **groups.get(name, {}),
            }
            for name, result in ordered.items()
        },
        "skipped": skipped,
        "tile": tile,
        "metrics": {**metrics.METRIC_ARGUMENTS, **measures.METRIC_ARGUMENTS},
        "contenders": {
            label: {"codec": c.codec, "parameter": c.parameter, **c.options}
            for label, c in labels.items()
        },
        "machine": machine(),
        "versions": versions(),
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
        choices=[*REFERENCES, "learned"],
        default=[*REFERENCES, "learned"],
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
    words = sys.argv if arguments is None else list(arguments)
    # reports are passed on: no absolute paths of the machine that made them
    report["command"] = [Path(w).name if Path(w).is_absolute() else str(w) for w in words]
    part = options.json.with_name(options.json.name + ".part")
    part.write_text(json.dumps(report, indent=1, allow_nan=False))
    part.replace(options.json)
    print_report(report)
    if options.plot:
        plot(report, options.plot)


if __name__ == "__main__":
    main()
