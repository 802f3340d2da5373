"""A decoder model: architecture, integer tables and graphs, proved before first use."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.bitstream import MAX_TILT
from wsicodec.entropy.tables import SymbolTables
from wsicodec.errors import ModelError
from wsicodec.forking import renewed_after_fork
from wsicodec.models import container
from wsicodec.models.factors import MAX_FACTOR, TILT_PEAK, Factors, tilted
from wsicodec.models.fused import FusedModel
from wsicodec.models.lattice import PHASES
from wsicodec.models.networks import Cells, FusedCells, GraphCells, GraphSet, fused_model
from wsicodec.models.proof import (
    INT8,
    INT16,
    UINT8,
    Range,
    prove_integer,
    prove_quantised,
)
from wsicodec.models.session import GraphRunner, IntegerRunner, StageRunner

KIND = "decoder"
Z_PEAK = 127
CONTEXT_PEAK = 127
MEAN_PEAK = 1023
STEP_PEAK = 48
GAINS = 256
LAPPING_TOLERANCE = 1e-4
GAIN_PEAK = 2.0**16
MIN_DETERMINANT = 1e-3
COLOUR_PEAK = 2.0**4
LEVEL_PEAK = 2.0**10

Array = npt.NDArray[Any]


MAX_STAGES = 15


@dataclass(frozen=True)
class Stage:
    """Channels ``first`` ... ``first + count - 1`` on the positions of a lattice."""

    first: int
    count: int
    lattice: int

    @property
    def channels(self) -> slice:
        return slice(self.first, self.first + self.count)


@dataclass(frozen=True)
class Architecture:
    """Shape of a model; docs/format.md, "Model file", gives the meaning of each number."""

    block: int
    stages: tuple[Stage, ...]
    mean_stages: int
    context_channels: int
    z_channels: int
    hyper: int

    def __post_init__(self) -> None:
        if self.block != 16:
            raise ModelError(f"block of {self.block} pixels; this version decodes blocks of 16")
        if not 1 <= len(self.stages) <= MAX_STAGES:
            raise ModelError(f"a model has 1 ... {MAX_STAGES} stages")
        if not 0 <= self.mean_stages <= len(self.stages):
            raise ModelError("mean_stages is out of range")
        if not 1 <= self.z_channels <= 256 or not 1 <= self.hyper <= 512:
            raise ModelError("z_channels must be within 1 ... 256, hyper within 1 ... 512")
        # stages follow one another; those of a lattice go round its three parts
        done, k = 0, 0
        ends = []
        while k < len(self.stages):
            stage = self.stages[k]
            parts = self.stages[k : k + 3] if stage.lattice else (stage,)
            want = (1, 2, 3) if stage.lattice else (0,)
            if tuple(p.lattice for p in parts) != want or stage.count < 1 or stage.first != done:
                raise ModelError(f"stage {k} does not follow the stage before it")
            if any(p.channels != stage.channels for p in parts):
                raise ModelError(f"the lattices of stage {k} differ in channels")
            done += stage.count
            k += len(parts)
            ends.append((k, done))
        if done > 3 * self.block**2:
            raise ModelError("more latent channels than a block has samples")
        if self.context_channels not in [end for _, end in ends]:
            raise ModelError("context_channels must end with a stage")
        if self.channels_of(self.mean_stages) > self.context_channels:
            raise ModelError("stages with means must be context")
        if self.mean_stages and self.mean_stages not in [k for k, _ in ends]:
            raise ModelError("stages with means must end with a whole lattice")

    @property
    def channels(self) -> int:
        """Latent channels of all stages."""
        return self.channels_of(len(self.stages))

    def channels_of(self, stages: int) -> int:
        """Channels that the first ``stages`` stages code, on some positions at least."""
        return max((s.first + s.count for s in self.stages[:stages]), default=0)

    def seen(self, stage: int) -> int:
        """Channels of context that a stage sees."""
        return min(self.channels_of(stage), self.context_channels)

    @classmethod
    def from_header(cls, header: dict[str, Any]) -> Architecture:
        values = header.get("architecture")
        names = ("block", "mean_stages", "context_channels", "z_channels", "hyper")
        if not isinstance(values, dict) or set(values) != {*names, "stages"}:
            raise ModelError("model header has no proper architecture")
        stages = values["stages"]
        if not all(_is_int(values[n]) for n in names) or not isinstance(stages, list):
            raise ModelError("model architecture is not made of integers")
        if len(stages) > MAX_STAGES:
            raise ModelError(f"a model has 1 ... {MAX_STAGES} stages")
        parsed = []
        for stage in stages:
            if not isinstance(stage, list) or len(stage) != 3 or not all(map(_is_int, stage)):
                raise ModelError("a stage is not [first channel, channels, lattice]")
            if stage[2] >= len(PHASES):
                raise ModelError(f"lattice {stage[2]} is not defined")
            parsed.append(Stage(*stage))
        return cls(stages=tuple(parsed), **{n: values[n] for n in names})


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**16


class DecoderModel:
    """Everything that turns symbols into pixels. Immutable; safe to share between threads.

    factors: what symbols are multiplied by, for each tilt of a tile, 0 ... 16.
    """

    def __init__(self, file: container.ModelFile, *, fused: bool = True) -> None:
        """fused: run the networks as compiled programs where this machine can."""
        if file.header.get("kind") != KIND:
            raise ModelError(f"model file is of kind {file.header.get('kind')!r}, not {KIND!r}")
        name = file.header.get("name")
        if not isinstance(name, str) or not 1 <= len(name) <= 64:
            raise ModelError("model has no name")
        self.name, self.digest, self.header = name, file.digest, file.header
        a = self.architecture = Architecture.from_header(file.header)
        contexts, samples = a.context_channels, 3 * a.block**2
        self.tables = SymbolTables(
            file.tensor("table_radii", "int32", (None,)),
            file.tensor("table_cdf", "uint16", (None, None)),
        )
        self.z_classes = file.tensor("z_classes", "uint8", (GAINS, a.z_channels))
        with_means = a.channels_of(a.mean_stages)
        mean_factor = file.tensor("mean_factor", "int32", (with_means,)).astype(np.int64)
        context_factor = file.tensor("context_factor", "int32", (contexts,)).astype(np.int64)
        inverse_gain = file.tensor("inverse_gain", "float32", (a.channels,))
        tilt = np.zeros(a.channels, np.int8)
        if "tilt" in file.tensors:
            tilt = file.tensor("tilt", "int8", (a.channels,))
        self.order = file.tensor("order", "uint16", (a.channels,))
        self.colours = file.tensor("colours", "float32", (3, 3))
        self.mean = file.tensor("mean", "float32", (3,))
        self.lapping = file.tensor("lapping", "float32", (8, 8))
        if self.z_classes.min() < 1 or self.z_classes.max() > 127:
            raise ModelError("a class of hyper-latents is not within 1 ... 127")
        for factor in (mean_factor, context_factor):
            if factor.size and (factor.min() < 1 or factor.max() >= MAX_FACTOR):
                raise ModelError("an integer factor is out of range")
        if np.abs(tilt.astype(int)).max() > TILT_PEAK:
            raise ModelError("a model's tilt is out of range")
        if len(np.unique(self.order)) < a.channels or self.order.max() >= samples:
            raise ModelError("the order of latents is not one of frequencies")
        for floats, peak in (
            (inverse_gain, GAIN_PEAK), (self.colours, COLOUR_PEAK), (self.mean, LEVEL_PEAK)
        ):  # fmt: skip
            if not (np.abs(floats) <= peak).all():  # false for what is no number
                raise ModelError("a model tensor is not finite or out of range")
        if not abs(np.linalg.det(self.colours.astype(np.float64))) >= MIN_DETERMINANT:
            raise ModelError("the colours of the planes depend on one another")
        lapping = self.lapping.astype(np.float64)
        if not (
            np.isfinite(lapping).all()
            and np.abs(lapping @ lapping.T - np.eye(8)).max() <= LAPPING_TOLERANCE
        ):
            raise ModelError("the lapping matrix is not orthogonal")
        plain = Factors(mean_factor, context_factor, inverse_gain, np.zeros(a.channels, np.int64))
        self.factors = tuple(tilted(plain, tilt, share) for share in range(MAX_TILT + 1))
        self._graphs = file.graphs
        self._prove(file)
        self.graphs = self._graph_set()
        self._fused: FusedModel | None = None
        self._fused_tried = not fused
        self.renew()
        renewed_after_fork(self)

    def renew(self) -> None:
        """Wait for no thread that builds the programs: a forked process has it not."""
        self._lock = threading.Lock()

    def _graph_set(self, *, plain: bool = False) -> GraphSet:
        """The networks in onnxruntime. plain: in float32 and as they are written, which are built
        in half the time; to compare others with."""
        a, graphs = self.architecture, self._graphs
        given = {"eight_bit": not plain, "optimise": not plain}
        return GraphSet(
            IntegerRunner(graphs["hyper"], **given),
            [
                StageRunner(graphs[f"stage{k}"], stage.lattice, **given)
                for k, stage in enumerate(a.stages)
            ],
            GraphRunner(graphs["chain"], optimise=not plain),
            [a.seen(k) for k in range(len(a.stages))],
            a.mean_stages,
            a.context_channels,
        )

    @property
    def fused(self) -> FusedModel | None:
        """The networks as compiled programs, or None where onnxruntime runs them."""
        if not self._fused_tried:
            with self._lock:
                if not self._fused_tried:
                    a = self.architecture
                    self._fused = fused_model(
                        self._graphs, [s.lattice for s in a.stages], a.context_channels,
                        a.z_channels, a.hyper, self._graph_set(plain=True),
                    )  # fmt: skip
                    self._fused_tried = True
        return self._fused

    def cells(self, count: int, rows: int, columns: int) -> Cells:
        """The networks of ``count`` cells of a latent grid."""
        if self.fused is not None:
            return FusedCells(self.fused, count, rows, columns)
        return GraphCells(self.graphs, count, rows, columns)

    def _prove(self, file: container.ModelFile) -> None:
        """The integer proof of every graph that decides a probability, or ModelError."""
        a = self.architecture
        # h and step lie on a grid of twice the rows and columns of z
        prove_integer(
            file.graph("hyper"),
            {
                "z": Range.of(a.z_channels, -Z_PEAK, Z_PEAK),
                "plane": Range.of(1, 0, GAINS - 1, zoom=2),
            },
            {
                "h": Range.of(a.hyper, 0, 255, zoom=2),
                "step": Range.of(1, -STEP_PEAK, STEP_PEAK, zoom=2, kind=INT8),
            },
            f"{self.name}/hyper",
        )
        plane, h = Range.of(1, 0, GAINS - 1), Range.of(a.hyper, 0, 255)
        for k, stage in enumerate(a.stages):
            inputs = {"h": h, "plane": plane}
            if k:
                inputs["context"] = Range.of(a.seen(k), -CONTEXT_PEAK, CONTEXT_PEAK)
            outputs = {"class": Range.of(stage.count, 0, 127, kind=UINT8)}
            if k < a.mean_stages:
                outputs["mean"] = Range.of(stage.count, -MEAN_PEAK, MEAN_PEAK, kind=INT16)
            prove_integer(file.graph(f"stage{k}"), inputs, outputs, f"{self.name}/stage{k}")
        contexts = a.context_channels
        prove_quantised(file.graph("chain"), contexts + 1, contexts, f"{self.name}/chain")

    def graph_bytes(self, name: str) -> bytes:
        """An ONNX graph of the model, for export and inspection."""
        return self._graphs[name]


def load_decoder(data: bytes, *, fused: bool = True) -> DecoderModel:
    """A decoder model from its file's bytes, proved; ModelError says what is wrong."""
    return DecoderModel(container.parse(data), fused=fused)
