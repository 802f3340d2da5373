"""Integer networks as lists of layers, read from proved graphs.

Only graphs of the forms that ``tools.export`` writes are taken: convolutions that are rounded,
scaled and clipped, Concat, Abs of the context, DepthToSpace behind a layer; and the 8-bit chain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.models.proof import INT8, INT16, UINT8, attributes, initializers

Array = npt.NDArray[Any]

HYPER_INPUTS = {"z": 128, "constant": 0}
STAGE_INPUTS = {"h": 0, "plane": 0, "context": 128, "magnitude": 0}
CHAIN_INPUTS = {"context": 128, "chain_plane": 128}
"""Buffers that networks read, and the level that stands for zero in them."""


class NotFusible(Exception):
    """A graph of another form than those that are taken; onnxruntime runs it."""


@dataclass(frozen=True)
class Part:
    """Channels of a buffer: what a convolution's input is made of."""

    buffer: str
    channels: int


@dataclass(frozen=True, eq=False)
class Layer:
    """``clip(rint((W * x + b) * scale), low, high) + zero`` into a buffer.

    weight: (outputs, channels of all parts, k, k) int8. phases: the outputs are 4 x 2 x 2 positions
    of a grid twice as fine (DepthToSpace, CRD).
    """

    parts: tuple[Part, ...]
    weight: Array
    bias: Array
    scale: Array
    low: int
    high: int
    zero: int
    wide: bool
    phases: bool
    buffer: str

    @property
    def phase_count(self) -> int:
        """Sets of positions that it writes to."""
        return 4 if self.phases else 1

    @property
    def outputs(self) -> int:
        return len(self.weight) // self.phase_count

    @property
    def reaches(self) -> bool:
        """Whether it reads more than the position itself."""
        return bool(self.weight.shape[-1] > 1)


@dataclass(frozen=True, eq=False)
class Network:
    """Layers in order, and which buffers are its outputs, by the graph's names."""

    layers: tuple[Layer, ...]
    outputs: Mapping[str, str]


def parse_graph(graph_bytes: bytes, name: str, inputs: Mapping[str, int]) -> Network:
    """The network of a proved graph. Raises NotFusible for another form.

    inputs: buffers that exist, by name, with the level that stands for zero.
    """
    return _Parser(graph_bytes, name, dict(inputs)).network()


