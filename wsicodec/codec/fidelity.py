"""SSIM of a tile in a tenth of the time that ``wsicodec.metrics`` takes: encoders measure what they
make. The figures are those of ``metrics.ssim`` but for the last digits of a double."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wsicodec import metrics
from wsicodec.codec.protocol import Image
from wsicodec.entropy.compiled import compiled
from wsicodec.metrics import DATA_RANGE, SIGMA, WINDOW

HALF = WINDOW // 2
FIELDS = 5
"""Means of x, y, x x, y y and x y."""


def _weights() -> npt.NDArray[np.float64]:
    weights = np.exp(-0.5 / SIGMA**2 * np.arange(-HALF, HALF + 1) ** 2)
    return weights / weights.sum()  # type: ignore[no-any-return]


_WEIGHTS = _weights()


@compiled
def _mean_ssim(first, second, weights):
    """Mean SSIM of the luma of two images (rows, columns, 3), sides of at least a window."""
    rows, columns = first.shape[0], first.shape[1]
    width = columns - WINDOW + 1
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    w0, w1, w2, w3, w4, w5 = weights[0], weights[1], weights[2], weights[3], weights[4], weights[5]
    fields = np.empty((FIELDS, columns))
    ring = np.empty((WINDOW, FIELDS, width))  # rows of fields smoothed along the row
    mean = np.empty((FIELDS, width))
    total = 0.0
    for i in range(rows):
        for j in range(columns):
            x = 0.299 * first[i, j, 0] + 0.587 * first[i, j, 1] + 0.114 * first[i, j, 2]
            y = 0.299 * second[i, j, 0] + 0.587 * second[i, j, 1] + 0.114 * second[i, j, 2]
            fields[0, j], fields[1, j] = x, y
            fields[2, j], fields[3, j], fields[4, j] = x * x, y * y, x * y
        for k in range(FIELDS):
            f, out = fields[k], ring[i % WINDOW, k]
            for j in range(width):
                near = w5 * f[j + 5] + w4 * (f[j + 4] + f[j + 6]) + w3 * (f[j + 3] + f[j + 7])
                far = w2 * (f[j + 2] + f[j + 8]) + w1 * (f[j + 1] + f[j + 9])
                out[j] = near + far + w0 * (f[j] + f[j + 10])
        if i < WINDOW - 1:
            continue
        t = i + 1  # the oldest row of the ring
        for k in range(FIELDS):
            r0, r10 = ring[t % WINDOW, k], ring[(t + 10) % WINDOW, k]
            r1, r9 = ring[(t + 1) % WINDOW, k], ring[(t + 9) % WINDOW, k]
            r2, r8 = ring[(t + 2) % WINDOW, k], ring[(t + 8) % WINDOW, k]
            r3, r7 = ring[(t + 3) % WINDOW, k], ring[(t + 7) % WINDOW, k]
            r4, r6 = ring[(t + 4) % WINDOW, k], ring[(t + 6) % WINDOW, k]
            r5, out = ring[(t + 5) % WINDOW, k], mean[k]
            for j in range(width):
                near = w5 * r5[j] + w4 * (r4[j] + r6[j]) + w3 * (r3[j] + r7[j])
                out[j] = near + w2 * (r2[j] + r8[j]) + w1 * (r1[j] + r9[j]) + w0 * (r0[j] + r10[j])
        for j in range(width):
            ux, uy = mean[0, j], mean[1, j]
            vx, vy, vxy = mean[2, j] - ux * ux, mean[3, j] - uy * uy, mean[4, j] - ux * uy
            top = (2 * ux * uy + c1) * (2 * vxy + c2)
            total += top / ((ux * ux + uy * uy + c1) * (vx + vy + c2))
    return total / (width * (rows - WINDOW + 1))


def ssim(reference: Image, other: Image) -> float:
    """``metrics.ssim`` of two images (rows, columns, 3) of one shape."""
    if min(reference.shape[:2]) < WINDOW:
        return metrics.ssim(reference, other)
    return float(_mean_ssim(reference, other, _WEIGHTS))
