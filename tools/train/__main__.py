"""Train the codec network: ``python -m tools.train --data DIR --out CHECKPOINT --minutes 30``.

The same command runs on CPU and CUDA, and goes on from ``--out`` when that file exists
(``--minutes`` is the length of the whole schedule). SIGTERM and Ctrl-C write the checkpoint and end
with exit code 0. Progress goes to the terminal, one JSON line per 50 steps to ``<out>.jsonl``. See
tools/train/RECIPES.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from tools.train.colours import colour_matrix
from tools.train.images import CropSettings, Sampler, load_sources, write_pack
from tools.train.lapping import fitted_border
from tools.train.loader import Loader
from tools.train.machine import PRECISIONS, Machine
from tools.train.network import TileNetwork
from tools.train.run import Run, averaged, save
from tools.train.settings import NetworkSettings, TrainSettings
from tools.train.shipped import read_start
from tools.train.transform import band_statistics
from tools.train.warmstart import warm_start

ROW_STEPS = 50


def named_settings(pairs: list[str]) -> dict[type, dict[str, Any]]:
    """Settings by the class that they belong to, from NAME=VALUE, values as in JSON."""
    classes = TrainSettings, NetworkSettings, CropSettings
    found: dict[type, dict[str, Any]] = {cls: {} for cls in classes}

    def frozen(value: Any) -> Any:
        return tuple(frozen(v) for v in value) if isinstance(value, list) else value

    for pair in pairs:
        name, equals, value = pair.partition("=")
        owners = [cls for cls in classes if name in {f.name for f in fields(cls)}]
        if not owners or not equals:
            raise ValueError(f"not NAME=VALUE of a setting: {pair!r}")
        found[owners[0]][name] = frozen(json.loads(value))
    return found


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Names of the signals that have asked to stop; a second one stops at once."""
    received: list[str] = []

    def note(number: int, _: Any) -> None:
        received.append(signal.Signals(number).name)
        if len(received) > 1:
            raise KeyboardInterrupt

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def begin(net: TileNetwork, sampler: Sampler, chroma_weight: float, start: str | None) -> None:
    """Give a new network its first weights: the spread of the images' latents, or what a checkpoint
    or a model holds."""
    n = net.settings
    if start is None:
        border = fitted_border(sampler, chroma_weight).float() if n.lapped else None
        colours = torch.from_numpy(colour_matrix(chroma_weight)).float()
        variance, mean = band_statistics(sampler, colours, border, n.turned)
        net.start(variance, mean, colours, border)
        return
    state = read_start(Path(start))
    old = NetworkSettings.from_dict(state["network"])
    weights, afresh = warm_start(old, state["average"], n, net.state_dict())
    net.load_state_dict(weights)
    print(f"begins as {start}; afresh: {', '.join(afresh) or 'nothing'}")


