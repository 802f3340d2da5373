"""One training run: network, optimiser, moving average, search tables, position in the schedule.

All of it is in a checkpoint, so that a run that stopped goes on as if it had not. Crops and rates
depend on the seed and the step alone (tools.train.loader), so the step is their random state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools.train.losses import distortion
from tools.train.machine import Machine
from tools.train.network import GAIN_STEPS_PER_OCTAVE, TileNetwork, gain_of
from tools.train.settings import NetworkSettings, TrainSettings
from wsicodec.entropy.tables import SymbolTables
from wsicodec.models.factors import LEADING

OUTLIER = 6.0
"""Batches whose gradient norm exceeds the recent median by this factor are skipped."""

NORMS = 200
"""Recent gradient norms kept, of low and of high rates."""

Array = np.ndarray[Any, Any]


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
    if any(not torch.equal(s["average"]["order"], first["average"]["order"]) for s in states):
        raise ValueError("only networks of one transform can be averaged")
    average = {
        k: (sum(s["average"][k].double() for s in states) / len(states)).to(v.dtype)
        for k, v in first["average"].items()
    }
    return {**{k: first[k] for k in ("network", "train", "step", "elapsed")}, "average": average}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a killed process leaves the old one or the new one."""
    part = path.with_suffix(path.suffix + ".part")
    torch.save(state, part)
    part.replace(path)