class _Parser:
    def __init__(self, graph_bytes: bytes, name: str, zeros: dict[str, int]) -> None:
        import onnx

        self.graph = onnx.load_model_from_string(graph_bytes).graph
        self.name, self.zeros = name, zeros
        self.constants: dict[str, Array] = dict(initializers(self.graph, name))
        self.users: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for x in node.input:
                self.users.setdefault(x, []).append(node)
        self.parts: dict[str, tuple[Part, ...]] = {}
        self.layers: list[Layer] = []
        self.outputs: dict[str, str] = {}
        for port in self.graph.input:
            channels = port.type.tensor_type.shape.dim[1].dim_value
            self.parts[port.name] = self._port(port.name, channels)

    def _port(self, name: str, channels: int) -> tuple[Part, ...]:
        if self.name == "chain":
            return Part("context", channels - 1), Part("chain_plane", 1)
        if self.name == "hyper" and name == "plane":
            return (Part("constant", 1),)
        return (Part(name, channels),)

    def network(self) -> Network:
        ports = {o.name for o in self.graph.output}
        done: set[str] = set()
        for node in self.graph.node:
            output = node.output[0]
            if output in done or output in self.constants:
                continue
            if node.op_type == "Conv":
                done |= self._layer(node)
            elif node.op_type == "Concat" and attributes(node).get("axis") == 1:
                self.parts[output] = tuple(p for x in node.input for p in self._known(x))
            elif node.op_type == "Abs" and self._known(node.input[0])[0].buffer == "context":
                (part,) = self._known(node.input[0])
                self.parts[output] = (Part("magnitude", part.channels),)
            elif node.op_type == "Cast" and node.input[0] in self.constants:
                self.constants[output] = self.constants[node.input[0]]
            elif node.op_type == "DequantizeLinear":
                self._dequantise(node)
            elif node.op_type == "DepthToSpace" and output in self.parts:
                pass
            else:
                raise NotFusible(f"{self.name}: {node.op_type}")
        if self.name == "hyper":
            # what lies on the grid of hyper-latents is read once, and spread out at once
            for layer in self.layers:
                if layer.phases != any(p.buffer == "z" for p in layer.parts):
                    raise NotFusible("hyper: layers between grids")
        if set(self.outputs) != ports:
            raise NotFusible(f"{self.name}: outputs")
        return Network(tuple(self.layers), self.outputs)

    def _known(self, name: str) -> tuple[Part, ...]:
        if name not in self.parts:
            raise NotFusible(f"{self.name}: {name}")
        return self.parts[name]

    def _dequantise(self, node: Any) -> None:
        """Levels pass through; constants keep their integers, and their scale beside them."""
        source, scale = node.input[0], self.constants[node.input[1]].astype(np.float64)
        output = node.output[0]
        if source in self.constants:
            self.constants[output] = self.constants[source]
            self.constants[f"{output}//scale"] = scale
            return
        zero = int(self.constants[node.input[2]].reshape(()))
        parts = self._known(source)
        if any(self.zeros[p.buffer] != zero for p in parts):
            raise NotFusible(f"{self.name}: zero points")
        self.parts[output] = parts
        self.constants[f"{output}//scale"] = scale

    def _after(self, name: str) -> Any:
        """The one node that reads a tensor, or None."""
        users = self.users.get(name, [])
        return users[0] if len(users) == 1 else None

    def _layer(self, conv: Any) -> set[str]:
        """A convolution and what rounds, scales and clips it."""
        chain = [conv]
        while (node := self._after(chain[-1].output[0])) is not None and node.op_type in (
            "Round", "Mul", "Clip", "DepthToSpace", "Cast", "QuantizeLinear", "Transpose",
        ):  # fmt: skip
            chain.append(node)
            after = self._after(node.output[0])
            if node.op_type == "DepthToSpace" and after is not None and after.op_type != "Clip":
                break
        kinds = [n.op_type for n in chain[1:]]
        weight = self.constants[conv.input[1]]
        bias = self.constants[conv.input[2]].astype(np.int64)
        rows = len(weight)
        scale, low, high, zero, wide = np.ones(rows), 0, 255, 0, False
        shift = ["Round", "Mul", "Round", "Clip"]
        if kinds[:4] == shift:
            factor = self.constants[chain[2].input[1]].reshape(-1).astype(np.float64)
            scale = np.broadcast_to(factor, scale.shape)
            kinds = kinds[3:]
        elif kinds[:1] == ["QuantizeLinear"]:
            levels = self.constants[f"{conv.input[0]}//scale"]
            step = self.constants[chain[1].input[1]].astype(np.float64)
            scale = self.constants[f"{conv.input[1]}//scale"].reshape(-1) * levels / step
            zero = int(self.constants[chain[1].input[2]].reshape(()))
            low, high = -zero, 255 - zero
        elif kinds[:1] == ["Round"]:
            kinds = kinds[1:]
        else:
            raise NotFusible(f"{self.name}: {kinds}")
        allowed = (
            ["Clip"], ["Clip", "Cast"], ["Clip", "DepthToSpace"], ["DepthToSpace", "Clip", "Cast"],
            ["QuantizeLinear"], ["QuantizeLinear", "Transpose"],
        )  # fmt: skip
        if kinds not in allowed:
            raise NotFusible(f"{self.name}: {kinds}")
        for node in chain:
            if node.op_type == "Clip":
                low, high = (int(self.constants[x].reshape(())) for x in node.input[1:])
            if node.op_type == "Cast":
                to = attributes(node)["to"]
                if to not in (UINT8, INT8, INT16):
                    raise NotFusible(f"{self.name}: Cast")
            if node.op_type == "DepthToSpace":
                given = attributes(node)
                if given.get("mode") != b"CRD" or given["blocksize"] != 2 or len(weight) % 4:
                    raise NotFusible(f"{self.name}: DepthToSpace")
            if node.op_type == "Transpose" and list(attributes(node)["perm"]) != [0, 2, 3, 1]:
                raise NotFusible(f"{self.name}: Transpose")
        wide = low < 0 and not zero
        if not wide and (low + zero < 0 or high + zero > 255):
            raise NotFusible(f"{self.name}: more than 8 bits")
        parts = self._known(conv.input[0])
        # levels carry an offset, in the frame around the grid too: taken off once, in the bias
        first = 0
        for part in parts:
            taken = weight[:, first : first + part.channels].astype(np.int64).sum((1, 2, 3))
            bias = bias - self.zeros[part.buffer] * taken
            first += part.channels
        if first != weight.shape[1] or np.abs(bias).max() >= 2**31:
            raise NotFusible(f"{self.name}: channels")
        output = chain[-1].output[0]
        buffer = f"{self.name}/{len(self.layers)}"
        phases = "DepthToSpace" in kinds
        self.zeros[buffer] = zero
        self.layers.append(
            Layer(
                parts, weight.astype(np.int8), bias.astype(np.int32), scale.astype(np.float32),
                low, high, zero, wide, phases, buffer,
            )
        )  # fmt: skip
        self.parts[output] = (Part(buffer, self.layers[-1].outputs),)
        if output in {o.name for o in self.graph.output}:
            self.outputs[output] = buffer
        elif wide:
            raise NotFusible(f"{self.name}: signed levels between layers")
        return {name for node in chain for name in node.output}
