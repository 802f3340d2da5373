"""Symbol tables from counts, with the normal distribution as the prior."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import ndtr

from wsicodec.entropy.tables import MAX_RADIUS, SymbolTables, tables_from_weights

SCALE_STEPS_PER_OCTAVE = 8
SCALE_LOG2_OF_CLASS_1 = -2.75
SCALE_CLASSES = 128
PRIOR = 200.0
"""Weight of the normal distribution, in symbols, against the counts."""

TABLE_CLASSES = 55
Array = np.ndarray[Any, Any]


def scale_of(symbol_class: int) -> float:
    """Standard deviation, in steps, of a class."""
    return float(2 ** ((symbol_class - 1) / SCALE_STEPS_PER_OCTAVE + SCALE_LOG2_OF_CLASS_1))


def normal_weights(scale: float, quantiser: int) -> Array:
    """Probabilities of -R ... R and the escape under a normal distribution cut at the middles
    between a quantiser's points."""
    radius = int(np.clip(np.ceil(5.0 * scale), 1, min(64, MAX_RADIUS)))
    k = np.arange(-radius - 1, radius + 2)
    points = k - 0.5 * quantiser * np.sign(k)
    p = np.diff(ndtr((points[1:] + points[:-1]) / 2 / scale))
    return np.append(p, max(1 - p.sum(), 1e-7))


def count_indices(indices: Array, quantisers: Array, classes: Array) -> Array:
    """(2, classes, 129) counts of indices -64 ... 64 (clipped) by quantiser and class."""
    counts = np.zeros((2, TABLE_CLASSES + 1, 129))
    coded = (classes > 0) & (classes <= TABLE_CLASSES)
    row = quantisers[coded].astype(np.int64) * (TABLE_CLASSES + 1) + classes[coded]
    flat = row * 129 + np.clip(indices[coded], -64, 64) + 64
    return counts + np.bincount(flat, minlength=counts.size).reshape(counts.shape)


def fitted_tables(counts: Array) -> SymbolTables:
    """Tables from counts, symmetric, with the normal distribution as the prior."""
    weights = []
    for quantiser in (0, 1):
        for c in range(1, TABLE_CLASSES + 1):
            prior = normal_weights(scale_of(c), quantiser)
            # heavier tails than the normal's need a wider table in the small classes
            radius = int(np.clip((len(prior) - 2) // 2 + 2, 3, 64))
            row = counts[quantiser, c]
            seen = row[64 - radius : 64 + radius + 1]
            seen = (seen + seen[::-1]) / 2
            escape = max(row.sum() - seen.sum(), 0.0)
            base = np.full(2 * radius + 2, 1e-6)
            middle = (len(prior) - 2) // 2
            base[radius - middle : radius + middle + 1] += prior[:-1]
            base[-1] += prior[-1]
            weights.append(np.append(seen, escape + 0.05) + PRIOR * base / base.sum())
    return tables_from_weights(weights)
