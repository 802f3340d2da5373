"""How a run uses the machine that it is on: device, precision, processes.

Nothing of this travels in checkpoints, and nothing changes what is learned, but for rounding.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Machine:
    """device: "cpu" or "cuda". float_type: of the float network. workers: processes that draw
    crops."""

    device: str = "cpu"
    float_type: torch.dtype = torch.float32
    workers: int = 0

    @classmethod
    def of(
        cls, device: str = "auto", precision: str = "auto", workers: int | None = None
    ) -> Machine:
        """What to use where something is left open.

        bfloat16 on CUDA alone: on a CPU with AVX-512 BF16 it took 1.3 to 1.9 times as long as
        float32. Crops cost a CPU run a hundredth of its time; a fast device gets one process for
        every four cores, at most four, since the search of symbols needs the others.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        fast = device == "cuda"
        if precision == "auto":
            precision = "bfloat16" if fast else "float32"
        if workers is None:
            workers = max(1, min(4, cores() // 4)) if fast else 0
        return cls(device, PRECISIONS[precision], workers)

    @property
    def memory_format(self) -> torch.memory_format:
        """Channels last for tensor cores; on CPUs it was up to a tenth slower."""
        return torch.channels_last if self.device == "cuda" else torch.contiguous_format

    def prepare(self) -> None:
        """Set torch's switches. TF32 stays off: the eleven bits of its operands hold the integer
        networks' values but not the squares that SSIM is made of."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
