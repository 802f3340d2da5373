"""Dependent quantisation in training: the search that encoders make, with tables that follow it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.train.tables import TABLE_CLASSES, count_indices, fitted_tables
from wsicodec.codec.network import LANES_LOG2
from wsicodec.entropy.trellis import search_levels, split_levels

LANES = 1 << LANES_LOG2


def dependent_bits(level: Tensor, quantiser: Tensor, scale: Tensor) -> Tensor:
    """Bits of a level (in half steps) under a zero-mean normal distribution of standard deviation
    ``scale`` steps, cut at the middles between the quantiser's points."""
    m = level.abs()
    odd = quantiser > 0
    k = torch.where(odd, (m + 1).div(2, rounding_mode="floor"), m / 2)
    upper = torch.where(odd, torch.where(k > 0, k, k + 0.25), k + 0.5)
    lower = torch.where(odd, torch.where(k == 1, k - 0.75, k - 1), k - 0.5)
    lower = torch.where(k > 0, lower, -upper)
    mass = torch.special.ndtr(-lower / scale) - torch.special.ndtr(-upper / scale)
    return -torch.log2(mass.clamp_min(1e-9))


class DependentSearch:
    """Levels of a batch. The tables' code lengths follow the levels found so far.

    lagrange: bits that a squared error of one step is worth.
    """

    def __init__(self, lagrange: float = 8.0, refresh: int = 400) -> None:
        self.lagrange, self.refresh = lagrange, refresh
        self.counts = np.zeros((2, TABLE_CLASSES + 1, 129))
        self.calls = 0
        self.tables = fitted_tables(self.counts)

    def __call__(self, r: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """(levels, quantisers) of residuals ``r`` in steps, both (N, C, H, W).

        classes: whole numbers, 0 where nothing is coded.
        """
        # a value that is not a number would lead the search out of its tables
        values = torch.nan_to_num(r.detach().float()).clamp(-1e5, 1e5).cpu().contiguous().numpy()
        kinds = classes.detach().to(torch.uint8).cpu().contiguous().numpy()
        n, c = values.shape[:2]
        worth = np.full(c, self.lagrange, np.float32)
        tables = self.tables
        levels, quantisers = np.empty_like(values), np.empty_like(values)

        def one(i: int) -> Any:
            kind = kinds[i].reshape(c, -1)
            found = search_levels(values[i].reshape(c, -1), kind, worth, tables, LANES)
            indices, quantiser = split_levels(found, kind, LANES)
            levels[i] = found.reshape(levels[i].shape)
            quantisers[i] = quantiser.reshape(levels[i].shape)
            return count_indices(indices, quantiser, kind)

        threads = min(n, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                counts = list(pool.map(one, range(n)))
        else:
            counts = [one(i) for i in range(n)]
        self._learn(sum(counts))
        turn = lambda a: torch.from_numpy(a).to(r.device)  # noqa: E731
        return turn(levels), turn(quantisers)

    def _learn(self, counts: Any) -> None:
        self.counts += counts
        self.calls += 1
        if self.calls % self.refresh == 0:
            self.tables = fitted_tables(self.counts)
            self.counts *= 0.5
