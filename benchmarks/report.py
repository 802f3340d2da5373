"""The report of a rate-distortion run for people: aligned tables, and a plot of the curves."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import titles
from benchmarks.curves import METRICS, MS_SSIM_TARGET, SSIM_TARGET, Target, scaled
from benchmarks.groups import HISTORIES

TARGETS = {"at_ssim": SSIM_TARGET, "at_ms_ssim": MS_SSIM_TARGET}
"""Targets by their keys in a report."""
PRINTED_KINDS = ("history", "domain", "set")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns, the first to the left; heads may have several lines."""
    split = [head.split("\n") for head in heads]
    high = max(map(len, split))
    split = [[""] * (high - len(lines)) + lines for lines in split]
    every = [list(line) for line in zip(*split, strict=True)] + [list(row) for row in rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in every
    )


def number(value: float | None, form: str = ".3f") -> str:
    """A figure, or a dash for none."""
    return "-" if value is None else format(value, form)


def images_text(report: Mapping[str, Any]) -> str:
    """Rate at SSIM 0.95 of every image."""
    at, names = report["at_ssim"], titles(report["contenders"])
    rows = [
        [image, *(_rate(codecs.get(label, {})) for label in names)]
        for image, codecs in at["images"].items()
    ]
    title = f"bits per pixel at {SSIM_TARGET}, in brackets against JPEG 4:2:0"
    return f"{title}\n{table(['image', *_heads(names)], rows)}"


def summary_text(report: Mapping[str, Any]) -> str:
    """Every figure of the report that is a mean over images: at the targets, then BD-rates."""
    parts = [_about(report)]
    for key, target in TARGETS.items():
        parts += [_at_target(report, key, target), _missed(report, key, target)]
    parts += [_ratios(report, key, target) for key, target in TARGETS.items()]
    parts += [_bd_rates(report, tested) for tested in report["bd_rate"]]
    return "\n\n".join(part for part in parts if part)


def _heads(names: Mapping[str, str]) -> list[str]:
    return [title.replace(", ", ",\n") for title in names.values()]


def _rate(entry: Mapping[str, float | None]) -> str:
    bpp, ratio = entry.get("bpp"), entry.get("ratio")
    return number(bpp) if ratio is None else f"{number(bpp)} ({ratio:.2f})"


def _groups(report: Mapping[str, Any]) -> list[tuple[str, str, str, int]]:
    """(kind, name, title, number of images) of the groups that tables have rows of."""
    groups = report["groups"]
    rows = []
    for kind in PRINTED_KINDS:
        for name, members in groups.get(kind, {}).items():
            title = name if kind == "domain" else f"{kind} {name}"
            rows.append((kind, name, title, len(members)))
    return rows


def _about(report: Mapping[str, Any]) -> str:
    images = report["images"].values()
    tiles = sum(entry["tiles"] for entry in images)
    lines = [f"{len(images)} images, {tiles} tiles of {report['tile']} pixels"]
    histories = report["groups"]["history"]
    absent = [name for name in HISTORIES if name not in histories]
    if histories and absent:
        lines.append(f"no image with history {' or '.join(absent)}")
    if not histories:
        lines.append("no manifest.csv: histories and stains are unknown")
    if report["skipped"]:
        lines.append(f"skipped: {', '.join(report['skipped'])}")
    return "\n".join(lines)


def _at_target(report: Mapping[str, Any], key: str, target: Target) -> str:
    summary = report[key]["all"]
    colour = report["colour_at_ssim"]["all"] if key == "at_ssim" else {}
    heads = ["codec", "bits/px", "bytes/JPEG\nmean", "\nmedian", "\nall bits"]
    heads += ["CIEDE2000\nmean", "\np95"] if colour else []
    rows = []
    for label, title in titles(report["contenders"]).items():
        entry = summary[label]
        row = [title, *(number(entry[f]) for f in ("bpp", "ratio_mean", "ratio_median"))]
        row.append(number(entry["ratio_total"]))
        if colour:
            row += [number(colour.get(label, {}).get(f), ".2f") for f in ("mean", "p95")]
        rows.append([*row, f"{entry['images']} of {len(report['images'])}"])
    return f"at {target}\n{table([*heads, 'images'], rows)}"


