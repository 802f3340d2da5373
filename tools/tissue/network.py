"""The network to train: a small U-Net at half the resolution of its input.

Input (N, 6, rows, columns): ``wsicodec.tissue.network.features``, 0 for glass, so that zero
padding looks like glass; rows and columns are multiples of 32.
Output (N, 1, rows / 2, columns / 2): logits of "holds tissue".
"""

from __future__ import annotations

import torch
from torch import nn

WIDTHS = (20, 32, 48, 64, 80)  # channels at strides 2, 4, 8, 16, 32


class Unit(nn.Module):
    """Convolution, batch normalisation, ReLU; ``groups`` as of the convolution."""

    def __init__(
        self, inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)))

    def folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and biases of one convolution that does both."""
        gain = self.norm.weight / torch.sqrt(self.norm.running_var + self.norm.eps)
        weight = self.conv.weight * gain[:, None, None, None]
        return weight, self.norm.bias - self.norm.running_mean * gain


def separable(inputs: int, outputs: int, stride: int = 1) -> list[Unit]:
    """A depthwise 3 x 3 and a pointwise convolution."""
    return [Unit(inputs, inputs, 3, stride, inputs), Unit(inputs, outputs, 1)]


class TissueNet(nn.Module):
    """See the module's text."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c, d, e = WIDTHS
        self.down = nn.ModuleList(
            nn.ModuleList(units)
            for units in (
                [Unit(6, a, 3, 2), Unit(a, a)],
                [Unit(a, b, 3, 2), *separable(b, b)],
                [*separable(b, c, 2), *separable(c, c)],
                [*separable(c, d, 2), *separable(d, d)],
                [*separable(d, e, 2), *separable(e, e), *separable(e, e)],
            )
        )
        self.up = nn.ModuleList(
            nn.ModuleList(units)
            for units in (
                [Unit(e + d, d, 1), *separable(d, d)],
                [Unit(d + c, c, 1), *separable(c, c)],
                [Unit(c + b, b, 1), *separable(b, b)],
                [Unit(b + a, a, 1), Unit(a, a)],
            )
        )
        self.head = nn.Conv2d(a, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for units in self.down:
            for unit in units:
                x = unit(x)
            skips.append(x)
        skips.pop()
        for units in self.up:
            x = torch.cat([nn.functional.interpolate(x, scale_factor=2.0), skips.pop()], 1)
            for unit in units:
                x = unit(x)
        return self.head(x)
