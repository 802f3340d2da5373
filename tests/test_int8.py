"""The 8-bit form of the integer graphs gives what the float32 form gives, to the bit, and graphs
cut to a lattice give what whole ones give there."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from wsicodec.models import container, find_model, int8, session
from wsicodec.models.lattice import PHASES, lattice_graph, lattice_positions
from wsicodec.models.session import GraphRunner, IntegerRunner, StageRunner

SHIPPED = container.parse(find_model("he-fast").path.read_bytes())
INTEGER = sorted(name for name in SHIPPED.graphs if name != "chain")
STAGES = [(f"stage{k}", s[2]) for k, s in enumerate(SHIPPED.header["architecture"]["stages"])]
ON_LATTICES = {
    "hyper": SHIPPED.graphs["hyper"],
    **{name: lattice_graph(SHIPPED.graphs[name], lattice) for name, lattice in STAGES},
}
"""The graphs as they run."""

Inputs = dict[str, np.ndarray]


def inputs_of(
    graph: bytes, rng: np.random.Generator, grid: tuple[int, int], extreme: bool
) -> Inputs:
    """Inputs of the float32 form, as the format has them."""
    inputs = {}
    for port in GraphRunner(graph).session().get_inputs():
        low, high = (-127, 127) if port.name in ("context", "z") else (0, 255)
        shape = tuple(n // 2 for n in grid) if port.name == "z" else grid
        x = rng.integers(low, high + 1, (2, port.shape[1], *shape)).astype(np.float32)
        inputs[port.name] = np.where(x > 0, np.float32(high), np.float32(low)) if extreme else x
    return inputs


def eight_bit(inputs: Inputs) -> Inputs:
    """The same inputs as runners take them: z in float32, all others uint8."""
    found = {}
    for name, x in inputs.items():
        if name == "z":
            found[name] = x
        elif name == "context":
            found[name] = (x + 128).astype(np.uint8)
            found["magnitude"] = (abs(x) + 128).astype(np.uint8)
        else:
            found[name] = x.astype(np.uint8)
    return found


def run_eight_bit(graph: bytes, inputs: Inputs) -> list[np.ndarray]:
    """The 8-bit form, which may do without some of the inputs."""
    runner, given = GraphRunner(graph), eight_bit(inputs)
    return runner({port.name: given[port.name] for port in runner.session().get_inputs()})


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """The same integers; an output in float32 (h) may come as uint8."""
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == (np.uint8 if b.dtype == np.float32 else b.dtype)
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(not int8.exact_kernels(), reason="this CPU has no exact 8-bit dot products")
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", INTEGER)
def test_both_forms_agree(name: str, cut: bool, extreme: bool) -> None:
    graph = (ON_LATTICES if cut else SHIPPED.graphs)[name]
    for grid in ((10, 10), (2, 6), (4, 4)):
        inputs = inputs_of(graph, np.random.default_rng(1), grid, extreme)
        assert_same(run_eight_bit(int8.int8_graph(graph), inputs), GraphRunner(graph)(inputs))


def test_8_bit_graphs_take_8_bit_arrays() -> None:
    for name in INTEGER:
        model = onnx.load_model_from_string(int8.int8_graph(ON_LATTICES[name]))
        for port in model.graph.input:
            kind = onnx.TensorProto.FLOAT if port.name == "z" else onnx.TensorProto.UINT8
            assert port.type.tensor_type.elem_type == kind, port.name
        for port in model.graph.output:
            assert port.type.tensor_type.elem_type != onnx.TensorProto.FLOAT, port.name


def test_every_hidden_layer_has_an_8_bit_form() -> None:
    for name in INTEGER:
        for graphs in (SHIPPED.graphs, ON_LATTICES):
            model = onnx.load_model_from_string(int8.int8_graph(graphs[name]))
            kinds = [n.op_type for n in model.graph.node]
            # what stays in float32 are outputs that 8 unsigned bits do not hold, once to the phase
            phases = (
                1 if graphs is SHIPPED.graphs else max(1, len(PHASES[dict(STAGES).get(name, 0)]))
            )
            assert kinds.count("Conv") <= phases and "QLinearConv" in kinds


def test_floor_graphs_stay_as_they_are(tiny_file: bytes) -> None:
    """Their convolutions, that is; inputs are 8-bit in either form."""
    for name, graph in container.parse(tiny_file).graphs.items():
        if name != "chain":
            fast = onnx.load_model_from_string(int8.int8_graph(graph))
            assert not any(n.op_type == "QLinearConv" for n in fast.graph.node)
            inputs = inputs_of(graph, np.random.default_rng(4), (6, 4), False)
            found = run_eight_bit(fast.SerializeToString(), inputs)
            for a, b in zip(found, GraphRunner(graph)(inputs), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["hyper", "stage0", "stage3", "stage8"])
def test_runners_take_and_give_the_same_types_in_either_form(
    name: str, exact: bool, tiny_file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exact and not int8.exact_kernels():
        pytest.skip("this CPU has no exact 8-bit dot products")
    monkeypatch.setattr(session, "exact_kernels", lambda: exact)
    graphs = {"shipped": ON_LATTICES, "floor": container.parse(tiny_file).graphs}
    for kind, known in graphs.items():
        graph = known.get(name)
        if graph is None:
            continue
        inputs = inputs_of(graph, np.random.default_rng(5), (6, 8), False)
        runner = IntegerRunner(graph)
        assert_same(runner(eight_bit(inputs)), GraphRunner(graph)(inputs))
        assert runner._eight_bit == exact, kind


def test_kernels_that_differ_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = ON_LATTICES["stage0"]
    model = onnx.load_model_from_string(int8.int8_graph(graph))
    for tensor in model.graph.initializer:
        if tensor.name.endswith("//b"):
            values = onnx.numpy_helper.to_array(tensor) + 200
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.int32), tensor.name))
    monkeypatch.setattr(session, "exact_kernels", lambda: True)
    monkeypatch.setattr(session, "int8_graph", lambda _: model.SerializeToString())
    inputs = inputs_of(graph, np.random.default_rng(2), (4, 4), False)
    runner = IntegerRunner(graph)
    assert_same(runner(eight_bit(inputs)), GraphRunner(graph)(inputs))
    assert not runner._eight_bit


def test_machines_without_exact_kernels_keep_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: bytes) -> bytes:
        raise AssertionError("not to be called")

    monkeypatch.setattr(session, "exact_kernels", lambda: False)
    monkeypatch.setattr(session, "int8_graph", never)
    graph = SHIPPED.graphs["hyper"]
    inputs = inputs_of(graph, np.random.default_rng(3), (4, 4), False)
    assert_same(IntegerRunner(graph)(eight_bit(inputs)), GraphRunner(graph)(inputs))


# -- lattices --


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (1, 7), (6, 1), (2, 2), (5, 8), (7, 3)])
def test_lattices_part_the_grid(grid: tuple[int, int]) -> None:
    rows, columns = grid
    everywhere = np.arange(rows * columns)
    np.testing.assert_array_equal(lattice_positions(0, rows, columns), everywhere)
    parts = [lattice_positions(k, rows, columns) for k in (1, 2, 3)]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), everywhere)
    row, column = (
        np.concatenate([p // columns for p in parts]),
        np.concatenate([p % columns for p in parts]),
    )
    first, second = len(parts[0]), len(parts[0]) + len(parts[1])
    assert not (row[:first] % 2).any() and not (column[:first] % 2).any()
    assert (row[first:second] % 2).all() and (column[first:second] % 2).all()
    # the rest: even rows before odd ones, each row by row
    rest = list(zip(row[second:] % 2, row[second:], column[second:], strict=True))
    assert rest == sorted(rest) and all((a + b) % 2 for _, a, b in rest)


def on_lattice(whole: list[np.ndarray], lattice: int) -> list[np.ndarray]:
    flat = [x.reshape(*x.shape[:2], -1) for x in whole]
    return [x[:, :, lattice_positions(lattice, *whole[0].shape[2:])] for x in flat]


GRIDS = [(2, 2), (3, 2), (2, 5), (5, 8), (6, 7)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("form", ["float32", "8-bit"])
@pytest.mark.parametrize("lattice", [0, 1, 2, 3])
def test_cut_graphs_give_what_whole_ones_give(
    lattice: int, form: str, grid: tuple[int, int], tiny_file: bytes
) -> None:
    if form == "8-bit" and not int8.exact_kernels():
        pytest.skip("this CPU has no exact 8-bit dot products")
    tiny = container.parse(tiny_file).graphs
    graphs = [SHIPPED.graphs[name] for name in ("stage0", "stage1", "stage4", STAGES[-1][0])]
    for graph in (*graphs, tiny["stage1"], tiny["stage5"]):
        inputs = inputs_of(graph, np.random.default_rng(6), grid, False)
        expected = on_lattice(GraphRunner(graph)(inputs), lattice)
        cut = lattice_graph(graph, lattice)
        if form == "8-bit":
            found = run_eight_bit(int8.int8_graph(cut), inputs)
        else:
            found = GraphRunner(cut)(inputs)
        assert_same(found, expected)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (1, 5), (6, 1), *GRIDS])
def test_stages_run_on_any_grid(
    grid: tuple[int, int], exact: bool, tiny_file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one row or column too, where lattices have empty parts."""
    if exact and not int8.exact_kernels():
        pytest.skip("this CPU has no exact 8-bit dot products")
    monkeypatch.setattr(session, "exact_kernels", lambda: exact)
    tiny = container.parse(tiny_file).graphs
    for graph in (SHIPPED.graphs["stage1"], tiny["stage0"], tiny["stage5"]):
        inputs = inputs_of(graph, np.random.default_rng(8), grid, False)
        whole = GraphRunner(graph)(inputs)
        for lattice in (0, 1, 2, 3):
            found = StageRunner(graph, lattice)(eight_bit(inputs))
            assert_same(found, on_lattice(whole, lattice))


