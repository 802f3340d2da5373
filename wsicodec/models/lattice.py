"""Lattices: which positions a stage codes, and graphs that compute nothing else.

A stage's graph gives its parameters at all positions; a lattice holds a quarter or half of them.
``lattice_graph`` rewrites a proved graph so that what follows its last 3x3 layer runs on the
lattice alone: that layer by a stride of 2, the others on slices. docs/format.md, "Learned payload".
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.models.proof import attributes, initializers

PHASES: tuple[tuple[tuple[int, int], ...], ...] = (
    (),
    ((0, 0),),
    ((1, 1),),
    ((0, 1), (1, 0)),
)
"""(row, column) parities of each lattice's parts, in coding order; lattice 0 is all positions."""


@functools.lru_cache(maxsize=64)
def lattice_positions(lattice: int, rows: int, columns: int) -> npt.NDArray[np.int32]:
    """Positions of a lattice in coding order, numbered row by row in the whole grid; read-only."""
    grid = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    parts = [grid[r::2, c::2].reshape(-1) for r, c in PHASES[lattice]] or [grid.reshape(-1)]
    positions = np.concatenate(parts)
    positions.flags.writeable = False
    return positions


def lattice_graph(graph_bytes: bytes, lattice: int) -> bytes:
    """A proved stage graph whose outputs are (N, channels, positions of the lattice).

    Graphs of layers that cannot be strided (DepthToSpace) are computed whole, then sliced.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load_model_from_string(graph_bytes)
    graph = model.graph
    constants = set(initializers(graph, "lattice"))
    for node in graph.node:
        if all(name in constants for name in node.input):
            constants.update(node.output)
    outputs = [o.name for o in graph.output]
    work = [n for n in graph.node if n.output[0] not in constants]
    strided = PHASES[lattice] and all(node.op_type != "DepthToSpace" for node in work)
    whole = _whole_tensors(work, constants, set() if strided else set(outputs))
    nodes = [n for n in graph.node if n.output[0] in constants or n.output[0] in whole]
    added: dict[str, Any] = {
        "//ends": np.array([2**31 - 1] * 2, np.int64),
        "//axes": np.array([2, 3], np.int64),
        "//steps": np.array([2, 2], np.int64),
        "//flat": np.array([0, 0, -1], np.int64),
    }
    flat: dict[str, list[str]] = {name: [] for name in outputs}
    for row, column in PHASES[lattice] or ((-1, -1),):
        mark = f"//{row}{column}" if row >= 0 else ""
        sliced: dict[str, str] = {}

        def on_lattice(name: str, mark: str = mark, sliced: dict[str, str] = sliced) -> str:
            if not mark or name in constants:
                return name
            if name not in whole:
                return name + mark
            if name not in sliced:
                sliced[name] = f"{name}{mark}/slice"
                arguments = [name, f"//start{mark}", "//ends", "//axes"]
                nodes.append(helper.make_node("Slice", [*arguments, "//steps"], [sliced[name]]))
            return sliced[name]

        if mark:
            added[f"//start{mark}"] = np.array([row, column], np.int64)
            for node in work:
                if node.output[0] in whole:
                    continue
                given = attributes(node)
                if _reaches(node):
                    given |= {"strides": [2, 2], "pads": [1 - row, 1 - column, 1, 1]}
                    inputs = list(node.input)
                else:
                    inputs = [on_lattice(name) for name in node.input]
                names = [name + mark for name in node.output]
                nodes.append(helper.make_node(node.op_type, inputs, names, **given))
        for name in outputs:
            source = on_lattice(name)
            shaped = f"{name}{mark}/flat"
            nodes.append(helper.make_node("Reshape", [source, "//flat"], [shaped]))
            flat[name].append(shaped)
    shapes = []
    for port in graph.output:
        kind = port.type.tensor_type
        final = f"{port.name}//"
        nodes.append(helper.make_node("Concat", flat[port.name], [final], axis=2))
        channels = kind.shape.dim[1].dim_value
        shapes.append(
            helper.make_tensor_value_info(final, kind.elem_type, ["batch", channels, "positions"])
        )
    new = [numpy_helper.from_array(v, n) for n, v in added.items()]
    rewritten = helper.make_graph(
        nodes, graph.name, list(graph.input), shapes, [*graph.initializer, *new]
    )
    result = helper.make_model(
        rewritten, opset_imports=list(model.opset_import), ir_version=model.ir_version
    )
    return bytes(result.SerializeToString())


def _reaches(node: Any) -> bool:
    """Whether a node is a 3x3 layer: those pad, 1x1 layers do not (proved)."""
    return node.op_type == "Conv" and any(attributes(node).get("pads", ()))


def _whole_tensors(work: list[Any], constants: set[str], outputs: set[str]) -> set[str]:
    """Tensors that are needed at all positions: ``outputs``, inputs of 3x3 layers, and what leads
    to them."""
    whole = set(outputs)
    produced = {name for node in work for name in node.output}
    for node in reversed(work):
        if _reaches(node) or any(name in whole for name in node.output):
            whole.update(name for name in node.input if name not in constants)
    # graph inputs are whole by nature
    whole.update(n for node in work for n in node.input if n not in produced | constants)
    return whole
