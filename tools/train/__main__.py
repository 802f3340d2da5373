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
from tools.train.shipped import read_start

OUTLIER = 6.0
"""Batches whose gradient norm exceeds the recent median by this factor are skipped."""


def learning_rate_factor(step: int, progress: float, settings: TrainSettings) -> float:
    """Linear warm-up, constant, then a cosine from ``decay_from`` of the schedule on."""
    warm = min(1.0, (step + 1) / settings.warmup)
    start = settings.decay_from
    if progress < start:
        return warm
    return warm * (0.5 * (1 + math.cos(math.pi * min(1, (progress - start) / (1 - start)))) + 0.01)


def averaged(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of networks that went on from one checkpoint with different seeds.

    Their errors differ where their images did; the mean of the weights keeps what they agree on.
    """
    first = states[0]
    if any(s["network"] != first["network"] for s in states):
        raise ValueError("only networks of one shape can be averaged")
    average = {
        k: sum(s["average"][k].double() for s in states).to(v.dtype) / len(states)
        for k, v in first["average"].items()
    }
    return {**{k: first[k] for k in ("network", "train", "step", "elapsed")}, "average": average}


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

    def start_from(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's weights, also from a network of other stages or widths.

        A stage takes the weights of the old stage that codes the same channels. Wider layers keep
        the old rows and columns; their new columns start at zero, so they change nothing yet. A 1x1
        kernel begins as the centre of a larger one.
        """
        old, new = state["network"], self.net.settings
        weights = state["average"]
        sources = stage_sources(old["stages"], new)
        mine = self.net.state_dict()
        taken = 0
        for name, target in mine.items():
            source, segments = name, column_segments(name, old, new)
            if name.startswith("stages."):
                _, index, rest = name.split(".", 2)
                if int(index) not in sources:
                    continue
                source = f"stages.{sources[int(index)]}.{rest}"
                if rest == "middle.weight" and target.shape[1] > new.hyper + 1:
                    segments = (old["hyper"], old["context"], 1), (new.hyper, new.context, 1)
                elif rest == "middle.weight":
                    segments = (old["hyper"], 1), (new.hyper, 1)
                elif rest == "scale.weight":
                    segments = (old["middle"], 1), (new.middle, 1)
                elif rest == "reduce.weight" and source in weights:
                    inputs = weights[source].shape[1]
                    if int(index) < new.mean_stages:  # values beside their magnitudes
                        segments = (inputs // 2,) * 2, (target.shape[1] // 2,) * 2
            if source in weights and weights[source].dim() == target.dim():
                taken += take_over(target, weights[source].to(target), segments)
        self.net.load_state_dict(mine)
        print(f"took over {taken} of {len(mine)} tensors")

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
            run.start_from(read_start(Path(arguments.start_from)))
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


Segments = tuple[tuple[int, ...], tuple[int, ...]]
"""Widths of a layer's concatenated inputs, old and new."""


def column_segments(name: str, old: dict[str, Any], new: NetworkSettings) -> Segments | None:
    """Of layers that see the gain plane, or more, beside their input; None for others."""
    if name == "h_s.weight":
        return (old["hyper"], 1), (new.hyper, 1)
    if name in ("chain.0.weight", "h_a.0.weight"):
        return (old["context_channels"], 1), (new.context_channels, 1)
    if name == "analysis.0.weight":
        before = old["analysis_channels"], old["analysis"], 1
        return before, (new.analysis_channels, new.analysis, 1)
    return None


def take_over(
    target: torch.Tensor,
    source: torch.Tensor,
    segments: Segments | None,
) -> bool:
    """Copy a weight into one of the same or a wider layer; False where it does not fit.

    segments: widths of the concatenated inputs, old and new; the inputs are one segment by default.
    """
    if target.shape == source.shape:
        target.copy_(source)
        return True
    if target.dim() == 1:
        if len(source) > len(target):
            return False
        target[: len(source)] = source
        return True
    if target.dim() == source.dim() == 4 and target.shape[2:] == (1, 1):
        source = source[:, :, source.shape[2] // 2, source.shape[3] // 2, None, None]
    if target.dim() != 4 or target.shape[2:] != source.shape[2:]:
        return False
    old, new = segments or ((source.shape[1],), (target.shape[1],))
    if sum(old) != source.shape[1] or sum(new) != target.shape[1]:
        return False
    rows = min(len(source), len(target))
    begin, start = 0, 0
    for before, after in zip(old, new, strict=True):
        width = min(before, after)
        target[:rows, start + width : start + after] = 0
        target[:rows, start : start + width] = source[:rows, begin : begin + width]
        begin, start = begin + before, start + after
    return True


def stage_sources(old: Any, new: NetworkSettings) -> dict[int, int]:
    """For each stage of a new network the old one to begin with: the same, or one of the same
    channels."""
    sources = {}
    for k, stage in enumerate(new.stages):
        same = [i for i, s in enumerate(old) if tuple(s) == stage]
        alike = [i for i, s in enumerate(old) if tuple(s[:2]) == stage[:2]]
        if same or alike:
            sources[k] = (same or alike)[0]
    return sources


def bar(share: float, width: int = 20) -> str:
    done = int(min(1, share) * width)
    return "[" + "#" * done + "." * (width - done) + "]"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.train", description=__doc__)
    parser.add_argument("--data", help="folder of images, or a pack made by --pack")
    parser.add_argument("--out", required=True, help="checkpoint; resumed when it exists")
    parser.add_argument(
        "--start-from", metavar="FILE", help="weights to begin with: a checkpoint or a model"
    )
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
        "--average", nargs="+", metavar="CHECKPOINT",
        help="instead of training: the mean of runs that went on from one checkpoint, to --out",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.average:
        paths = arguments.average
        states = [torch.load(p, map_location="cpu", weights_only=True) for p in paths]
        save(Path(arguments.out), averaged(states))
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