class Run:
    """``elapsed``: minutes of training, earlier calls included."""

    def __init__(
        self, settings: TrainSettings, network: NetworkSettings, machine: Machine | None = None
    ) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.machine = settings, machine or Machine()
        self.net = TileNetwork(network)
        self.net.float_type = self.machine.float_type
        self.step, self.elapsed = 0, 0.0
        self.average: dict[str, torch.Tensor] | None = None
        self.norms: dict[str, list[float]] = {"low": [], "high": []}

    def prepare(self) -> None:
        self.net = self.net.to(self.machine.device, memory_format=self.machine.memory_format)
        for name, weight in self.net.named_parameters():
            weight.requires_grad_(name.startswith(self.settings.only))
        learning = [p for p in self.net.parameters() if p.requires_grad]
        if not learning:
            raise ValueError(f"no weight's name begins with {self.settings.only!r}")
        self.optimiser = torch.optim.Adam(learning, lr=self.settings.lr)

    def state(self) -> dict[str, Any]:
        """A checkpoint: tensors, numbers and text, so that reading it runs no code."""
        search = self.net.search
        cuda = self.machine.device == "cuda"
        return {
            "network": self.net.settings.to_dict(),
            "train": self.settings.to_dict(),
            "weights": self.net.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "search": {
                "counts": torch.from_numpy(search.counts.copy()),
                "calls": search.calls,
                "radii": torch.from_numpy(search.tables.radii.copy()),
                "cdf": torch.from_numpy(search.tables.cdf.astype(np.int32)),
            },
            "norms": self.norms,
            "random": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state() if cuda else None,
            },
            "step": self.step,
            "elapsed": self.elapsed,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; what an averaged one lacks begins anew."""
        weights = state.get("weights") or state["average"]
        if "order" not in weights:
            raise ValueError("a checkpoint of another transform (no 'order') cannot go on")
        for kind, found in (
            ("with an analysis network", "analysis_out.weight" in weights),
            ("without a tilt", "tilt" not in weights),
        ):
            if found:
                raise ValueError(f"a checkpoint {kind} cannot go on; a new one can start from it")
        self.net.load_state_dict(weights)
        self.prepare()
        if state.get("optimiser"):
            self.optimiser.load_state_dict(state["optimiser"])
        if state.get("average"):
            self.average = {k: v.to(self.machine.device) for k, v in state["average"].items()}
        if state.get("search"):
            search, saved = self.net.search, state["search"]
            search.counts, search.calls = saved["counts"].numpy().copy(), saved["calls"]
            search.tables = SymbolTables(
                saved["radii"].numpy(), saved["cdf"].numpy().astype(np.uint16)
            )
        self.norms = state.get("norms") or self.norms
        self.step, self.elapsed = state["step"], state["elapsed"]
        random = state.get("random")
        if random and state["train"].get("seed") == self.settings.seed:
            torch.set_rng_state(random["cpu"])
            if self.machine.device == "cuda" and random["cuda"] is not None:
                torch.cuda.set_rng_state(random["cuda"])
        else:
            torch.manual_seed(self.settings.seed + self.step)

    def rates(self, count: int) -> tuple[bool, bool, Array, Array]:
        """(low rates, last stage coded, gain index, strength) of this step's ``count`` images."""
        s = self.settings
        rng = np.random.default_rng((s.seed, 0, self.step))
        low = bool(rng.random() < s.low_share)
        finest = not low or bool(rng.random() < s.finest_share)
        a, b = s.low_gain if low else s.high_gain
        if low and finest:
            a = max(a, min(b, s.finest_gain))
        elif low:
            b = min(b, max(a, s.coarse_gain))
        gain = rng.integers(a, b + 1, count).astype(np.float32)
        return low, finest, gain, rng.uniform(*s.strength, count).astype(np.float32)

    @property
    def progress(self) -> float:
        """Share of the schedule that is done."""
        s = self.settings
        return self.step / s.steps if s.steps else self.elapsed / s.minutes

    def one_step(self, pixels: Sequence[Array], progress: float) -> dict[str, float]:
        """Accumulate the gradients of some batches of images (n, 3, rows, columns) uint8, and make
        one step with their mean; returns means of what was measured."""
        s, device = self.settings, self.machine.device
        for group in self.optimiser.param_groups:
            group["lr"] = s.lr * learning_rate_factor(self.step, progress, s)
        self.optimiser.zero_grad(set_to_none=True)
        count = sum(len(p) for p in pixels)
        low, finest, gains, strengths = self.rates(count)
        stages = len(self.net.settings.stages) - (0 if finest else 1)
        log = dict.fromkeys(("loss", "bpp", "hyper", "psnr", "ssim"), 0.0)
        done = 0
        for images in pixels:
            part = slice(done, done + len(images))
            done += len(images)
            gain, strength = (torch.from_numpy(v[part]).to(device) for v in (gains, strengths))
            x = torch.from_numpy(images).to(device).float() - 128
            x = x.contiguous(memory_format=self.machine.memory_format)
            # a tilt makes most steps coarser: the gain makes up for it
            coarser = -self.net.tilted(1 - strength).detach()[:, :LEADING].mean(1)
            beside = torch.round(GAIN_STEPS_PER_OCTAVE * coarser)
            x_hat, rate = self.net(x, (gain + beside).clamp(0, 255), strength, stages)
            d, mse, ssim = distortion(x, x_hat, s.ssim_weight * strength)
            weighted = s.lagrange * gain_of(gain) ** 2 * d
            share = len(images) / count
            loss = ((rate.total + weighted) / (rate.total.detach() + 0.3)).mean() * share
            loss.backward()
            psnr = 10 * torch.log10(65025 / mse.detach().clamp_min(1e-3))
            log["loss"] += loss.item()
            for name, values in (
                ("bpp", rate.total), ("hyper", rate.hyper), ("psnr", psnr), ("ssim", ssim)
            ):  # fmt: skip
                log[name] += values.mean().item() * share
        norm = float(torch.nn.utils.clip_grad_norm_(self.net.parameters(), s.clip))
        key = "low" if low else "high"
        finite = math.isfinite(norm)
        self.norms[key] = norms = [*self.norms[key], *([norm] * finite)][-NORMS:]
        log |= {"low": float(low), "norm": norm}
        if finite and norm < OUTLIER * sorted(norms)[len(norms) // 2]:
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
            if v.is_floating_point():
                self.average[k].lerp_(v, 1 - decay)
