"""Arithmetic of rate-distortion curves: rates at a target fidelity, BD-rates, means by group."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import metrics as measures
from benchmarks.contenders import REFERENCES
from benchmarks.groups import Groups

Curve = list[list[float | None]]
"""Points [bpp, psnr, ssim, ms_ssim], cheapest first; None where not measured."""
Curves = Mapping[str, Mapping[str, Curve]]
"""{image: {codec: curve}}"""
BdRates = dict[str, dict[str, dict[str, dict[str, dict[str, float]]]]]
"""{image: {tested: {reference: {metric: figures of a ``BdRate``}}}}"""

METRICS = ("psnr", "ssim", "ms_ssim")
BASELINE = "jpeg420"


@dataclass(frozen=True)
class Target:
    """A fidelity at which rates are compared: a metric of METRICS, its value and its name."""

    metric: str
    value: float
    name: str

    def __str__(self) -> str:
        return f"{self.name} {self.value}"


SSIM_TARGET = Target("ssim", 0.95, "SSIM")
MS_SSIM_TARGET = Target("ms_ssim", 0.99, "MS-SSIM")


def scaled(curve: Curve, metric: str) -> list[tuple[float, float]]:
    """(bpp, quality) points, quality on the scale of BD-rates; nan where not measured."""
    scale = measures.QUALITY_SCALES[metric]
    column = 1 + METRICS.index(metric)
    points = []
    for point in curve:
        value = point[column]
        points.append((point[0] or 0.0, math.nan if value is None else scale(value)))
    return points


# -- rates at a target -------------------------------------------------------------------------


def rate_at_target(curve: Curve, target: Target) -> float:
    """Bits per pixel where a curve has the target's fidelity; nan where it does not reach it.

    Between points, straight in ln(rate) and the scale of BD-rates.
    """
    goal = measures.QUALITY_SCALES[target.metric](target.value)
    return measures.rate_at(scaled(curve, target.metric), goal)


def _shortfall(curve: Curve, target: Target) -> str:
    """Why a curve has no rate at the target."""
    column = 1 + METRICS.index(target.metric)
    known = [value for point in curve if (value := point[column]) is not None]
    if not known:
        return f"{target.name} not measured"
    if max(known) < target.value:
        return f"best {target.name} {max(known):.4f}"
    return f"{target.name} {known[0]:.4f} at the cheapest point"


def at_target(
    curves: Curves, target: Target, groups: Groups, pixels: Mapping[str, int]
) -> dict[str, Any]:
    """Rate of each codec where it has the target's fidelity, and against JPEG 4:2:0.

    pixels: by image, how many were coded: the weights of total bits.

    {"target", "metric", "all": summary, kind of group: {name: summary}, "images": {image: {codec:
    {"bpp", "ratio"}}}, "not_reached": {codec: {image: why}}}. A summary is {codec: {"bpp",
    "ratio_mean" and "ratio_median" of the images' ratios, "ratio_total" of all bits, "images" that
    reach the target, "compared": those that JPEG 4:2:0 reaches too, which the ratios are over,
    "missed": names of those that do not reach}}.
    """
    images: dict[str, dict[str, dict[str, float | None]]] = {}
    not_reached: dict[str, dict[str, str]] = {}
    for image, codecs in curves.items():
        rates = {label: rate_at_target(curve, target) for label, curve in codecs.items()}
        for label, rate in rates.items():
            if math.isnan(rate):
                why = _shortfall(codecs[label], target)
                not_reached.setdefault(label, {})[image] = why
        base = rates.get(BASELINE, math.nan)
        images[image] = {
            label: {"bpp": _finite(rate), "ratio": _finite(rate / base)}
            for label, rate in rates.items()
        }
    return {
        "target": target.value,
        "metric": target.metric,
        **_by_group(list(images), groups, lambda names: _rates_summary(images, names, pixels)),
        "images": images,
        "not_reached": not_reached,
    }


def _rates_summary(
    images: Mapping[str, Mapping[str, Mapping[str, float | None]]],
    names: Sequence[str],
    pixels: Mapping[str, int],
) -> dict[str, Any]:
    labels = dict.fromkeys(label for name in names for label in images[name])
    result = {}
    for label in labels:
        here = {name: images[name][label] for name in names if label in images[name]}
        rates = {n: rate for n, r in here.items() if (rate := r["bpp"]) is not None}
        ratios = {n: ratio for n, r in here.items() if (ratio := r["ratio"]) is not None}
        bits = sum(rates[name] * pixels[name] for name in ratios)
        base = sum(rates[name] / ratios[name] * pixels[name] for name in ratios)
        result[label] = {
            "bpp": mean(rates.values()),
            "ratio_mean": mean(ratios.values()),
            "ratio_median": statistics.median(ratios.values()) if ratios else None,
            "ratio_total": bits / base if ratios else None,
            "images": len(rates),
            "compared": len(ratios),
            "missed": [name for name in here if name not in rates],
        }
    return result


def colour_at_target(
    details: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    target: Target,
    groups: Groups,
) -> dict[str, Any]:
    """CIEDE2000 of each codec where it has the target's fidelity, straight in ln(rate) between
    points.

    details: {image: {codec: points as ``measure`` gives them}}. {"target", "metric", "all":
    summary, kind of group: {name: summary}}; a summary is {codec: {"mean", "p95", "images"}}, means
    over the images that reach the target.
    """
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for image, codecs in details.items():
        for label, points in codecs.items():
            curve: Curve = [[p["bpp"], *(p[metric] for metric in METRICS)] for p in points]
            rate = rate_at_target(curve, target)
            if not math.isnan(rate):
                mean_and_p95 = [
                    measures.value_at([(p["bpp"], p[figure]) for p in points], rate)
                    for figure in ("ciede2000_mean", "ciede2000_p95")
                ]
                found.setdefault(label, {})[image] = (mean_and_p95[0], mean_and_p95[1])

    def summary(names: Sequence[str]) -> dict[str, Any]:
        result = {}
        for label, values in found.items():
            here = [values[name] for name in names if name in values]
            result[label] = {
                "mean": mean(value for value, _ in here),
                "p95": mean(p95 for _, p95 in here),
                "images": len(here),
            }
        return result

    return {
        "target": target.value,
        "metric": target.metric,
        **_by_group(list(details), groups, summary),
    }


# -- BD-rates ----------------------------------------------------------------------------------


def bd_rates(curves: Curves) -> BdRates:
    """BD-rates by image, where the curves have points enough and share some quality.

    Learned codecs against every reference; without a learned codec, each against every other.
    """
    rates: BdRates = {}
    for image, codecs in curves.items():
        for tested, reference in pairs(curves):
            if tested not in codecs or reference not in codecs:
                continue
            for metric in METRICS:
                with contextlib.suppress(ValueError):  # too few points: not counted
                    rate = measures.bd_rate(
                        scaled(codecs[reference], metric), scaled(codecs[tested], metric)
                    )
                    if not math.isnan(rate.pchip):
                        here = rates.setdefault(image, {}).setdefault(tested, {})
                        here.setdefault(reference, {})[metric] = rate.as_dict()
    return rates


def pairs(curves: Curves) -> list[tuple[str, str]]:
    """(tested, reference) codecs of BD-rates."""
    labels = list(dict.fromkeys(label for codecs in curves.values() for label in codecs))
    learned = [label for label in labels if label not in REFERENCES]
    references = [label for label in labels if label in REFERENCES]
    return [(t, r) for t in learned or labels for r in references if t != r]


def bd_means(curves: Curves, rates: BdRates, groups: Groups) -> dict[str, Any]:
    """Mean BD-rates {"all": means, kind of group: {name: means}}, in per cent.

    means: {tested: {reference: {metric: {"pchip", "akima", "median" of the images' PCHIP figures,
    "overlap_low" ... "overlap_high" and "coverage" as in ``BdRate``, "images", "missed": names of
    the images without a figure}}}}.
    """

    def summary(names: Sequence[str]) -> dict[str, Any]:
        means: dict[str, Any] = {}
        for tested, reference in pairs(curves):
            for metric in METRICS:
                entries = {
                    name: rates.get(name, {}).get(tested, {}).get(reference, {}).get(metric)
                    for name in names
                    if tested in curves[name] and reference in curves[name]
                }
                found = [entry for entry in entries.values() if entry is not None]
                means.setdefault(tested, {}).setdefault(reference, {})[metric] = {
                    "pchip": mean(r["pchip"] for r in found),
                    "akima": mean(r["akima"] for r in found),
                    "median": statistics.median(r["pchip"] for r in found) if found else None,
                    "overlap_low": mean(r["low"] for r in found),
                    "overlap_high": mean(r["high"] for r in found),
                    "coverage": mean(r["coverage"] for r in found),
                    "images": len(found),
                    "missed": [name for name, entry in entries.items() if entry is None],
                }
        return means

    return _by_group(list(curves), groups, summary)


# -- means -------------------------------------------------------------------------------------


def mean(values: Iterable[float]) -> float | None:
    """Mean of what is a number; None of nothing."""
    known = [v for v in values if not math.isnan(v)]
    return statistics.fmean(known) if known else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _by_group(
    images: Sequence[str], groups: Groups, summary: Callable[[Sequence[str]], dict[str, Any]]
) -> dict[str, Any]:
    """{"all": summary of all images, kind: {name: summary of the group}}"""
    kinds = {
        kind: {name: summary(members) for name, members in named.items()}
        for kind, named in groups.items()
    }
    return {"all": summary(images), **kinds}