def test_a_graph_that_cannot_be_strided_is_sliced() -> None:
    """hyper holds DepthToSpace; no model has such stages, but nothing forbids them."""
    graph = SHIPPED.graphs["hyper"]
    inputs: dict[str, Any] = inputs_of(graph, np.random.default_rng(7), (6, 8), False)
    for lattice in (0, 1, 2, 3):
        found = GraphRunner(lattice_graph(graph, lattice))(inputs)
        for a, b in zip(found, on_lattice(GraphRunner(graph)(inputs), lattice), strict=True):
            np.testing.assert_array_equal(a, b)


def test_kernel_shapes_may_go_without_saying() -> None:
    """ONNX lets a Conv leave its kernel's shape to its weights."""
    name, lattice = next((n, k) for n, k in STAGES if k == 3)
    model = onnx.load_model_from_string(SHIPPED.graphs[name])
    for node in model.graph.node:
        kept = [a for a in node.attribute if a.name != "kernel_shape"]
        del node.attribute[:]
        node.attribute.extend(kept)
    bare = model.SerializeToString()
    assert bare != SHIPPED.graphs[name]
    inputs = inputs_of(bare, np.random.default_rng(4), (6, 9), False)
    given = eight_bit(inputs)
    cases = zip(
        StageRunner(SHIPPED.graphs[name], lattice)(given),
        StageRunner(bare, lattice)(given),
        strict=True,
    )
    for a, b in cases:
        np.testing.assert_array_equal(a, b)
