"""The encoder's choice of adaptive quantisation steps: finer where SSIM is sensitive.

SSIM counts an error of variance e within texture of variance v like ``e / (2 v + C2)`` (expand
Wang 2004, eq. 13, for noise uncorrelated with the reconstruction), so the step should grow with
the root of ``2 v + C2``. The steps travel as the first channel of hyper-latents; a decoder just
follows them, so this rule may change without a change of format or model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.entropy.compiled import compiled

STEP_UNIT = 4  # gain indices per unit
STEP_PEAK = 12  # units
REFERENCE = 660.0  # 2 v + C2 where the step is neutral
C2 = (0.03 * 255) ** 2

WINDOW = 8  # pixels whose luma variance is taken together

Array = npt.NDArray[Any]


@compiled
def _variances(pixels, variances):
    """Luma variance of each window of 8 x 8 pixels, (rows, columns) float64; past the image's edge
    the last row and column repeat."""
    height, width = pixels.shape[0], pixels.shape[1]
    for i in range(variances.shape[0]):
        for j in range(variances.shape[1]):
            total = np.float64(0)
            squares = np.float64(0)
            for a in range(WINDOW):
                line = pixels[min(WINDOW * i + a, height - 1)]
                for b in range(WINDOW):
                    p = line[min(WINDOW * j + b, width - 1)]
                    x = 0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2]
                    total += x
                    squares += x * x
            mean = total / WINDOW**2
            variances[i, j] = max(squares / WINDOW**2 - mean * mean, 0.0)


def adaptive_steps(pixels: Array, strength: float) -> npt.NDArray[np.int32]:
    """Units by which the gain rises, (rows / 32, columns / 32), rounded up.

    pixels: (rows, columns, 3). strength: 0 (uniform steps, best PSNR) ... 1.
    """
    rows, columns = -(-pixels.shape[0] // 32), -(-pixels.shape[1] // 32)
    if not strength:
        return np.zeros((rows, columns), np.int32)
    variances = np.empty((4 * rows, 4 * columns))
    _variances(pixels, variances)
    weight = (1 / (2 * variances + C2)).reshape(rows, 4, columns, 4).mean((1, 3))
    octaves = 0.5 * np.log2(REFERENCE * weight) * strength
    units = np.clip(np.rint(32 * octaves / STEP_UNIT), -STEP_PEAK, STEP_PEAK)
    steps: npt.NDArray[np.int32] = units.astype(np.int32)
    return steps
