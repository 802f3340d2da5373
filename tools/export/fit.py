"""Fits the symbol tables to counts of real symbols: what a class holds, not what theory says."""

from __future__ import annotations

from typing import Any

import numpy as np

from tools.export.model import TABLE_CLASSES, normal_weights, scale_of
from tools.train.images import Sampler
from wsicodec.codec.cell import CellShape
from wsicodec.codec.network import Search, quantise_cell
from wsicodec.entropy.tables import SymbolTables, tables_from_weights
from wsicodec.models.decoder import DecoderModel
from wsicodec.models.encoder import EncoderModel

Array = np.ndarray[Any, Any]
PRIOR = 200.0
"""Weight of the normal distribution, in symbols, against the counts."""


def count_symbols(
    sampler: Sampler,
    decoder: DecoderModel,
    encoder: EncoderModel,
    crops: int,
    gains: tuple[int, int],
) -> tuple[dict[int, Array], Array]:
    """(counts, squares): per class, counts of its table's values -64 ... 64 (latents alone), and
    (256, z channels, 2) sums of squared hyper-latents and their number."""
    counts = {c: np.zeros(129) for c in range(1, TABLE_CLASSES + 1)}
    squares = np.zeros((256, decoder.architecture.z_channels, 2))
    rng = np.random.default_rng(1)
    search = Search(encoder.step_strength, encoder.lagrange)
    for _ in range(crops):
        image = sampler.one()
        gain = int(rng.integers(gains[0], gains[1] + 1))
        limit = int((encoder.stage_gain <= gain).sum())
        shape = CellShape(*image.shape[:2])
        coded = quantise_cell(image, shape, decoder, encoder, gain, limit, search)
        z = coded[0][0].astype(float)
        squares[gain, :, 0] += (z**2).sum((1, 2))
        squares[gain, :, 1] += z[0].size
        for symbols, classes in coded[1:]:
            q, c = symbols.reshape(-1), classes.reshape(-1)
            near = (c > 0) & (c <= TABLE_CLASSES)
            flat = c[near].astype(np.int64) * 129 + np.clip(q[near], -64, 64) + 64
            total = np.bincount(flat, minlength=129 * (TABLE_CLASSES + 1)).reshape(-1, 129)
            for k in range(1, TABLE_CLASSES + 1):
                counts[k] += total[k]
    return counts, squares


def fitted_tables(counts: dict[int, Array]) -> SymbolTables:
    """Tables from counts, symmetric, with the normal distribution as the prior."""
    weights = []
    for c in range(1, TABLE_CLASSES + 1):
        prior = normal_weights(scale_of(c))
        # heavier tails than the normal's need a wider table in the small classes
        radius = int(np.clip((len(prior) - 2) // 2 + 2, 3, 64))
        seen = counts[c][64 - radius : 64 + radius + 1]
        seen = (seen + seen[::-1]) / 2
        escape = max(counts[c].sum() - seen.sum(), 0.0)
        base = np.full(2 * radius + 2, 1e-6)
        middle = (len(prior) - 2) // 2
        base[radius - middle : radius + middle + 1] += prior[:-1]
        base[-1] += prior[-1]
        weights.append(np.append(seen, escape + 0.05) + PRIOR * base / base.sum())
    return tables_from_weights(weights)


def fitted_hyper_classes(squares: Array, fallback: Array) -> Array:
    """(256, z channels): classes from the spread of hyper-latents, smoothed over gains."""
    width = 16
    kernel = np.ones(2 * width + 1)
    classes = fallback.copy()
    for z in range(squares.shape[1]):
        total = np.convolve(squares[:, z, 0], kernel, "same")
        number = np.convolve(squares[:, z, 1], kernel, "same")
        sigma = np.sqrt((total + 0.02 * 64) / np.maximum(number + 64, 1))
        # a rounded normal of standard deviation s has variance s^2 + 1/12 once s is not small
        sigma = np.sqrt(np.maximum(sigma**2 - 1 / 12 * np.minimum(1, sigma**2), 0.149**2))
        fitted = np.clip(np.round(8 * (np.log2(sigma) + 2.75)) + 1, 1, 127)
        known = number > 0
        classes[known, z] = fitted[known]
    return classes
