"""The encoder's analysis as one graph: blocks in, latents out.

An analysis network takes samples of blocks, their linear transform and the gain. All that lies
before its first nonlinearity is a linear map of the samples of one block, and so is the transform
itself: one matrix product gives both. ``folded_analysis`` writes the graph so, and leaves out the
latents that no stage will code. What it computes is the same but for the order of sums, which is
an encoder's own affair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.models.proof import attributes

Array = npt.NDArray[Any]
Matrix = npt.NDArray[np.float64]

OUTPUT = "correction"


@dataclass(frozen=True, eq=False)
class _Affine:
    """A tensor whose channels at a position are an affine map of the inputs' at that position.

    parts: by input, (channels, channels of the input). bias: (channels,).
    """

    parts: dict[str, Matrix]
    bias: Matrix

    def mapped(self, matrix: Matrix, bias: Matrix | float = 0.0) -> _Affine:
        parts = {name: matrix @ part for name, part in self.parts.items()}
        return _Affine(parts, matrix @ self.bias + bias)

    def scaled(self, scale: Matrix) -> _Affine:
        parts = {name: scale[:, None] * part for name, part in self.parts.items()}
        return _Affine(parts, scale * self.bias)


def _stacked(tensors: list[_Affine]) -> _Affine:
    widths = {name: part.shape[1] for t in tensors for name, part in t.parts.items()}
    parts = {
        name: np.concatenate(
            [t.parts.get(name, np.zeros((len(t.bias), width))) for t in tensors], axis=0
        )
        for name, width in widths.items()
    }
    return _Affine(parts, np.concatenate([t.bias for t in tensors]))


def _fold_node(node: Any, affine: dict[str, _Affine], constants: dict[str, Array]) -> bool:
    """Add the output of a node to what is affine or constant, where it is."""
    names = list(node.input)
    values = attributes(node)
    if node.op_type == "Cast" and names[0] in constants:
        constants[node.output[0]] = constants[names[0]].astype(np.float32)
        return True
    if node.op_type == "Concat" and values["axis"] == 1 and all(n in affine for n in names):
        affine[node.output[0]] = _stacked([affine[n] for n in names])
        return True
    if names[0] not in affine or not all(n in constants for n in names[1:]):
        return False
    first, others = affine[names[0]], [constants[n].astype(np.float64) for n in names[1:]]
    if node.op_type == "Mul" and others[0].size in (1, len(first.bias)):
        if others[0].size > 1 and others[0].shape[-3:] != (len(first.bias), 1, 1):
            return False
        affine[node.output[0]] = first.scaled(np.broadcast_to(others[0].ravel(), first.bias.shape))
        return True
    plain = {"strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1], "group": 1}
    if node.op_type == "Conv" and others[0].shape[2:] == (1, 1):
        if any(values.get(key, value) != value for key, value in plain.items()):
            return False
        bias = others[1] if len(others) > 1 else 0.0
        affine[node.output[0]] = first.mapped(others[0][:, :, 0, 0], bias)
        return True
    return False


class _Writer:
    """Nodes and constants of the graph that is written."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, array: Array) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, outputs, **attributes))

    def split(self, name: str, sizes: list[int], outputs: list[str]) -> None:
        """Cut a tensor along its channels."""
        where = self.constant(f"{name}_sizes", np.array(sizes, np.int64))
        self.node("Split", [name, where], outputs, axis=1)

    def finish(self, inputs: dict[str, int], channels: int) -> bytes:
        """The graph of these inputs, channels by name, and the output ``y``."""
        from onnx import TensorProto, helper

        def port(name: str, width: int) -> Any:
            grid: list[str | int | None] = ["batch", width, None, None]
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, grid)

        graph = helper.make_graph(
            self.nodes,
            "analysis",
            [port(name, width) for name, width in inputs.items()],
            [port("y", channels)],
            self.constants,
        )
        imports = [helper.make_opsetid("", 17)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=9)
        return bytes(model.SerializeToString())