def train(arguments: argparse.Namespace, stopped: list[str]) -> None:
    machine = Machine.of(arguments.device, arguments.precision, arguments.workers)
    machine.prepare()
    named = named_settings(arguments.set)
    settings = TrainSettings(
        minutes=arguments.minutes, batch=arguments.batch, seed=arguments.seed, lr=arguments.lr,
        ssim_weight=arguments.ssim_weight, lagrange=arguments.lagrange,
        accumulate=arguments.accumulate, **named[TrainSettings],
    )  # fmt: skip
    crops = CropSettings(**named[CropSettings])
    out = Path(arguments.out)
    previous = torch.load(out, map_location="cpu", weights_only=True) if out.exists() else None
    network = NetworkSettings.from_dict(
        previous["network"] if previous else NetworkSettings().to_dict() | named[NetworkSettings]
    )
    sources = load_sources(Path(arguments.data))
    run = Run(settings, network, machine)
    if previous:
        run.resume(previous)
    else:
        sampler = Sampler(sources, settings.crop, settings.seed, crops)
        begin(run.net, sampler, settings.chroma_weight, arguments.start_from)
        run.prepare()
    megapixels = sum(i.shape[0] * i.shape[1] for s in sources for i in s.images) / 1e6
    print(f"{len(sources)} sources, {megapixels:.0f} Mpx, {machine}, step {run.step}")
    print({k: round(v, 2) for k, v in run.net.kmac_per_pixel().items()}, flush=True)
    run.net.train()

    def checkpoint() -> None:
        if run.step:
            save(out, run.state() | {"crops": crops.to_dict()})

    before = saved = run.elapsed
    with (
        Loader(
            sources, settings.crop, settings.seed, crops, settings.batch, settings.accumulate,
            run.step, machine.workers,
        ) as loader,
        out.with_suffix(".jsonl").open("a") as journal,
    ):  # fmt: skip
        progress = Progress(journal)
        started = time.monotonic()
        while run.progress < 1 and not stopped:
            asked = time.monotonic()
            pixels = loader.step()
            waited = time.monotonic() - asked
            log = run.one_step(pixels, run.progress)
            run.elapsed = before + (time.monotonic() - started) / 60
            progress.add(run, log, sum(len(p) for p in pixels), waited)
            if run.elapsed - saved >= settings.checkpoint_minutes:
                checkpoint()
                saved = run.elapsed
    checkpoint()
    if stopped:
        print(f"{stopped[0]}: stopped at step {run.step}; the same command goes on from there")
    elif arguments.export:
        export(out, Path(arguments.data), Path(arguments.export))


class Progress:
    """Smoothed measurements, and how fast images are used up; a row of JSON per 50 steps.

    images_per_second is of the steps since the last row, waiting the share of their time in which
    crops were waited for.
    """

    def __init__(self, journal: Any) -> None:
        self.journal = journal
        self.smooth: dict[str, float] = {}
        self._begin()

    def _begin(self) -> None:
        self.since, self.images, self.waited = time.monotonic(), 0, 0.0

    def add(self, run: Run, log: dict[str, float], images: int, waited: float) -> None:
        key = "low" if log["low"] else "high"
        for k in ("loss", "bpp", "hyper", "psnr", "ssim", "norm"):
            name = f"{k}.{key}"
            self.smooth[name] = 0.98 * self.smooth.get(name, log[k]) + 0.02 * log[k]
        self.images += images
        self.waited += waited
        if run.step % ROW_STEPS:
            return
        seconds = max(time.monotonic() - self.since, 1e-9)
        row: dict[str, float] = {"step": run.step, "minutes": round(run.elapsed, 2)}
        row |= {k: round(v, 4) for k, v in self.smooth.items()}
        row |= {
            "images_per_second": round(self.images / seconds, 2),
            "waiting": round(self.waited / seconds, 3),
        }
        self.journal.write(json.dumps(row) + "\n")
        self.journal.flush()
        print(bar(run.progress), row, flush=True)
        self._begin()


def bar(share: float, width: int = 20) -> str:
    done = int(min(1, share) * width)
    return "[" + "#" * done + "." * (width - done) + "]"


def export(checkpoint: Path, data: Path, folder: Path) -> None:
    """Write the model files of a checkpoint, named for it."""
    from tools.export.__main__ import main as export_main

    paths = [str(checkpoint), "--data", str(data), "--out", str(folder)]
    export_main([*paths, "--name", checkpoint.stem])


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
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE",
        help="other settings of tools/train/settings.py or of crops (tools/train/images.py), "
        "values as in JSON: for ablations",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--precision", default="auto", choices=("auto", *PRECISIONS),
        help="of the float network; auto is bfloat16 on CUDA",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, help="processes that draw crops; by default none on a CPU"
    )
    parser.add_argument("--export", metavar="DIR", help="after the last step, write model files")
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
    if not arguments.data:
        parser.error("--data is needed")
    if arguments.pack:
        size = int(arguments.pack_mib * 2**20)
        count = write_pack(Path(arguments.data), Path(arguments.pack), Path(arguments.out), size)
        print(f"{count} images packed")
        return 0
    with stop_signals() as stopped:
        train(arguments, stopped)
    return 0


if __name__ == "__main__":
    sys.exit(main())
