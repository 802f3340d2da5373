"""Layers that are trained in float and run as integers (DESIGN: the exact entropy model).

A tensor of activations holds integers times a power of two, ``2**-exponent``; a weight row is an
int8 row times ``2**-k`` with its own ``k``. So every forward pass here *is* the integer network,
scaled by powers of two, and gradients pass through the roundings (straight-through estimator).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACCUMULATOR_BOUND = 2**22
"""Sums stay below this, so float32 holds them exactly in any order of summation."""

MAX_ROW_EXPONENT = 14


def straight_through(value: Tensor, gradient_of: Tensor) -> Tensor:
    """``value`` in the forward pass, the gradient of ``gradient_of`` in the backward pass."""
    return gradient_of + (value - gradient_of).detach()


def floor_at(x: Tensor, exponent: int) -> Tensor:
    """Round half up to multiples of ``2**-exponent``."""
    scale = float(2**exponent)
    return straight_through(torch.floor(x * scale + 0.5) / scale, x)


@dataclass(frozen=True)
class IntegerRows:
    """A layer as integers: ``y = clip(rint((W x + b) * 2**-shift), low, high)``."""

    weight: Tensor  # int8 values, (out, in, kh, kw)
    bias: Tensor  # int32 values, (out,)
    shift: Tensor  # >= 0, (out,)
    low: int
    high: int


class IntegerConv(nn.Module):
    """A convolution whose weights, activations and sums are bounded integers.

    in_exponent / out_exponent: powers of two of the input and output grids.
    in_peak: largest absolute integer of the input (255 for uint8, 127 for bounded signed).
    low, high: output clip as integers; (0, 255) is a ReLU on uint8.
    weight_peak: 127, or 63 where u8 x s8 kernels of CPUs without VNNI would saturate.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        *,
        in_exponent: int = 5,
        out_exponent: int = 5,
        in_peak: int = 255,
        low: int = 0,
        high: int = 255,
        weight_peak: int = 127,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(3))
        self.in_exponent, self.out_exponent = in_exponent, out_exponent
        self.in_peak, self.low, self.high = in_peak, low, high
        self.weight_peak = weight_peak
        self.exact = True  # False: in real numbers, to measure what the integers cost

    @torch.no_grad()
    def row_exponents(self) -> Tensor:
        """Largest ``k`` per row that keeps int8 weights, the sum's bound and ``shift >= 0``."""
        w = self.weight.detach().float()
        peak = w.abs().amax((1, 2, 3)).clamp_min(1e-9)
        total = w.abs().sum((1, 2, 3)) * self.in_peak
        b = self.bias.detach().float().abs() * 2.0**self.in_exponent
        # weights and bias may each round up by half a unit
        room = ACCUMULATOR_BOUND * 0.98 - 0.5 * self.in_peak * w[0].numel()
        by_peak = torch.floor(torch.log2((self.weight_peak + 0.49) / peak))
        by_sum = torch.floor(torch.log2(room / (total + b).clamp_min(1e-9)))
        k = torch.minimum(by_peak, by_sum)
        return k.clamp(max(0, self.out_exponent - self.in_exponent), MAX_ROW_EXPONENT)

    def quantised(self) -> tuple[Tensor, Tensor, Tensor]:
        """(weight, bias, k) on their integer grids, as float values, differentiable."""
        k = self.row_exponents()
        scale = torch.exp2(k)
        w = self.weight.float()
        s = scale.view(-1, 1, 1, 1)
        w_int = torch.round(w * s).clamp(-self.weight_peak, self.weight_peak)
        b_scale = scale * 2.0**self.in_exponent
        b = self.bias.float()
        b_int = torch.round(b * b_scale)
        return straight_through(w_int / s, w), straight_through(b_int / b_scale, b), k

    def forward(self, x: Tensor) -> Tensor:
        if not self.exact:
            y = F.conv2d(x, self.weight.float(), self.bias, padding=self.weight.shape[-1] // 2)
            scale = float(2**self.out_exponent)
            return y.clamp(self.low / scale, self.high / scale)
        w, b, _ = self.quantised()
        y = F.conv2d(x, w, b, padding=w.shape[-1] // 2)
        scale = float(2**self.out_exponent)
        y = straight_through(torch.round(y * scale) / scale, y)  # half to even, as ONNX rounds
        return y.clamp(self.low / scale, self.high / scale)

    @torch.no_grad()
    def rows(self) -> IntegerRows:
        """The layer as integers, for export."""
        w, b, k = self.quantised()
        shift = (k + self.in_exponent - self.out_exponent).to(torch.int64)
        weight = torch.round(w * torch.exp2(k).view(-1, 1, 1, 1)).to(torch.int64)
        bias = torch.round(b * torch.exp2(k) * 2.0**self.in_exponent).to(torch.int64)
        return IntegerRows(weight, bias, shift, self.low, self.high)
