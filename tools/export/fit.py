"""Counts real symbols, for tables of what a class holds, not of what theory says."""

from __future__ import annotations

from typing import Any

import numpy as np

from tools.train.images import Sampler
from tools.train.tables import TABLE_CLASSES, count_indices
from wsicodec.codec.cell import CellShape
from wsicodec.codec.network import LANES_LOG2, TileEncoder, quantise_cell, usual_search
from wsicodec.codec.rate import ssim_decibels
from wsicodec.entropy.trellis import split_levels
from wsicodec.metrics import psnr, ssim
from wsicodec.models.decoder import DecoderModel
from wsicodec.models.encoder import EncoderModel

Array = np.ndarray[Any, Any]

NEAR, NEAR_SHARE = (30, 40), 0.8


def count_symbols(
    sampler: Sampler,
    decoder: DecoderModel,
    encoder: EncoderModel,
    crops: int,
    gains: tuple[int, int],
    usual: int,
) -> tuple[Array, Array]:
    """(counts, squares): (2, classes, 129) counts of indices -64 ... 64 by quantiser and class
    (latents alone), and (256, z channels, 2) sums of squared hyper-latents and their number.

    gains: the range. usual: the default quality's; most crops are coded near it, since the finest
    gains have the most symbols, of other shapes.
    """
    counts = np.zeros((2, TABLE_CLASSES + 1, 129))
    squares = np.zeros((256, decoder.architecture.z_channels, 2))
    rng = np.random.default_rng(1)
    search = usual_search(encoder)
    for _ in range(crops):
        image = sampler.one()
        near = max(gains[0], usual - NEAR[0]), min(gains[1], usual + NEAR[1])
        span = near if rng.random() < NEAR_SHARE else gains
        gain = int(rng.integers(span[0], span[1] + 1))
        limit = int((encoder.stage_gain <= gain).sum())
        shape = CellShape(*image.shape[:2])
        coded = quantise_cell(image, shape, decoder, encoder, gain, limit, search)
        z = coded[0][0].astype(float)
        squares[gain, :, 0] += (z**2).sum((1, 2))
        squares[gain, :, 1] += z[0].size
        for levels, classes in coded[1:]:
            k, quantiser = split_levels(levels, classes, 1 << LANES_LOG2)
            counts += count_indices(k, quantiser, classes)
    return counts, squares


def typical_qualities(
    sampler: Sampler, decoder: DecoderModel, encoder: EncoderModel, crops: int, points: int = 18
) -> Array:
    """(2, points): median decibels, of PSNR and of SSIM, at evenly spaced gains 0 ... 255."""
    gains = np.linspace(0, 255, points).round().astype(int)
    found = np.zeros((2, points, crops))
    for i in range(crops):
        image = sampler.one()
        tile = TileEncoder(image, decoder, encoder)
        for j, gain in enumerate(gains):
            pixels = tile.encode(int(gain)).pixels
            found[:, j, i] = min(psnr(image, pixels), 70.0), ssim_decibels(ssim(image, pixels))
    return np.maximum.accumulate(np.median(found, axis=2), axis=1)


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
