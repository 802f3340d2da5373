"""Every setting of a training run, in two frozen dataclasses that travel in the checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

DROPPED = frozenset(("analysis", "analysis_layers", "analysis_channels"))
"""Settings that older checkpoints and models name, of an encoder network that is no more."""


@dataclass(frozen=True)
class NetworkSettings:
    """Shape of the codec network. Channel counts are latents unless said otherwise.

    block: side of a block in pixels; one latent position covers ``block x block`` pixels.
    integer: False trains entropy networks and chain in real numbers, which cannot be exported: to
        measure what integers cost.
    lapped: blocks overlap by eight pixels on every side (tools.train.lapping).
    turned: colour planes are turned, image by image (wsicodec.codec.colours).
    stages: (first channel, channels, lattice) in coding order, channels from the strongest on.
        Lattices: 0 all positions, 1 even rows and columns, 2 odd rows and columns, 3 the rest.
    mean_stages: stages below this index predict a mean, the others a scale alone.
    context_channels: leading latents that later stages and the correction chain see.
    z_channels: hyper-latents, one per 2x2 latent positions.
    hyper, context, middle: widths of the integer entropy networks.
    chain: width of the int8 correction chain; chain_kernels: sides of its hidden layers' kernels.
    refine: width of the network that corrects pixels (tools.train.refine), 0 for none;
        refine_blocks: its residual blocks.
    """

    block: int = 16
    lapped: bool = True
    turned: bool = True
    integer: bool = True
    stages: tuple[tuple[int, int, int], ...] = (
        (0, 16, 1),
        (0, 16, 2),
        (0, 16, 3),
        (16, 48, 1),
        (16, 48, 2),
        (16, 48, 3),
        (64, 128, 1),
        (64, 128, 2),
        (64, 128, 3),
        (192, 576, 0),
    )
    mean_stages: int = 6
    context_channels: int = 192
    z_channels: int = 8
    hyper: int = 64
    context: int = 96
    middle: int = 192
    chain: int = 160
    chain_kernels: tuple[int, ...] = (1, 3)
    refine: int = 0
    refine_blocks: int = 3

    @property
    def latent_channels(self) -> int:
        return self.channels_of(len(self.stages))

    def channels_of(self, stages: int) -> int:
        """Channels that the first ``stages`` stages code."""
        return max((first + count for first, count, _ in self.stages[:stages]), default=0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NetworkSettings:
        values = {k: v for k, v in values.items() if k not in DROPPED}
        known = {f.name for f in fields(cls)}
        unknown = set(values) - known
        if unknown:
            raise ValueError(f"unknown network settings: {sorted(unknown)}")
        stages = tuple((int(a), int(b), int(c)) for a, b, c in values["stages"])
        kernels = tuple(int(k) for k in values["chain_kernels"])
        return cls(**{**values, "stages": stages, "chain_kernels": kernels})


@dataclass(frozen=True)
class TrainSettings:
    """How a network is fitted.

    minutes: wall-clock length of the whole schedule, resumed runs included.
    only: begin of the names of the weights that learn, "" for all: the others stay, and what comes
        before them is computed without gradients.
    steps: where not 0, its length in steps instead: equal training for networks of unequal speed.
    ssim_weight: 0 trains for squared error alone; 1 weighs the relative slopes of squared
        error and of 1 - SSIM(luma) alike. Each image's weight is this times its strength.
    strength: range of the adaptive step's strength, drawn per image; what it leaves to 1 is the
        image's share of the tilt.
    chroma_weight: of chroma errors in the transform's colour space, against luma's 1.
    lagrange: distortion weight at step 1; the weight at gain g is ``lagrange * g**2``, with the
        mean tilt of the leading latents in g.
    low_share: share of batches at low and middle rates.
    finest_share: share of those that are coded with the last stage, too.
    finest_gain: lowest gain of low-rate batches with the last stage.
    coarse_gain: highest gain of batches without it; encoders leave it out at low gains alone.
    """

    minutes: float = 30.0
    only: str = ""
    steps: int = 0
    batch: int = 8
    accumulate: int = 1
    crop: int = 256
    lr: float = 5e-4
    warmup: int = 200
    decay_from: float = 0.5
    lagrange: float = 5.0
    ssim_weight: float = 5.0
    strength: tuple[float, float] = (0.0, 1.0)
    chroma_weight: float = 0.75
    low_share: float = 0.88
    finest_share: float = 0.45
    finest_gain: int = 48
    coarse_gain: int = 84
    low_gain: tuple[int, int] = (8, 128)
    high_gain: tuple[int, int] = (120, 240)
    ema: float = 0.998
    clip: float = 0.5
    seed: int = 0
    checkpoint_minutes: float = 4.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