def folded_analysis(
    graph: bytes, forward: npt.NDArray[np.float32], bias: npt.NDArray[np.float32], channels: int
) -> bytes:
    """ONNX graph of a whole analysis.

    graph: the network (blocks, linear, plane) -> correction of the leading latents, in steps.
    forward, bias: (all channels, samples) and (all channels,), the transform of blocks.
    channels: latents that are wanted.

    The graph takes ``blocks`` (N, samples, rows, columns), ``plane`` and ``step`` (N, 1, 1, 1), the
    gain index and its quantisation step, and gives ``y`` (N, channels, rows, columns).
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load_from_string(graph)
    ports = {i.name: i.type.tensor_type.shape.dim[1].dim_value for i in model.graph.input}
    affine = {name: _Affine({name: np.eye(n)}, np.zeros(n)) for name, n in ports.items()}
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    kept = [n for n in model.graph.node if not _fold_node(n, affine, constants)]
    read = sorted({name for node in kept for name in node.input} & affine.keys())
    if OUTPUT in affine:
        read.append(OUTPUT)

    g = _Writer()
    # the transform's rows, then those of what the rest of the network reads
    weights, biases = [forward[:channels].astype(np.float64)], [bias[:channels].astype(np.float64)]
    for name in read:
        parts, offset = affine[name].parts, affine[name].bias
        rows = parts.get("blocks", np.zeros((len(offset), forward.shape[1])))
        if (linear := parts.get("linear")) is not None:
            rows = rows + linear @ forward[: linear.shape[1]]
            offset = offset + linear @ bias[: linear.shape[1]]
        weights.append(rows)
        biases.append(offset)
    weight = np.concatenate(weights).astype(np.float32)[:, :, None, None]
    inputs = ["blocks", g.constant("fold_w", weight)]
    inputs.append(g.constant("fold_b", np.concatenate(biases).astype(np.float32)))
    g.node("Conv", inputs, ["fold"], kernel_shape=[1, 1])
    g.split("fold", [len(b) for b in biases], ["fold_y", *(f"fold_{name}" for name in read)])
    for name in read:
        plane = affine[name].parts.get("plane", np.zeros((len(affine[name].bias), 1)))
        factor = g.constant(f"{name}_factor", plane.astype(np.float32).reshape(1, -1, 1, 1))
        g.node("Mul", ["plane", factor], [f"{name}_plane"])
        g.node("Add", [f"fold_{name}", f"{name}_plane"], [name])

    corrected = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    change = OUTPUT
    if corrected > channels:
        if not _cut_rows(kept, constants, channels):
            change = "fold_cut"
            g_sizes = [channels, corrected - channels]
        corrected = channels
    for name in sorted({name for node in kept for name in node.input} & constants.keys()):
        g.constant(name, constants[name])
    g.nodes += kept
    if change != OUTPUT:
        g.split(OUTPUT, g_sizes, [change, "fold_left"])
    g.node("Mul", [change, "step"], ["fold_change"])
    if corrected < channels:
        g.split("fold_y", [corrected, channels - corrected], ["fold_low", "fold_high"])
        g.node("Add", ["fold_low", "fold_change"], ["fold_sum"])
        g.node("Concat", ["fold_sum", "fold_high"], ["y"], axis=1)
    else:
        g.node("Add", ["fold_y", "fold_change"], ["y"])

    return g.finish({"blocks": forward.shape[1], "plane": 1, "step": 1}, channels)


def transform_graph(forward: npt.NDArray[np.float32], bias: npt.NDArray[np.float32]) -> bytes:
    """ONNX graph of the transform alone: ``blocks`` (N, samples, rows, columns) to ``y``."""
    g = _Writer()
    weight = g.constant("w", forward[:, :, None, None])
    g.node("Conv", ["blocks", weight, g.constant("b", bias)], ["y"], kernel_shape=[1, 1])
    return g.finish({"blocks": forward.shape[1]}, len(forward))


def _cut_rows(nodes: list[Any], constants: dict[str, Array], channels: int) -> bool:
    """Leave the network's last convolution its first ``channels`` outputs; False where the network
    does not end with one."""
    last = next(node for node in nodes if OUTPUT in node.output)
    if last.op_type != "Conv" or not set(last.input[1:]) <= constants.keys():
        return False
    for i in range(1, len(last.input)):
        name = f"{last.input[i]}_cut"
        constants[name] = constants[last.input[i]][:channels]
        last.input[i] = name
    return True
