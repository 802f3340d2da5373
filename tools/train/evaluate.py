"""Compare networks by entropies: ``python -m tools.train.evaluate --data VAL he-fast.wscm a.pt``.

The first network is the one that the others are measured against. Entropies of symbols that a
search found, not coded bytes: quick, kinder than files by a few per cent, and alike for all. Each
image gives the tiles at its two corners. BD-rates are means over images, in per cent.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.metrics import bd_rate, rate_at, ssim_db
from tools.train.images import load_sources
from tools.train.losses import ssim_luma
from tools.train.network import TileNetwork
from tools.train.settings import NetworkSettings
from tools.train.shipped import read_start
from tools.train.tables import fitted_tables

TILE = 256
GAINS = (12, 24, 36, 48, 60, 72, 84, 100)
LAST_STAGE_FROM = 72
"""Gain from which the last stage is coded; encoders choose by its worth."""
TABLES_FROM = (36, 60, 84)
"""Gains whose symbols the tables of the search are fitted to."""
TARGET_SSIM = 0.95

Point = tuple[float, float, float]
"""Bits per pixel, PSNR in dB, SSIM of luma."""


@dataclass(frozen=True)
class Aim:
    """What encoders aim at. strength: of the adaptive step; tilt: share of the network's."""

    strength: float
    tilt: float


AIMS = {"balanced": Aim(0.35, 1.0), "ssim": Aim(0.65, 0.25)}


def tiles_of(folder: Path) -> torch.Tensor:
    """(2 n, 3, 256, 256) RGB - 128 of n images of a folder: their first and last corners."""
    tiles = []
    for source in load_sources(folder):
        for image in source.images:
            tiles += [image[:TILE, :TILE], image[-TILE:, -TILE:]]
    pixels = np.stack(tiles).transpose(0, 3, 1, 2).astype(np.float32)
    return torch.from_numpy(pixels) - 128


def loaded(path: Path) -> tuple[TileNetwork, dict[str, Any]]:
    """The averaged network of a checkpoint or a model, and what else the file says."""
    state = read_start(path)
    net = TileNetwork(NetworkSettings.from_dict(state["network"]))
    average = {k: v.float() if v.is_floating_point() else v for k, v in state["average"].items()}
    net.load_state_dict(average)
    net.search.refresh = sys.maxsize
    return net.eval(), state


@torch.no_grad()
def curves_of(net: TileNetwork, tiles: torch.Tensor, aim: Aim, batch: int = 4) -> list[list[Point]]:
    """A rate-distortion curve of each pair of tiles."""
    every = len(net.settings.stages)

    def coded(x: torch.Tensor, gain: int) -> tuple[torch.Tensor, torch.Tensor]:
        values = (torch.full((len(x),), float(v)) for v in (gain, aim.strength, aim.tilt))
        g, strength, tilt = values
        stages = every if gain >= LAST_STAGE_FROM else every - 1
        x_hat, rates = net(x, g, strength, stages, tilt)
        return (x_hat + 128).round().clamp(0, 255) - 128, rates.total

    net.search.counts[:] = 0
    for gain in TABLES_FROM:
        coded(tiles[: 2 * batch], gain)
    net.search.tables = fitted_tables(net.search.counts)
    curves: list[list[Point]] = [[] for _ in range(len(tiles) // 2)]
    for gain in GAINS:
        rows = []
        for first in range(0, len(tiles), batch):
            x = tiles[first : first + batch]
            x_hat, bits = coded(x, gain)
            errors = ((x_hat - x) ** 2).mean((1, 2, 3))
            rows += list(zip(bits, errors, ssim_luma(x + 128, x_hat + 128), strict=True))
        for curve, pair in zip(curves, torch.tensor(rows).view(-1, 2, 3).mean(1), strict=True):
            curve.append((float(pair[0]), float(10 * torch.log10(65025 / pair[1])), float(pair[2])))
    return curves


def compared(first: list[list[Point]], other: list[list[Point]]) -> dict[str, float]:
    """Means over images of BD-rates and of the rate at the target SSIM against the first's."""

    def along(curve: list[Point], k: int) -> list[tuple[float, float]]:
        return [(p[0], ssim_db(p[2]) if k == 2 else p[1]) for p in curve]

    figures: dict[str, list[float]] = {"psnr": [], "ssim": [], "rate_at_target": []}
    for a, b in zip(first, other, strict=True):
        for name, k in (("psnr", 1), ("ssim", 2)):
            figures[name].append(bd_rate(along(a, k), along(b, k)).pchip)
        rates = (rate_at(along(c, 2), ssim_db(TARGET_SSIM)) for c in (b, a))
        figures["rate_at_target"].append(next(rates) / next(rates))
    return {name: float(np.nanmean(values)) for name, values in figures.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.train.evaluate", description=__doc__)
    parser.add_argument("networks", nargs="+", metavar="FILE", help="checkpoints or models")
    parser.add_argument("--data", required=True, type=Path, help="folder of validation images")
    parser.add_argument("--aim", choices=AIMS, default="balanced")
    parser.add_argument("--every", type=int, default=1, help="take every n-th image")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    tiles = tiles_of(arguments.data)
    pairs = tiles.view(-1, 2, *tiles.shape[1:])[:: arguments.every]
    tiles = pairs.reshape(-1, *tiles.shape[1:])
    found = []
    reference: list[list[Point]] | None = None
    for path in arguments.networks:
        net, state = loaded(Path(path))
        curves = curves_of(net, tiles, AIMS[arguments.aim])
        reference = reference or curves
        kmac = {k: round(v, 2) for k, v in net.kmac_per_pixel(len(net.settings.stages) - 1).items()}
        row = {"file": Path(path).name, "steps": state["step"], "minutes": state["elapsed"]}
        row |= {"kmac": kmac, "images": len(curves), **compared(reference, curves)}
        found.append({**row, "curves": curves})
        print(
            f"{row['file']}: {row['steps']} steps, {row['minutes']:.0f} min, kMAC {kmac}, "
            f"BD-rate PSNR {row['psnr']:+.2f} %, SSIM {row['ssim']:+.2f} %, at SSIM "
            f"{TARGET_SSIM} {row['rate_at_target']:.4f}", flush=True,
        )  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
