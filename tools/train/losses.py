"""Distortions of training: squared error over RGB and SSIM on BT.601 luma."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)


@functools.cache
def band_matrix(length: int, device: torch.device) -> Tensor:
    """(length - 10, length): a Gaussian window of 11, sigma 1.5, slid over the valid range.

    A matrix product, since one-channel convolutions with long kernels are slow on CPUs.
    """
    window = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = window / window.sum()
    matrix = torch.zeros(length - 10, length)
    for i in range(length - 10):
        matrix[i, i : i + 11] = window
    return matrix.to(device)


def ssim_luma(a: Tensor, b: Tensor) -> Tensor:
    """Mean SSIM per image: Gaussian window of 11, sigma 1.5, range 255 (Wang 2004). (N,)"""
    weights = torch.tensor(LUMA, device=a.device).view(1, 3, 1, 1)
    a, b = (a.float() * weights).sum(1, keepdim=True), (b.float() * weights).sum(1, keepdim=True)
    rows, columns = (band_matrix(n, a.device) for n in a.shape[-2:])

    def blur(t: Tensor) -> Tensor:
        return rows @ t @ columns.T

    stacked = blur(torch.cat([a, b, a * a, b * b, a * b], 0))
    ma, mb, aa, bb, ab = stacked.chunk(5)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    numerator = (2 * ma * mb + c1) * (2 * (ab - ma * mb) + c2)
    denominator = (ma**2 + mb**2 + c1) * (aa - ma**2 + bb - mb**2 + c2)
    return (numerator / denominator).mean((1, 2, 3))


def distortion(x: Tensor, x_hat: Tensor, ssim_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(distortion, squared error, SSIM) per image; distortion in units of squared error.

    ``mse * (1 + w * (1 - ssim) / sg(1 - ssim))``-like: both terms have the same relative slope,
    so the weight, (N,), means the same at every rate.
    """
    mse = ((x_hat.float() - x.float()) ** 2).mean((1, 2, 3))
    ssim = ssim_luma(x + 128, x_hat + 128)
    loss = 1 - ssim
    weight = (mse / loss.clamp_min(1e-5)).detach()
    return (mse + ssim_weight * weight * loss) / (1 + ssim_weight), mse, ssim
