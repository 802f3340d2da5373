"""From pixels to latents: planes, lapping, cosines, turned colours. Decoders know nothing of this;
another analysis makes other symbols, never another format."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsicodec.codec.cell import CellShape
from wsicodec.codec.colours import TURN_STEP, Turn, best_turn, rotation
from wsicodec.codec.cosine import (
    BANDS,
    BLOCK,
    PLANES,
    SAMPLES,
    matrix_by_rows,
    rows_by_matrix,
)
from wsicodec.codec.lapping import HALF, border_matrix, lap_across
from wsicodec.codec.pixels import brush_of
from wsicodec.codec.protocol import Image
from wsicodec.entropy.compiled import compiled
from wsicodec.models.decoder import DecoderModel

Floats = npt.NDArray[np.float32]


@compiled
def _planes(pixels, colours, planes):
    """Pixels (height, width, 3) times ``colours`` (3, 4) into ``planes`` (3, rows * 16, columns *
    16) float32, whose further rows and columns repeat the last."""
    height, width = pixels.shape[0], pixels.shape[1]
    for p in range(3):
        red, green, blue, level = colours[p, 0], colours[p, 1], colours[p, 2], colours[p, 3]
        for y in range(planes.shape[1]):
            source, target = pixels[min(y, height - 1)], planes[p, y]
            for x in range(width):
                target[x] = (
                    level
                    + red * np.float32(source[x, 0])
                    + green * np.float32(source[x, 1])
                    + blue * np.float32(source[x, 2])
                )
            for x in range(width, len(target)):
                target[x] = target[width - 1]


@compiled
def _lap(planes, border, turn):
    """Filter planes across the borders of their blocks, in place."""
    height, width = planes.shape[1], planes.shape[2]
    base, pitch = planes.ctypes.data, 4 * width
    for p in range(3):
        top = base + p * height * pitch
        for x in range(BLOCK, width, BLOCK):
            edge = top + 4 * (x - HALF)
            rows_by_matrix(edge, pitch, height, border.ctypes.data, edge, pitch)
        for y in range(BLOCK, height, BLOCK):
            at = top + y * pitch
            lap_across(at - pitch, at, pitch, width // BLOCK, turn.ctypes.data)


@compiled
def _transform(planes, frequencies, samples, bands, totals, products):
    """Cosine transform of the blocks of planes (3, rows * 16, columns * 16).

    bands: (768, positions). totals: (768,) and products: (6, 256), sums over positions of bands and
    of products of planes 00 01 02 11 12 22.
    """
    rows, columns = planes.shape[1] // BLOCK, planes.shape[2] // BLOCK
    pitch = 4 * planes.shape[2]
    plane_size = planes.shape[1] * pitch
    blocks = np.empty((columns + 1, PLANES, BANDS), np.float32)  # the last: what is half done
    base, blocks_at = planes.ctypes.data, blocks.ctypes.data
    half_at = blocks_at + 4 * SAMPLES * columns
    frequencies_at, samples_at = frequencies.ctypes.data, samples.ctypes.data
    for i in range(rows):
        for j in range(columns):
            for p in range(PLANES):
                at = base + p * plane_size + BLOCK * i * pitch + 4 * BLOCK * j
                out = blocks_at + 4 * BANDS * (PLANES * j + p)
                rows_by_matrix(at, pitch, BLOCK, samples_at, half_at, 4 * BLOCK)
                matrix_by_rows(half_at, 4 * BLOCK, frequencies_at, out, 4 * BLOCK)
            n = 0
            for p in range(PLANES):
                a = blocks[j, p]
                for k in range(BANDS):
                    totals[p * BANDS + k] += a[k]
                for q in range(p, PLANES):
                    b = blocks[j, q]
                    for k in range(BANDS):
                        products[n, k] += a[k] * b[k]
                    n += 1
        for p in range(PLANES):
            for k in range(BANDS):
                target = bands[p * BANDS + k]
                for j in range(columns):
                    target[i * columns + j] = blocks[j, p, k]


@compiled
def _turned(bands, order, turn, latents):
    """Latents (channels, positions) of bands (768, positions) after turning the planes."""
    for c in range(latents.shape[0]):
        p, k = order[c] // BANDS, order[c] % BANDS
        a, b, d = turn[p, 0], turn[p, 1], turn[p, 2]
        first, second, third = bands[k], bands[BANDS + k], bands[2 * BANDS + k]
        target = latents[c]
        for i in range(len(target)):
            target[i] = a * first[i] + b * second[i] + d * third[i]


@dataclass(frozen=True, eq=False)
class Bands:
    """Frequencies of a cell's blocks, plane by plane, before planes are turned.

    values: (768, positions) float32. covariance: (255, 3, 3) of the planes, by frequency, all but
    the lowest.
    """

    values: Floats
    covariance: npt.NDArray[np.float64]

    def turn(self, step: float = TURN_STEP) -> Turn:
        """The turn that suits a quantisation step."""
        return best_turn(self.covariance, step)

    def latents(self, model: DecoderModel, turn: Turn) -> Floats:
        """(channels, positions) after turning the planes."""
        latents = np.empty((model.architecture.channels, self.values.shape[1]), np.float32)
        matrix = rotation(turn).astype(np.float32)
        _turned(self.values, brush_of(model).order, matrix, latents)
        return latents


@functools.lru_cache(maxsize=4)
def _forward(model: DecoderModel) -> tuple[Floats, Floats, Floats]:
    """Of a model, turned around: colours (3, 4), planes of RGB and what is added; the filter across
    borders as ``border_matrix`` and as (8, 8)."""
    matrix = np.linalg.inv(model.colours.astype(np.float64))
    level = -matrix @ (model.mean.astype(np.float64) + 128)
    colours = np.concatenate([matrix, level[:, None]], axis=1).astype(np.float32)
    lapping = np.ascontiguousarray(model.lapping.T)
    return colours, border_matrix(lapping), lapping


def bands_of(pixels: Image, shape: CellShape, model: DecoderModel) -> Bands:
    """Frequencies of a cell. Where blocks reach past it, its last row and column repeat."""
    rows, columns = shape.latents
    positions = rows * columns
    colours, border, lapping = _forward(model)
    planes = np.empty((PLANES, rows * BLOCK, columns * BLOCK), np.float32)
    _planes(np.ascontiguousarray(pixels), colours, planes)
    brush = brush_of(model)
    if brush.lapped:
        _lap(planes, border, lapping)
    values = np.empty((SAMPLES, positions), np.float32)
    totals, products = np.zeros(SAMPLES), np.zeros((6, BANDS))
    _transform(planes, brush.frequencies, brush.samples, values, totals, products)
    mean = totals.reshape(PLANES, BANDS) / positions
    i, j = np.triu_indices(PLANES)
    spread = products / positions - mean[i] * mean[j]
    covariance = np.empty((BANDS, PLANES, PLANES))
    covariance[:, i, j] = covariance[:, j, i] = spread.T
    return Bands(values, covariance[1:])
