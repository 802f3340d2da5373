"""The model's graphs in the form that batches run: everything between kernels in one call.

The proved graphs stay as they are; what surrounds them on a device (filling the gain plane,
cropping odd grids, choosing channels of context) joins them, so that no array leaves the device for
it. The correction chain, 8-bit levels with scales, becomes what the integer graphs are: float32
convolutions on integers, each followed by ``Round``, which every provider computes exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.errors import ModelError
from wsicodec.models.lattice import lattice_graph
from wsicodec.models.proof import FLOAT, INT8, OPSET, UINT8, attributes, initializers

Array = npt.NDArray[Any]
Port = tuple[str, int, Sequence[int | str]]
"""Name, element type and shape of an input or output."""

_LAST = 2**31 - 1


class Builder:
    """Collects nodes and constants of a graph. Names start with ``//``, which no model needs."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Array | Sequence[int] | float, kind: Any = None) -> str:
        """Name of a constant; sequences are int64."""
        from onnx import numpy_helper

        name = f"//c{len(self.constants)}"
        array = np.asarray(value, np.int64 if isinstance(value, Sequence) else kind)
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, kind: str, *inputs: str, name: str | None = None, **given: Any) -> str:
        """Name of a node's output, which is ``name`` where that is given."""
        from onnx import helper

        name = name or f"//n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **given))
        return name

    def cast(self, x: str, kind: int, name: str | None = None) -> str:
        return self.add("Cast", x, name=name, to=kind)

    def scalar(self, value: float) -> str:
        return self.constant(np.float32(value))  # type: ignore[arg-type]

    def reshape(self, x: str, shape: Sequence[int], name: str | None = None) -> str:
        return self.add("Reshape", x, self.constant(shape), name=name)

    def cut(self, x: str, axis: int, begin: int, end: int, name: str | None = None) -> str:
        """Entries ``begin`` ... ``end`` - 1 of an axis; a negative end counts from behind."""
        ports = [self.constant([n]) for n in (begin, end, axis)]
        return self.add("Slice", x, *ports, name=name)

    def graft(self, graph: Any, renamed: Mapping[str, str] | None = None) -> None:
        """Nodes and constants of another graph, whose inputs are tensors of this one by name.

        renamed: other names for its outputs.
        """
        renamed = renamed or {}
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [renamed.get(name, name) for name in names]
        self.nodes.extend(graph.node)
        self.constants.extend(graph.initializer)

    def model(self, inputs: Sequence[Port], outputs: Sequence[Port]) -> bytes:
        """The graph's bytes."""
        from onnx import helper

        def ports(given: Sequence[Port]) -> list[Any]:
            return [helper.make_tensor_value_info(n, kind, list(shape)) for n, kind, shape in given]

        graph = helper.make_graph(
            self.nodes, "batch", ports(inputs), ports(outputs), self.constants
        )
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8)
        return bytes(model.SerializeToString())


def _graph(data: bytes) -> Any:
    import onnx

    return onnx.load_model_from_string(data).graph


def hyper_graph(data: bytes, odd_rows: bool, odd_columns: bool) -> bytes:
    """From ``latents`` (N, Z, r, c) float32 within +-127 and ``gain`` (N, 1, 1, 1) float32 to
    ``features`` (N, hyper, R, C) float32, cropped, and ``step`` (N, 1, 2r, 2c) int8, not cropped.

    odd_rows, odd_columns: whether R = 2r - 1, C = 2c - 1.
    """
    graph = _graph(data)
    z = graph.input[0].type.tensor_type.shape.dim[1].dim_value
    h = graph.output[0].type.tensor_type.shape.dim[1].dim_value
    b = Builder()
    # the gain index everywhere on the doubled grid, by operators that need no shape
    nothing = b.add("Mul", b.cut("latents", 1, 0, 1), b.scalar(0))
    quarter = b.add("Add", nothing, "gain")
    four = b.add("Concat", *[quarter] * 4, axis=1)
    b.add("DepthToSpace", four, name="plane", blocksize=2, mode="CRD")
    b.add("Identity", "latents", name="z")
    b.graft(graph)
    rows = b.cut("h", 2, 0, -1 if odd_rows else _LAST)
    b.cut(rows, 3, 0, -1 if odd_columns else _LAST, name="features")
    return b.model(
        [("latents", FLOAT, ["batch", z, "r", "c"]), ("gain", FLOAT, ["batch", 1, 1, 1])],
        [("features", FLOAT, ["batch", h, "R", "C"]), ("step", INT8, ["batch", 1, "2r", "2c"])],
    )


