"""The encoder's choice of adaptive quantisation steps: finer where SSIM is sensitive.

SSIM counts an error of variance e within texture of variance v like ``e / (2 v + C2)`` (expand
Wang 2004, eq. 13, for noise uncorrelated with the reconstruction), so the step should grow with
the root of ``2 v + C2``. The steps travel as the first channel of hyper-latents; a decoder just
follows them, so this rule may change without a change of format or model.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

STEP_UNIT = 4  # gain indices per unit
STEP_PEAK = 12  # units
REFERENCE = 660.0  # 2 v + C2 where the step is neutral
C2 = (0.03 * 255) ** 2
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def adaptive_steps(pixels: npt.NDArray[np.float32], strength: float) -> npt.NDArray[np.int32]:
    """Units by which the gain rises, (rows / 32, columns / 32).

    pixels: (rows, columns, 3), multiples of 32. strength: 0 (uniform steps, best PSNR) ... 1.
    """
    rows, columns = pixels.shape[0] // 32, pixels.shape[1] // 32
    windows = (pixels @ LUMA).reshape(rows, 4, 8, columns, 4, 8).astype(np.float64)
    variance = (windows**2).mean((2, 5)) - windows.mean((2, 5)) ** 2
    weight = (1 / (2 * np.maximum(variance, 0) + C2)).mean((1, 3))
    octaves = 0.5 * np.log2(REFERENCE * weight) * strength
    units = np.clip(np.rint(32 * octaves / STEP_UNIT), -STEP_PEAK, STEP_PEAK)
    steps: npt.NDArray[np.int32] = units.astype(np.int32)
    return steps
