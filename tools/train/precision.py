"""Where bfloat16 may be used: in the float network (h_a), never in the integer ones.

Integer networks are exact integers in float32, with sums up to 2^22; eight bits of bfloat16 would
give other symbols than decoders get.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def arithmetic(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """What the layers of the float network are computed in; float32 is plain arithmetic."""
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)


def exact(forward: F) -> F:
    """A module's ``forward`` in float32, whatever the caller has set: its tensors too."""

    def whole(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) else value

    @functools.wraps(forward)
    def run(self: Any, first: Tensor, *others: Any, **named: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            named = {name: whole(value) for name, value in named.items()}
            return forward(self, whole(first), *(whole(o) for o in others), **named)

    return cast(F, run)
