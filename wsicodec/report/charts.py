"""Histograms as inline SVG; colours are the page's own, so that they follow light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsicodec.report.maps import nice_step

BINS = 36
_WIDTH, _HEIGHT = 360, 222
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 18, 34, 40


@dataclass(frozen=True)
class Mark:
    """A vertical line at a value. kind: CSS class, ``floor`` or ``mean``."""

    value: float
    label: str
    kind: str


@dataclass(frozen=True)
class Series:
    """Values of one kind of tiles. kind: CSS class of its bars."""

    label: str
    kind: str
    values: npt.NDArray[np.floating]


def histogram(title: str, unit: str, series: Sequence[Series], marks: Sequence[Mark]) -> str:
    """Tiles by value, the series stacked. Values that are not finite are left out.

    Empty where there is no finite value.
    """
    known = [part.values[np.isfinite(part.values)].astype(np.float64) for part in series]
    every = np.concatenate([values.ravel() for values in known]) if known else np.empty(0)
    if not every.size:
        return ""
    low, high, step = _range(every, [mark.value for mark in marks])
    edges = np.linspace(low, high, BINS + 1)
    # what lies beyond an end is counted in its last bar
    counts = [np.histogram(np.clip(values, low, high), edges)[0] for values in known]
    top = max(1, int(np.sum(counts, axis=0).max()))
    parts = [_axis_y(top), _axis_x(low, high, step, f"{title}{f' ({unit})' if unit else ''}")]
    base = np.zeros(BINS, np.int64)
    for part, numbers in zip(series, counts, strict=True):
        path = _bars(base, numbers, top)
        if path:
            parts.append(f'<path class="bar {part.kind}" d="{path}"/>')
        base += numbers
    parts += [_mark(mark, low, high, row) for row, mark in enumerate(marks)]
    label = (
        f"Histogram of {title} of {every.size} tiles: median {np.median(every):.4g}, "
        f"from {every.min():.4g} to {every.max():.4g}"
    )
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{html.escape(label)}">{"".join(parts)}</svg>'
    )


def _range(values: npt.NDArray[np.floating], wanted: Sequence[float]) -> tuple[float, float, float]:
    """(low, high, step between labels) that holds all but the last 1/1000 at either end."""
    low, high = (float(v) for v in np.percentile(values, (0.1, 99.9)))
    low, high = min(low, *wanted, low), max(high, *wanted, high)
    step = nice_step(max(high - low, 1e-4 * max(1.0, abs(high))) / 4)
    start, end = math.floor(low / step) * step, math.ceil(high / step) * step
    return start, end if end > start else start + step, step


def _x(value: float, low: float, high: float) -> float:
    return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)


def _y(count: float, top: int) -> float:
    return _HEIGHT - _BOTTOM - count / top * (_HEIGHT - _TOP - _BOTTOM)


def _bars(base: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], top: int) -> str:
    width = (_WIDTH - _LEFT - _RIGHT) / BINS
    parts = []
    for place in np.flatnonzero(counts):
        x = _LEFT + float(place) * width
        y0, y1 = _y(float(base[place]), top), _y(float(base[place] + counts[place]), top)
        y1 = min(y1, y0 - 1)  # a single tile among thousands is still seen
        parts.append(f"M{x + 0.5:.1f} {y0:.1f}V{y1:.1f}h{width - 1:.1f}V{y0:.1f}z")
    return "".join(parts)


def _axis_y(top: int) -> str:
    step = max(1, int(nice_step(top / 4)))
    lines = [f'<text class="axis" x="{_LEFT - 6}" y="13" text-anchor="end">tiles</text>']
    for count in range(0, top + 1, step):
        y = _y(count, top)
        lines.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{count:,}</text>'
        )
    return "".join(lines)


def _axis_x(low: float, high: float, step: float, title: str) -> str:
    digits = max(0, -math.floor(math.log10(step)))
    parts = []
    for place in range(round((high - low) / step) + 1):
        value = low + place * step
        parts.append(
            f'<text class="tick" x="{_x(value, low, high):.1f}" y="{_HEIGHT - _BOTTOM + 15}" '
            f'text-anchor="middle">{value:.{digits}f}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"{html.escape(title)}</text>"
    )
    return "".join(parts)


def _mark(mark: Mark, low: float, high: float, row: int) -> str:
    x = _x(min(max(mark.value, low), high), low, high)
    anchor, shift = ("end", -4) if x > _WIDTH / 2 else ("start", 4)
    top = 4 + 13 * row  # labels stand above the bars, one below the other
    return (
        f'<line class="mark {mark.kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" '
        f'y2="{_HEIGHT - _BOTTOM}"/><text class="marklabel {mark.kind}" x="{x + shift:.1f}" '
        f'y="{top + 9}" text-anchor="{anchor}">{html.escape(mark.label)}</text>'
    )
