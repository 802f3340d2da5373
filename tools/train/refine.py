"""Correction of decoded pixels: residual blocks on a grid of four pixels (he-max).

Linear synthesis and the chain see blocks; what they leave, errors across block borders and texture
that follows its surroundings, is corrected where it shows. The network sees the decoded pixels,
what was decoded of the latents, the step and the tilt, which says how far the encoder aims at
squared error rather than SSIM; what it adds scales with the step, so it fades where the step is
small. It decides no probability: real arithmetic.

Source: residual blocks, He et al., CVPR 2016, without normalisation; grids of pixels in channels,
Shi et al., CVPR 2016.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 4
"""Pixels along a position of its grid."""

RATIO = 4
"""Positions of its grid along one of the latents: 16 pixels."""

CODED = 24
"""Channels, on its grid, of what was decoded of the latents."""

LEVEL = 32.0
"""Levels of pixels in a unit of its input."""

MIDDLE = 2.0
"""The step plane, in octaves, that is zero in its input."""


class Block(nn.Module):
    """x + conv(relu(conv(x))). Begins as little more than the identity."""

    def __init__(self, width: int, share: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.bias)
        with torch.no_grad():
            self.second.weight.mul_(share)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.second(F.relu(self.first(x)))
        return y


class Refinement(nn.Module):
    """width: channels of its blocks. contexts: leading latents that it sees."""

    def __init__(self, width: int, blocks: int, contexts: int) -> None:
        super().__init__()
        samples = 3 * SIDE**2
        self.coded = nn.Conv2d(contexts + 1, CODED * RATIO**2, 1)
        self.into = nn.Conv2d(samples + CODED + 2, width, 3, padding=1)
        self.blocks = nn.Sequential(*[Block(width, 0.2) for _ in range(blocks)])
        self.out = nn.Conv2d(width, samples, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, contexts: Tensor, plane: Tensor, tilt: Tensor) -> Tensor:
        """What is to be added to decoded pixels ``x`` (N, 3, 16 R, 16 C), RGB - 128.

        contexts: (N, contexts, R, C) as stages see them. plane: (N, 1, R, C) effective gain index
        in octaves. tilt: (N,) shares of the tilt.
        """
        octaves = plane - MIDDLE
        coded = F.pixel_shuffle(self.coded(torch.cat([contexts, octaves], 1)), RATIO)
        fine = F.interpolate(octaves, scale_factor=RATIO, mode="nearest")
        aim = (tilt.view(-1, 1, 1, 1) - 0.5).expand_as(fine)
        y = self.into(torch.cat([F.pixel_unshuffle(x / LEVEL, SIDE), coded, fine, aim], 1))
        y = self.out(self.blocks(y)) * torch.exp2(-fine - MIDDLE)
        return F.pixel_shuffle(y.float(), SIDE)

    def kmac_per_pixel(self) -> float:
        """Multiply-accumulates per pixel in thousands."""
        layers = [m for m in self.modules() if isinstance(m, nn.Conv2d) and m is not self.coded]
        fine = sum(m.weight.numel() for m in layers) / SIDE**2
        return (fine + self.coded.weight.numel() / (SIDE * RATIO) ** 2) / 1000
