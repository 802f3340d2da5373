"""Train the codec network: ``python -m tools.train --data DIR --out CHECKPOINT --minutes 30``.

The same command runs on CPU and CUDA, and goes on from ``--out`` when that file exists
(``--minutes`` is the length of the whole schedule). Progress goes to the terminal, one JSON line
per 50 steps to ``<out>.jsonl``. See tools/train/RECIPES.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tools.train.images import Sampler, load_sources, write_pack
from tools.train.klt import block_klt
from tools.train.losses import distortion
from tools.train.network import TileNetwork, gain_of
from tools.train.settings import NetworkSettings, TrainSettings

OUTLIER = 6.0
"""Batches whose gradient norm exceeds the recent median by this factor are skipped."""


def learning_rate_factor(step: int, progress: float, settings: TrainSettings) -> float:
    """Linear warm-up, constant, then a cosine from ``decay_from`` of the schedule on."""
    warm = min(1.0, (step + 1) / settings.warmup)
    start = settings.decay_from
    if progress < start:
        return warm
    return warm * (0.5 * (1 + math.cos(math.pi * min(1, (progress - start) / (1 - start)))) + 0.01)


def slim(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint to keep and to start from: the moving average alone, in float16 but for the
    transform, without what can be computed from it."""
    average = {
        k: v.cpu() if k in ("basis", "mean", "deviation") else v.cpu().half()
        for k, v in state["average"].items()
        if k != "inverse"
    }
    return {**{k: state[k] for k in ("network", "train", "step", "elapsed")}, "average": average}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a killed process leaves the old one or the new one."""
    part = path.with_suffix(path.suffix + ".part")
    torch.save(state, part)
    part.replace(path)


class Run:
    """One training run: network, optimiser, moving average and position in the schedule."""

    def __init__(self, settings: TrainSettings, network: NetworkSettings, device: str) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.device = settings, device
        self.net = TileNetwork(network)
        self.step, self.elapsed = 0, 0.0
        self.average: dict[str, torch.Tensor] | None = None
        self.norms: dict[float, list[float]] = {0.0: [], 1.0: []}

    def prepare(self) -> None:
        s = self.settings
        self.net = self.net.to(self.device, memory_format=torch.channels_last)
        self.optimiser = torch.optim.Adam(self.net.parameters(), lr=s.lr)

    def state(self) -> dict[str, Any]:
        return {
            "network": self.net.settings.to_dict(),
            "train": self.settings.to_dict(),
            "weights": self.net.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
        }

    def start_from(self, weights: dict[str, torch.Tensor], stages: dict[int, list[int]]) -> None:
        """Take over the weights that fit, from a network of other stages.

        stages: for each old stage the new ones that may begin with its weights.
        """
        mine = self.net.state_dict()
        renamed: dict[str, torch.Tensor] = {}
        for key, value in weights.items():
            if not key.startswith("stages."):
                renamed[key] = value
                continue
            _, index, rest = key.split(".", 2)
            for target in stages[int(index)]:
                name = f"stages.{target}.{rest}"
                wanted = mine[name].shape[1:2] if name in mine else None
                # a stage that lost its means sees magnitudes alone: the second half
                half = rest == "reduce.weight" and wanted and 2 * wanted[0] == value.shape[1]
                renamed[name] = value[:, value.shape[1] // 2 :] if half else value
        if "inverse" not in renamed:
            renamed["inverse"] = torch.linalg.pinv(renamed["basis"].double()).float()
        fitting = {k: v for k, v in renamed.items() if k in mine and mine[k].shape == v.shape}
        self.net.load_state_dict({**mine, **fitting})
        print(f"took over {len(fitting)} of {len(mine)} tensors")

    def resume(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["weights"])
        self.prepare()
        if state.get("optimiser"):
            self.optimiser.load_state_dict(state["optimiser"])
        if state.get("average"):
            self.average = {k: v.to(self.device) for k, v in state["average"].items()}
        self.step, self.elapsed = state["step"], state["elapsed"]

    def one_step(self, sampler: Sampler, progress: float) -> dict[str, float]:
        s, rng = self.settings, sampler.rng
        factor = learning_rate_factor(self.step, progress, s)
        for group in self.optimiser.param_groups:
            group["lr"] = s.lr * factor
        self.optimiser.zero_grad(set_to_none=True)
        log: dict[str, float] = {}
        low = rng.random() < s.low_share
        for _ in range(s.accumulate):
            a, b = s.low_gain if low else s.high_gain
            gain = torch.from_numpy(rng.integers(a, b + 1, s.batch)).float().to(self.device)
            x = torch.from_numpy(sampler.batch(s.batch)).to(self.device).float() - 128
            x = x.contiguous(memory_format=torch.channels_last)
            stages = len(self.net.settings.stages) - (1 if low else 0)
            strength = torch.from_numpy(rng.uniform(*s.strength, s.batch)).float().to(self.device)
            x_hat, rate = self.net(x, gain, strength, stages)
            d, mse, ssim = distortion(x, x_hat, s.ssim_weight * strength)
            weighted = s.lagrange * gain_of(gain) ** 2 * d
            loss = ((rate.total + weighted) / (rate.total.detach() + 0.3)).mean() / s.accumulate
            loss.backward()
            log = {
                "loss": loss.item() * s.accumulate,
                "bpp": rate.total.mean().item(),
                "hyper": rate.hyper.mean().item(),
                "psnr": (10 * torch.log10(65025 / mse.detach().clamp_min(1e-3))).mean().item(),
                "ssim": ssim.mean().item(),
                "low": float(low),
            }
        norm = float(torch.nn.utils.clip_grad_norm_(self.net.parameters(), s.clip))
        norms = self.norms[log["low"]] = [*self.norms[log["low"]][-199:], norm]
        log["norm"] = norm
        if math.isfinite(norm) and norm < OUTLIER * sorted(norms)[len(norms) // 2]:
            self.optimiser.step()
        else:
            log["skipped"] = 1.0
        self.step += 1
        self.update_average()
        return log

    @torch.no_grad()
    def update_average(self) -> None:
        decay = min(self.settings.ema, (1 + self.step) / (20 + self.step))
        now = self.net.state_dict()
        if self.average is None:
            self.average = {k: v.clone() for k, v in now.items()}
            return
        for k, v in now.items():
            self.average[k].lerp_(v, 1 - decay)


def train(arguments: argparse.Namespace) -> None:
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    settings = TrainSettings(
        minutes=arguments.minutes, batch=arguments.batch, seed=arguments.seed, lr=arguments.lr,
        ssim_weight=arguments.ssim_weight, lagrange=arguments.lagrange,
        accumulate=arguments.accumulate,
    )  # fmt: skip
    out = Path(arguments.out)
    previous = torch.load(out, map_location="cpu", weights_only=True) if out.exists() else None
    network = NetworkSettings.from_dict(previous["network"]) if previous else NetworkSettings()
    sources = load_sources(Path(arguments.data))
    run = Run(settings, network, device)
    sampler = Sampler(sources, settings.crop, settings.seed + (previous["step"] if previous else 0))
    if previous:
        run.resume(previous)
    else:
        run.net.start_from_klt(*block_klt(sampler, network.block, settings.chroma_weight))
        if arguments.start_from:
            state = torch.load(arguments.start_from, map_location="cpu", weights_only=True)
            run.start_from(state["average"], stage_names(state["network"]["stages"], network))
        run.prepare()
    megapixels = sum(i.shape[0] * i.shape[1] for s in sources for i in s.images) / 1e6
    print(f"{len(sources)} sources, {megapixels:.0f} Mpx, {device}, step {run.step}")
    print({k: round(v, 2) for k, v in run.net.kmac_per_pixel().items()}, flush=True)
    run.net.train()
    started, before = time.monotonic(), run.elapsed
    saved = run.elapsed
    smooth: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(out.with_suffix(".jsonl").open("a"))
        while run.elapsed < settings.minutes:
            log = run.one_step(sampler, run.elapsed / settings.minutes)
            run.elapsed = before + (time.monotonic() - started) / 60
            key = "low" if log["low"] else "high"
            for k in ("loss", "bpp", "hyper", "psnr", "ssim", "norm"):
                name = f"{k}.{key}"
                smooth[name] = 0.98 * smooth.get(name, log[k]) + 0.02 * log[k]
            if run.step % 50 == 0:
                row = {"step": run.step, "minutes": round(run.elapsed, 2)}
                row |= {k: round(v, 4) for k, v in smooth.items()}
                journal.write(json.dumps(row) + "\n")
                journal.flush()
                print(bar(run.elapsed / settings.minutes), row, flush=True)
            if run.elapsed - saved >= settings.checkpoint_minutes:
                save(out, run.state())
                saved = run.elapsed
    save(out, run.state())


def stage_names(old: Any, new: NetworkSettings) -> dict[int, list[int]]:
    """Stages of a new network that may begin with the weights of each old one: the same stage, or
    those of the same channels."""
    names = {}
    for i, stage in enumerate(old):
        same = [k for k, s in enumerate(new.stages) if tuple(s) == tuple(stage)]
        alike = [k for k, s in enumerate(new.stages) if tuple(s[:2]) == tuple(stage[:2])]
        names[i] = same or alike
    return names


def bar(share: float, width: int = 20) -> str:
    done = int(min(1, share) * width)
    return "[" + "#" * done + "." * (width - done) + "]"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.train", description=__doc__)
    parser.add_argument("--data", help="folder of images, or a pack made by --pack")
    parser.add_argument("--out", required=True, help="checkpoint; resumed when it exists")
    parser.add_argument("--start-from", metavar="CHECKPOINT", help="weights to begin with")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--lagrange", type=float, default=TrainSettings.lagrange)
    parser.add_argument("--ssim-weight", type=float, default=TrainSettings.ssim_weight)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--pack", metavar="MANIFEST", help="instead of training: pack --data into --out (.zip)"
    )
    parser.add_argument("--pack-mib", type=float, default=45)
    parser.add_argument(
        "--slim", metavar="CHECKPOINT", help="instead of training: write a small one to --out"
    )
    arguments = parser.parse_args(argv)
    if arguments.slim:
        state = torch.load(arguments.slim, map_location="cpu", weights_only=True)
        save(Path(arguments.out), slim(state))
        return 0
    if arguments.pack:
        size = int(arguments.pack_mib * 2**20)
        count = write_pack(Path(arguments.data), Path(arguments.pack), Path(arguments.out), size)
        print(f"{count} images packed")
        return 0
    if not arguments.data:
        parser.error("--data is needed to train")
    train(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
