"""Trains the tissue network on one CPU core.

    nice -n 10 taskset -c 0 python -m tools.tissue.train --data ../shared/data --minutes 20 \\
        --out /tmp/tissue.pt

Sources marked ``held`` in ``labels.json`` are never read. The learning rate follows the share of
the time that is spent, so that a run takes what it was given on any machine (and two runs differ
in the number of their steps).
"""

from __future__ import annotations

import argparse
import collections
import math
import time
from pathlib import Path

import numpy as np
import torch

from tools.tissue.labels import GLASS, TISSUE, Labelled, load
from tools.tissue.network import TissueNet
from tools.tissue.synthetic import crop
from wsicodec.tissue.network import features

SIDE, BATCH = 160, 8
RATE = 4e-3
TISSUE_WEIGHT = 2.0  # a cell of tissue lost costs more than one of glass kept
EMA = 0.99


def coarse_label(label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Target and weight at half the resolution: tissue where any of four pixels is."""
    blocks = torch.nn.functional.unfold(label[:, None].float(), 2, stride=2)
    tissue = (blocks == TISSUE).any(1)
    glass = (blocks == GLASS).all(1)
    shape = (label.shape[0], label.shape[1] // 2, label.shape[2] // 2)
    weight = tissue * TISSUE_WEIGHT + glass * 1.0
    return tissue.float().view(shape), weight.view(shape)


def loss_of(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Weighted cross entropy and a Tversky term that dislikes lost tissue most."""
    target, weight = coarse_label(label)
    logits = logits[:, 0]
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, target, weight, reduction="sum"
    ) / weight.sum().clamp_min(1)
    known = (weight > 0).float()
    found = torch.sigmoid(logits) * known
    hit = (found * target).sum((1, 2))
    lost = ((known - found) * target).sum((1, 2))
    false = (found * (1 - target)).sum((1, 2))
    tversky = 1 - (hit + 20) / (hit + 0.7 * lost + 0.3 * false + 20)
    return entropy + 0.5 * tversky.mean()


def main() -> None:
    """Train and save the averaged weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    sources: dict[str, list[Labelled]] = collections.defaultdict(list)
    for item in load(arguments.data / "overviews", "train"):
        sources[item.source].append(item)
    print({name: len(items) for name, items in sources.items()}, flush=True)
    network = TissueNet()
    before = {"steps": 0, "minutes": 0.0}
    if arguments.start:
        before = torch.load(arguments.start, weights_only=True)
        network.load_state_dict(before["weights"])
    network = network.to(memory_format=torch.channels_last)
    print(sum(p.numel() for p in network.parameters()), "parameters", flush=True)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA), use_buffers=True
    )
    optimiser = torch.optim.AdamW(network.parameters(), RATE, weight_decay=1e-3)
    start, step, running = time.monotonic(), 0, 0.0
    while (spent := (time.monotonic() - start) / (60 * arguments.minutes)) < 1:
        rate = RATE * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * spent))
        for group in optimiser.param_groups:
            group["lr"] = rate
        pairs = [crop(rng, sources, SIDE) for _ in range(BATCH)]
        x = torch.from_numpy(np.stack([features(p[0], p[2]) for p in pairs]))
        x = x.contiguous(memory_format=torch.channels_last)
        label = torch.from_numpy(np.stack([p[1] for p in pairs]))
        loss = loss_of(network(x), label)
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        if torch.isfinite(norm):
            optimiser.step()
            average.update_parameters(network)
        running += loss.item()
        step += 1
        if step % 100 == 0:
            print(f"{step} steps, {60 * spent * arguments.minutes:.0f} s, loss {running / 100:.4f}",
                  flush=True)  # fmt: skip
            running = 0.0
            torch.save({"weights": average.module.state_dict(), "steps": step}, arguments.out)
    steps = before["steps"] + step
    minutes = before["minutes"] + (time.monotonic() - start) / 60
    weights = average.module.state_dict()
    torch.save({"weights": weights, "steps": steps, "minutes": minutes}, arguments.out)
    print(f"{steps} steps in {minutes:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