def _missed(report: Mapping[str, Any], key: str, target: Target) -> str:
    names = titles(report["contenders"])
    return "\n".join(
        f"{names[label]} has no rate at {target} on {len(missed)}: "
        + "; ".join(f"{image} ({why})" for image, why in missed.items())
        for label, missed in report[key]["not_reached"].items()
    )


def _ratios(report: Mapping[str, Any], key: str, target: Target) -> str:
    at, names = report[key], titles(report["contenders"])

    def row(title: str, summary: Mapping[str, Any], count: int) -> list[str]:
        cells = []
        for label in names:
            entry = summary[label]
            cell = f"{number(entry['ratio_mean'])} {number(entry['ratio_total'])}"
            few = entry["ratio_mean"] is not None and entry["compared"] < count
            cells.append(f"({entry['compared']}) {cell}" if few else cell)
        return [title, str(count), *cells]

    rows = [row("all images", at["all"], len(at["images"]))]
    rows += [row(title, at[kind][name], n) for kind, name, title, n in _groups(report)]
    title = (
        f"bytes / JPEG 4:2:0 at {target}: mean of the images' ratios, ratio of all bits; "
        "(n): over n images only"
    )
    return f"{title}\n{table(['', 'images', *_heads(names)], rows)}"


def _bd_rates(report: Mapping[str, Any], tested: str) -> str:
    names = titles(report["contenders"])
    references = list(report["bd_rate"][tested])

    def row(title: str, means: Mapping[str, Any], count: int, figure: str) -> list[str]:
        cells = []
        for reference in references:
            figures = [means[tested][reference][metric] for metric in METRICS]
            cell = " ".join(f"{number(f[figure], '+.1f'):>7}" for f in figures)
            few = min(f["images"] for f in figures)
            cells.append(f"({few}) {cell}" if 0 < few < count else cell)
        return [title, str(count), *cells]

    count = len(report["images"])
    rows = [
        row("all images", report["bd_rate"], count, "pchip"),
        row("  Akima", report["bd_rate"], count, "akima"),
        row("  median", report["bd_rate"], count, "median"),
    ]
    by_group = report["bd_rate_by_group"]
    rows += [row(title, by_group[k][name], n, "pchip") for k, name, title, n in _groups(report)]
    heads = [f"{names[r]}\n   PSNR    SSIM MS-SSIM" for r in references]
    title = f"BD-rate of {names[tested]} in %, mean of PCHIP figures; (n): from n images or more"
    lines = [f"{title}\n{table(['', 'images', *heads], rows)}"]
    for reference in references:
        for metric in METRICS:
            figures = report["bd_rate"][tested][reference][metric]
            if figures["missed"]:
                lines.append(
                    f"no {metric} BD-rate against {names[reference]} on {len(figures['missed'])}: "
                    + ", ".join(figures["missed"])
                )
    return "\n".join(lines)


def plot(report: Mapping[str, Any], file: Path) -> None:
    """Mean curves over the images that have them, as PNG: three panels, one a metric."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    curves, names = report["curves"], titles(report["contenders"])
    figure, axes = pyplot.subplots(1, 3, figsize=(18, 6))
    for axis, metric in zip(axes, METRICS, strict=True):
        for label, title in names.items():
            # codecs have as many points on every image: average point by point
            stack = [scaled(codecs[label], metric) for codecs in curves.values() if label in codecs]
            usual = statistics.mode(len(points) for points in stack)
            mean = np.array([points for points in stack if len(points) == usual]).mean(0)
            axis.plot(mean[:, 0], mean[:, 1], marker=".", label=title)
        axis.set_xscale("log")
        axis.set_xlabel("bits per pixel")
        axis.set_ylabel("PSNR, dB" if metric == "psnr" else f"{metric.upper()}, -10 log10(1 - x)")
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"Mean over {len(curves)} images, tiles of {report['tile']} pixels")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
