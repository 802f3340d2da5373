"""Runs proved integer graphs on 8-bit kernels, where this machine's are exact.

The graphs that travel in model files are float32 convolutions on integers. Each of their layers,
``Conv -> Round -> Mul 2^-shift -> Round -> Clip``, is also one ``QLinearConv`` on 8-bit levels with
a scale of 1, which takes a fraction of the time on CPUs with 8-bit dot products. The result is the
same integer: sums are exact in int32, scaling by a power of two is exact in float32, and both round
half to even. Without such instructions (VNNI) the kernels add pairs of products in 16 bits and may
saturate; such machines keep the float32 graphs, and so does any graph of another form.

Between layers everything stays in 8 bits. Inputs come as 8-bit arrays (``EIGHT_BIT_INPUTS``);
signed ones, context integers, have 128 added, and their magnitudes come beside them.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.models.proof import attributes, initializers

Array = npt.NDArray[Any]

EIGHT_BIT_INPUTS = {"h": 0, "plane": 0, "context": 128, "magnitude": 128}
"""Inputs that come as uint8, and what was added to them."""
MAGNITUDE = "magnitude"


@functools.cache
def exact_kernels() -> bool:
    """True where 8-bit dot products are exact: x86 with VNNI, and 64-bit Arm."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return bool({"avx512_vnni", "avx_vnni"} & set(flags.split()))


def int8_graph(graph_bytes: bytes) -> bytes:
    """The same graph on 8-bit arrays and kernels where its layers have their form.

    graph_bytes: a graph that ``proof.prove_integer`` has proved, perhaps cut to a lattice. An
    output ``h`` becomes uint8; other outputs keep their types.
    """
    return _Rewriter(graph_bytes).result()


