"""Lapped blocks: an orthogonal filter across block borders, before the block transform.

A block transform cannot use what a block shares with its neighbours. A filter ``P`` on the 16
samples around each border, eight to either side, moves that into one of the two blocks; its
transpose behind the inverse transform undoes it, so that basis images fade out eight pixels within
the neighbours. Rows and columns alike; nothing crosses the edge of a tile.

Source: time-domain lapped transforms, Tran, Liang, Tu, IEEE Trans. Signal Proc. 51 (2003); the
start is the lapped orthogonal transform of Malvar and Staelin, IEEE Trans. ASSP 37 (1989). The odd
part is then fitted: the least bits for tissue at a given error, by reverse water-filling.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.fft import dct
from torch import Tensor

from tools.train.colours import colour_matrix
from tools.train.images import Sampler

HALF = 8
SIDE = 2 * HALF
QUALITIES = (28.0, 30.0, 32.0, 35.0, 38.0)
"""PSNRs (in the weighted colours) at which bits are counted, each against those of plain blocks."""

TOGETHER = 32
"""Crops whose patches go into one matrix product: many small ones take five times as long."""

Array = np.ndarray[Any, Any]


def border_filter(odd: Tensor) -> Tensor:
    """(16, 16) filter of the samples around a border; ``odd``: (8, 8) orthogonal, what is done to
    their antisymmetric half. Orthogonal; constants pass unchanged."""
    fold = _fold(odd.dtype)
    return fold @ torch.block_diag(torch.eye(HALF, dtype=odd.dtype), odd) @ fold


def odd_part(border: Tensor) -> Tensor:
    """(8, 8): what ``border_filter`` made a filter of, from the border outwards."""
    fold = _fold(torch.float64)
    return (fold @ border.double() @ fold)[HALF:, HALF:]


def _fold(dtype: torch.dtype) -> Tensor:
    """(16, 16): sums, then differences, of samples at equal distance from the border. Its own
    inverse."""
    eye = torch.eye(HALF, dtype=dtype)
    turned = eye.flip(0)
    return torch.cat([torch.cat([eye, turned], 1), torch.cat([turned, -eye], 1)]) / 2**0.5


def lapped_transform_start() -> Tensor:
    """(8, 8): the odd part that makes the lapped orthogonal transform of a block DCT."""
    eye = np.eye(HALF)
    cosine2 = dct(eye, type=2, norm="ortho", axis=0)
    cosine4 = dct(eye, type=4, norm="ortho", axis=0)
    return torch.from_numpy(np.ascontiguousarray(eye[::-1] @ cosine2.T @ cosine4 @ eye[::-1]))


def lapping_operator(border: Tensor, size: int) -> Tensor:
    """(size, size): the filter at every inner border of a line of ``size`` samples, a multiple of
    16."""
    count = size // SIDE - 1
    outer = torch.eye(HALF, dtype=border.dtype, device=border.device)
    return torch.block_diag(outer, *[border] * count, outer)


def lap(x: Tensor, border: Tensor) -> Tensor:
    """(..., rows, columns) images, filtered. The transpose of ``border`` undoes it."""
    rows, columns = (lapping_operator(border, n) for n in x.shape[-2:])
    return rows @ x @ columns.T


def patch_covariance(sampler: Sampler, side: int, chroma_weight: float, crops: int) -> Array:
    """Covariance of ``side x side`` patches, (row, column, colour) twice, in the space of
    ``colour_matrix``. Mirrored copies are added: no handedness."""
    colours = colour_matrix(chroma_weight).T.astype(np.float32)
    n = side * side * 3
    outer, total, count = np.zeros((n, n)), np.zeros(n), 0
    for start in range(0, crops, TOGETHER):
        parts = []
        for _ in range(start, min(start + TOGETHER, crops)):
            crop = (sampler.one().astype(np.float32) - 128) @ colours
            windows = np.lib.stride_tricks.sliding_window_view(crop, (side, side), axis=(0, 1))
            patches = windows[:: side - 4, :: side - 4].transpose(0, 1, 3, 4, 2)
            parts.append(patches.reshape(-1, n))
        patches = np.concatenate(parts)
        outer += patches.T @ patches
        total += patches.sum(0)
        count += len(patches)
    mean = (total / count).reshape(side, side, 3)
    mean = (mean + mean[:, ::-1]) / 2
    second = (outer / count).reshape((side, side, 3) * 2)
    second = (second + second[:, ::-1, :, :, ::-1]) / 2
    return np.asarray(second - np.multiply.outer(mean, mean))


def _bits(variance: Tensor, error: float) -> Tensor:
    """Bits per pixel of normal components at a mean squared error, by reverse water-filling."""
    values = variance.detach().clamp_min(1e-6).numpy()
    low, high = 0.0, float(values.max())
    for _ in range(50):
        level = (low + high) / 2
        if np.minimum(values, level).mean() < error:
            low = level
        else:
            high = level
    bits = 0.5 * torch.log2((variance.clamp_min(1e-6) / level).clamp_min(1)).sum()
    # at an equal error: what the components below the level give away is paid for by the others
    lost = variance.clamp(max=level).sum()
    return (bits + (lost - lost.detach()) / (2 * np.log(2) * level)) / SIDE**2


def block_covariance(covariance: Tensor, border: Tensor) -> Tensor:
    """(768, 768) of lapped blocks, (row, column, colour), from that of patches of 32 x 32."""
    line = torch.block_diag(border, border)[HALF : HALF + SIDE]
    once = torch.einsum("ia,jb,abcdef->ijcdef", line, line, covariance)
    return torch.einsum("kd,le,ijcdef->ijcklf", line, line, once).reshape(3 * SIDE**2, -1)


def fitted_border(
    sampler: Sampler, chroma_weight: float, crops: int = 350, rounds: int = 40
) -> Tensor:
    """The border filter (16, 16) after which cosines of normal tissue take the fewest bits."""
    patches = torch.from_numpy(patch_covariance(sampler, 2 * SIDE, chroma_weight, crops))
    errors = [65025 / 10 ** (p / 10) for p in QUALITIES]

    line = torch.from_numpy(dct(np.eye(SIDE), norm="ortho", axis=0))

    def cost(border: Tensor) -> list[Tensor]:
        c = block_covariance(patches, border).reshape((SIDE, SIDE, 3) * 2)
        c = torch.einsum("ua,abcdef,ud->ubcef", line, c, line)
        c = torch.einsum("vb,ubcef,ve->uvcf", line, c, line)
        _, turn = torch.linalg.eigh(c.detach().sum((0, 1)) - c[0, 0].detach())
        variance = torch.einsum("cp,uvcf,fp->uvp", turn, c, turn).flatten()
        return [_bits(variance, e) for e in errors]

    plain = [float(b) for b in cost(torch.eye(SIDE, dtype=patches.dtype))]
    start = lapped_transform_start()
    turn = torch.zeros(HALF, HALF, dtype=patches.dtype, requires_grad=True)
    optimiser = torch.optim.Adam([turn], lr=0.03)
    best, least = border_filter(start), float("inf")
    for _ in range(rounds):
        border = border_filter(start @ torch.linalg.matrix_exp(turn - turn.T))
        bits = cost(border)
        loss = torch.stack([b / p for b, p in zip(bits, plain, strict=True)]).mean()
        if float(loss.detach()) < least:
            best, least = border.detach(), float(loss.detach())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(
        f"lapped blocks: {least:.3f} of the bits of plain ones, for normal components", flush=True
    )
    return best
