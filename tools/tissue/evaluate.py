"""Figures of the methods on the held-out overviews, and on made slides.

    python -m tools.tissue.evaluate --data ../shared/data

Per image: share of labelled tissue outside the mask (``lost``), share of labelled glass within it
(``kept``), both with the default margin and without (``bare``), and the overlap (IoU) without a
margin. Pixels whose label is unsure count nowhere. The margin is five or ten pixels of each
overview, whatever its true resolution.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from tools.tissue.labels import GLASS, TISSUE, Labelled, load
from tools.tissue.made import Floats, fat, mucus, on_glass, pale, pictured, section
from wsicodec.tissue.finding import DILATION_MICROMETRES, METHODS, tissue_in
from wsicodec.tissue.morphology import dilated
from wsicodec.tissue.overview import MICROMETRES

STRENGTHS = (1.0, 0.7, 0.5, 0.35)
SIDES = (2, 3, 4, 6, 8, 12)


@dataclass(frozen=True)
class Figures:
    """Shares of 0 ... 1; nan where an image has no tissue or no glass."""

    lost: float
    bare_lost: float
    kept: float
    bare_kept: float
    overlap: float


def figures(item: Labelled, method: str) -> Figures:
    """One method on one overview."""
    found = tissue_in(item.image, method)
    mask = dilated(found, DILATION_MICROMETRES[method] / MICROMETRES)
    tissue, glass = item.label == TISSUE, item.label == GLASS
    both = np.count_nonzero(found & tissue)
    either = np.count_nonzero((found | tissue) & (tissue | glass))
    return Figures(
        _share(tissue & ~mask, tissue),
        _share(tissue & ~found, tissue),
        _share(glass & mask, glass),
        _share(glass & found, glass),
        both / either if tissue.any() else float("nan"),
    )


def made_lost(method: str, light: Floats) -> float:
    """Share of made tissue outside the mask with its margin."""
    image, tissue = on_glass(light)
    mask = dilated(tissue_in(pictured(image), method), DILATION_MICROMETRES[method] / MICROMETRES)
    return _share(tissue & ~mask, tissue)


def islets_kept(method: str, side: int, strength: float) -> float:
    """Share of square islets, ``side`` cells wide, of which anything is found."""
    light = np.minimum(section(), 0.97) ** strength
    kept = 0
    for turn in range(16):
        y, x = 12 + 24 * (turn // 4), 60 + 8 * (turn % 4)
        image, _ = on_glass(light[y : y + side, x : x + side], (150, 200))
        found = tissue_in(pictured(image[100:300, 100:300]), method)
        kept += bool(dilated(found, 3)[50 : 50 + side, 100 : 100 + side].any())
    return kept / 16


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    count = np.count_nonzero(whole)
    return np.count_nonzero(part) / count if count else float("nan")


def main() -> None:
    """Print tables of Markdown; cells hold the figures of ``METHODS`` in their order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--use", default="held", choices=("held", "train"))
    arguments = parser.parse_args()
    items = load(arguments.data / "overviews", arguments.use)
    print("| | tissue lost | without margin | glass kept | without margin | IoU |")
    print("| --- | --- | --- | --- | --- | --- |")
    table = np.array([[astuple(figures(item, m)) for m in METHODS] for item in items])
    for item, row in zip(items, table, strict=True):
        print(f"| {item.name} | {_line(row)} |")
    worst = np.nanmax(table, axis=0)
    worst[:, 4] = np.nanmin(table[:, :, 4], axis=0)
    print(f"| **mean** | {_line(np.nanmean(table, axis=0))} |")
    print(f"| **worst** | {_line(worst)} |")
    print("\n| made tissue lost | " + " | ".join(f"{100 * s:.0f} %" for s in STRENGTHS) + " |")
    for kind in (pale, fat, mucus):
        lost = [[made_lost(m, kind() ** s) for m in METHODS] for s in STRENGTHS]
        print(f"| {kind.__name__} | {' | '.join(_pair(row, 1) for row in lost)} |")
    print("\n| islets found | H&E | a fifth of its absorbance |")
    for side in SIDES:
        kept = [[islets_kept(m, side, s) for m in METHODS] for s in (1.0, 0.22)]
        print(f"| {side * MICROMETRES:.0f} µm | {' | '.join(_pair(row, 0) for row in kept)} |")


def _line(row: np.ndarray) -> str:
    cells = [_pair(row[:, column], digits) for column, digits in enumerate((2, 2, 1, 1))]
    overlap = "" if np.isnan(row[:, 4]).any() else " / ".join(f"{v:.3f}" for v in row[:, 4])
    return " | ".join([*cells, overlap])


def _pair(values: Sequence[float], digits: int) -> str:
    if np.isnan(values).any():
        return ""
    return " / ".join(f"{100 * value:.{digits}f}" for value in values) + " %"


if __name__ == "__main__":
    main()