def stage_graph(
    data: bytes, lattice: int, seen: int, contexts: int, places: Array | None
) -> tuple[bytes, list[str]]:
    """A stage at the positions of its lattice, and its inputs: ``h``, ``plane`` and, for ``seen``
    > 0, ``contexts`` channels of context, all float32 and (N, channels, R, C). It gives ``class``
    uint8 and perhaps ``mean`` int16, (N, channels, positions of the lattice).

    places: positions of the lattice on a grid of one row or column, of which runtimes cannot cut
    the parts that are empty; None for other grids.
    """
    graph = _graph(lattice_graph(data, lattice if places is None else 0))
    ports = {p.name: p for p in graph.input}
    b = Builder()
    inputs: list[Port] = [
        (n, FLOAT, ["batch", ports[n].type.tensor_type.shape.dim[1].dim_value, "R", "C"])
        for n in ("h", "plane")
    ]
    if seen:
        inputs.append(("real", FLOAT, ["batch", contexts, "R", "C"]))
        b.cut("real", 1, 0, seen, name="context")
    b.graft(graph)
    outputs: list[Port] = []
    for port in graph.output:
        kind = port.type.tensor_type
        name = port.name.removesuffix("//")
        if places is None:
            b.add("Identity", port.name, name=f"{name}/places")
        else:
            b.add("Gather", port.name, b.constant(places), name=f"{name}/places", axis=2)
        channels = kind.shape.dim[1].dim_value
        outputs.append((f"{name}/places", kind.elem_type, ["batch", channels, "places"]))
    return b.model(inputs, outputs), [name for name, _, _ in inputs]


def chain_graph(data: bytes) -> bytes:
    """The correction chain from ``levels``, what its ``context`` is, to ``correction``, uint8 (N,
    channels, R, C): channels not put last. The same levels as the 8-bit graph, by integers.
    """
    graph = _graph(data)
    constants = initializers(graph, "chain")
    b = Builder()
    levels = {"context": b.cast("levels", FLOAT)}
    # real numbers: a tensor of integers, and log2 of what an integer is worth (per row)
    reals: dict[str, tuple[str, Array]] = {}
    weights: dict[str, tuple[Array, Array]] = {}
    channels = graph.output[0].type.tensor_type.shape.dim[3].dim_value
    inputs = graph.input[0].type.tensor_type.shape.dim[1].dim_value
    result = ""
    for node in graph.node:
        name, source = node.output[0], node.input[0]
        if node.op_type == "DequantizeLinear" and source in constants:
            weights[name] = constants[source].astype(np.float32), _log2(constants[node.input[1]])
        elif node.op_type == "DequantizeLinear":
            zero = float(constants[node.input[2]].reshape(()))
            x = levels[source]
            x = b.add("Add", x, b.scalar(-zero)) if zero else x
            reals[name] = x, _log2(constants[node.input[1]].reshape(1))
        elif node.op_type == "Conv":
            x, worth = reals[source]
            (w, worth_w), (bias, _) = weights[node.input[1]], weights[node.input[2]]
            given = {k: v for k, v in attributes(node).items() if k != "auto_pad"}
            total = b.add("Conv", x, b.constant(w), b.constant(bias), **given)
            # transform-based kernels add errors below one half
            reals[name] = b.add("Round", total), worth + worth_w
        elif node.op_type == "QuantizeLinear":
            x, worth = reals[source]
            zero_point = constants[node.input[2]]
            limits, zero = np.iinfo(zero_point.dtype), float(zero_point.reshape(()))
            scale = np.exp2(worth - _log2(constants[node.input[1]].reshape(1)))
            x = b.add("Mul", x, b.constant(scale.astype(np.float32).reshape(1, -1, 1, 1)))
            x = b.add("Round", x)
            x = b.add("Add", x, b.scalar(zero)) if zero else x
            levels[name] = b.add("Clip", x, b.scalar(limits.min), b.scalar(limits.max))
        elif node.op_type == "Concat":
            levels[name] = b.add("Concat", *[levels[n] for n in node.input], axis=1)
        elif node.op_type == "Transpose":
            result = levels[source]
        else:
            raise ModelError(f"chain: operator {node.op_type} is not allowed")
    b.cast(result, UINT8, "correction")
    return b.model(
        [("levels", UINT8, ["batch", inputs, "R", "C"])],
        [("correction", UINT8, ["batch", channels, "R", "C"])],
    )


def _log2(scale: Array) -> Array:
    """Exponents of powers of two."""
    return np.frexp(scale.astype(np.float64))[1] - 1


def mosaic_graph(rows: int, columns: int) -> bytes:
    """Cells ``cell0`` ..., uint8 (N, height, width, 3), row by row, to one picture ``pixels``."""
    b = Builder()
    lines = []
    names = [f"cell{n}" for n in range(rows * columns)]
    for row in range(rows):
        parts = names[row * columns : (row + 1) * columns]
        lines.append(b.add("Concat", *parts, axis=2))
    b.add("Concat", *lines, name="pixels", axis=1)
    return b.model(
        [(n, UINT8, ["batch", f"h{n}", f"w{n}", 3]) for n in names],
        [("pixels", UINT8, ["batch", "height", "width", 3])],
    )
