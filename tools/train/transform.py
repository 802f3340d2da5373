"""The linear transform in training: colour planes, lapped blocks, cosines, turned colours.

All of it is orthonormal but for the colour matrix, and nothing in it is trained. ``lap`` and the
turn are the decoder's (docs/format.md, "Pixels").
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import dct
from torch import Tensor

from tools.train.images import Sampler
from tools.train.lapping import SIDE, lap
from wsicodec.codec.colours import TURN_STEP, best_turn, rotation

Array = np.ndarray[Any, Any]


def cosines(side: int = SIDE) -> Tensor:
    """(side, side): the orthonormal discrete cosine transform, rows are frequencies."""
    return torch.from_numpy(dct(np.eye(side), norm="ortho", axis=0)).float()


def _squares(device: torch.device) -> Tensor:
    """(256, 256): cosines of rows and columns of a block, both in (row, column) order."""
    line = cosines().to(device)
    return torch.kron(line, line)


def bands_of(planes: Tensor, border: Tensor | None) -> Tensor:
    """(N, 3, 256, rows, columns): frequencies of the blocks of planes (N, 3, height, width)."""
    blocks = F.pixel_unshuffle(planes if border is None else lap(planes, border), SIDE)
    n, _, rows, columns = blocks.shape
    flat = _squares(planes.device) @ blocks.reshape(n, 3, SIDE**2, rows * columns)
    return flat.view(n, 3, SIDE**2, rows, columns)


def planes_of(bands: Tensor, border: Tensor | None) -> Tensor:
    """The way back from ``bands_of``."""
    n, _, _, rows, columns = bands.shape
    flat = _squares(bands.device).T @ bands.reshape(n, 3, SIDE**2, rows * columns)
    planes = F.pixel_shuffle(flat.view(n, -1, rows, columns), SIDE)
    return planes if border is None else lap(planes, border.T)


def turns_of(bands: Tensor) -> Tensor:
    """(N, 3, 3): the rotation of each image's planes that its encoder would choose."""
    n = len(bands)
    with torch.no_grad():
        flat = bands.flatten(3)[:, :, 1:].transpose(1, 2)  # (N, 255, 3, positions)
        flat = flat - flat.mean(3, keepdim=True)
        covariance = (flat @ flat.transpose(2, 3) / flat.shape[3]).cpu().double().numpy()
        found = [rotation(best_turn(covariance[i], TURN_STEP)) for i in range(n)]
        return torch.from_numpy(np.stack(found)).to(bands)


def turned(bands: Tensor, turns: Tensor) -> Tensor:
    """Bands (N, 3, 256, rows, columns), their planes multiplied by (N, 3, 3)."""
    return (turns @ bands.flatten(2)).view(bands.shape)


def band_statistics(
    sampler: Sampler, colours: Tensor, border: Tensor | None, turning: bool, crops: int = 350
) -> tuple[Tensor, Tensor]:
    """(variance, mean): of the 768 bands of tissue, plane by plane, and of RGB - 128.

    turning: whether planes are turned.
    """
    images = [torch.from_numpy(sampler.batch(1)) for _ in range(crops)]
    mean = torch.stack([x.float().mean((0, 2, 3)) for x in images]).mean(0) - 128
    squares = torch.zeros(3 * SIDE**2, dtype=torch.float64)
    for x in images:
        planes = torch.einsum("ij,njhw->nihw", colours, x.float() - 128 - mean.view(1, 3, 1, 1))
        bands = bands_of(planes, border)
        if turning:
            bands = turned(bands, turns_of(bands))
        squares += (bands.double() ** 2).mean((0, 3, 4)).flatten() / crops
    return squares, mean