class _Rewriter:
    """Goes through a graph in order; keeps each tensor as 8-bit levels, as floats, or as both."""

    def __init__(self, graph_bytes: bytes) -> None:
        import onnx

        self.onnx = onnx
        self.model = onnx.load_model_from_string(graph_bytes)
        graph = self.graph = self.model.graph
        self.constants: dict[str, Array] = dict(initializers(graph, "int8"))
        for node in graph.node:
            if node.op_type == "Cast" and node.input[0] in self.constants:
                self.constants[node.output[0]] = self.constants[node.input[0]]
        self.users: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.nodes: list[Any] = []
        self.added: dict[str, Array] = {
            "//unit": np.array(1, np.float32),
            "//zero": np.array(0, np.uint8),
            "//middle": np.array(128, np.uint8),
            "//offset": np.array(128, np.float32),
        }
        self.levels: dict[str, tuple[str, int]] = {}  # tensor: its 8-bit name and offset
        self.floats: set[str] = {i.name for i in graph.input}
        for port in graph.input:
            if port.name in EIGHT_BIT_INPUTS:
                self.levels[port.name] = port.name, EIGHT_BIT_INPUTS[port.name]
                self.floats.discard(port.name)

    def result(self) -> bytes:
        helper, onnx = self.onnx.helper, self.onnx
        done: set[str] = set()
        for node in self.graph.node:
            if node.output[0] in done:
                continue
            layer = self._layer(node) if node.op_type == "Conv" else None
            if layer is not None:
                done |= {n.output[0] for n in layer}
                self._eight_bit(layer)
            elif not self._eight_bit_move(node):
                inputs = [self._float(name) for name in node.input]
                self._add(node.op_type, inputs, node.output[0], **attributes(node))
                self.floats.add(node.output[0])
        outputs = [self._output(port) for port in self.graph.output]
        used = {name for node in self.nodes for name in node.input}
        made = {name for node in self.nodes for name in node.output}
        inputs = []
        grids = {i.name: i for i in self.graph.input}
        if "context" in grids:
            magnitude = onnx.ValueInfoProto()
            magnitude.CopyFrom(grids["context"])
            magnitude.name = MAGNITUDE
            grids[MAGNITUDE] = magnitude
        for name, port in grids.items():
            if name in used:
                if name in EIGHT_BIT_INPUTS:
                    port.type.tensor_type.elem_type = onnx.TensorProto.UINT8
                inputs.append(port)
        constants = [t for t in self.graph.initializer if t.name in used]
        new = [
            onnx.numpy_helper.from_array(np.asarray(v), n)
            for n, v in self.added.items()
            if n in used and n not in made
        ]
        rewritten = helper.make_graph(
            self.nodes, self.graph.name, inputs, outputs, [*constants, *new]
        )
        result = helper.make_model(
            rewritten,
            opset_imports=list(self.model.opset_import),
            ir_version=self.model.ir_version,
        )
        return bytes(result.SerializeToString())

    def _add(self, kind: str, inputs: list[str], output: str, **given: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], **given))
        return output

    def _float(self, name: str) -> str:
        """The float32 form of a tensor, made from its levels where need be."""
        if name in self.floats or name not in self.levels:
            return name
        source, offset = self.levels[name]
        whole = f"{name}//real"
        if whole not in self.floats:
            self.floats.add(whole)
            cast = f"{name}//cast" if offset else whole
            self._add("Cast", [source], cast, to=self.onnx.TensorProto.FLOAT)
            if offset:
                self._add("Sub", [cast, "//offset"], whole)
        return whole

    def _eight(self, name: str) -> tuple[str, int]:
        """The 8-bit form of a tensor and its offset; of floats, of ``z`` and what is like it."""
        if name not in self.levels:
            self._add("Add", [name, "//offset"], f"{name}//up")
            self._add("Cast", [f"{name}//up"], f"{name}//u8", to=self.onnx.TensorProto.UINT8)
            self.levels[name] = f"{name}//u8", 128
        return self.levels[name]

    def _eight_bit_move(self, node: Any) -> bool:
        """Operators that only move levels, on levels."""
        output = node.output[0]
        kind = node.op_type
        sources = node.input if kind == "Concat" else node.input[:1]
        known = [self.levels.get(name) for name in sources]
        if kind == "Abs" and node.input[0] == "context":
            self.levels[output] = MAGNITUDE, EIGHT_BIT_INPUTS[MAGNITUDE]
            return True
        if kind == "Cast" and known[0] and attributes(node)["to"] == self.onnx.TensorProto.UINT8:
            if known[0][1]:
                return False
            self.levels[output] = known[0]
            return True
        if kind not in ("Concat", "Slice", "Reshape", "DepthToSpace", "Transpose"):
            return False
        offsets = {entry[1] for entry in known if entry}
        if None in known or len(offsets) != 1:
            return False
        names = [entry[0] for entry in known if entry]
        inputs = [*names, *list(node.input)[len(names) :]]
        self._add(kind, inputs, f"{output}//u8", **attributes(node))
        self.levels[output] = f"{output}//u8", offsets.pop()
        return True

    def _layer(self, conv: Any) -> list[Any] | None:
        """[Conv, Round, Mul, Round, Clip] when nothing else reads what lies between, or None."""
        outputs = {o.name for o in self.graph.output}
        if conv.input[0] in self.floats and conv.input[0] != "z":
            return None
        chain = [conv]
        for wanted in ("Round", "Mul", "Round", "Clip"):
            name = chain[-1].output[0]
            following = self.users.get(name, [])
            if len(following) != 1 or following[0].op_type != wanted or name in outputs:
                return None
            chain.append(following[0])
        low, high = (float(self.constants[name].reshape(())) for name in chain[-1].input[1:])
        return chain if low >= 0 and high <= 255 else None

    def _eight_bit(self, layer: list[Any]) -> None:
        """QLinearConv, and Clip where it is not that of 8 bits, in place of a layer."""
        conv, _, scaling, _, clip = layer
        stem, output = conv.output[0], clip.output[0]
        source, offset = self._eight(conv.input[0])
        shift = self.constants[scaling.input[1]].reshape(-1).astype(np.float32)
        bias = self.constants[conv.input[2]].astype(np.int32)
        self.added[f"{stem}//w"] = self.constants[conv.input[1]].astype(np.int8)
        self.added[f"{stem}//b"] = bias
        self.added[f"{stem}//s"] = np.broadcast_to(shift, bias.shape).copy()
        self.added[f"{stem}//z"] = np.zeros(len(bias), np.int8)
        zero = "//middle" if offset else "//zero"
        operands = [
            source,
            "//unit",
            zero,
            f"{stem}//w",
            f"{stem}//s",
            f"{stem}//z",
            "//unit",
            "//zero",
        ]
        result = self._add(
            "QLinearConv", [*operands, f"{stem}//b"], f"{stem}//q", **attributes(conv)
        )
        bounds = [float(self.constants[name].reshape(())) for name in clip.input[1:]]
        if bounds != [0, 255]:
            for name, value in zip(("low", "high"), bounds, strict=True):
                self.added[f"{stem}//{name}"] = np.array(value, np.uint8)
            result = self._add("Clip", [result, f"{stem}//low", f"{stem}//high"], f"{stem}//c")
        self.levels[output] = result, 0

    def _output(self, port: Any) -> Any:
        """The graph's output, under its own name."""
        uint8 = self.onnx.TensorProto.UINT8
        entry = self.levels.get(port.name)
        if entry and entry[1] == 0:
            self._add("Identity", [entry[0]], port.name)
            port.type.tensor_type.elem_type = uint8
        elif port.name not in self.floats:
            self._add("Identity", [self._float(port.name)], port.name)
        return port
