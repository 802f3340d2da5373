"""The 8-bit form of the integer graphs gives what the float32 form gives, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from wsicodec.models import container, find_model, int8, session
from wsicodec.models.session import GraphRunner, IntegerRunner

SHIPPED = container.parse(find_model("he-fast").path.read_bytes())
INTEGER = sorted(name for name in SHIPPED.graphs if name != "chain")


def inputs_of(graph: bytes, rng: np.random.Generator, side: int, extreme: bool) -> dict:
    inputs = {}
    for port in GraphRunner(graph).session().get_inputs():
        low, high = (-127, 127) if port.name in ("context", "z") else (0, 255)
        n = side // 2 if port.name == "z" else side
        x = rng.integers(low, high + 1, (2, port.shape[1], n, n)).astype(np.float32)
        inputs[port.name] = np.where(x > 0, np.float32(high), np.float32(low)) if extreme else x
    return inputs


@pytest.mark.skipif(not int8.exact_kernels(), reason="this CPU has no exact 8-bit dot products")
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("name", INTEGER)
def test_both_forms_agree(name: str, extreme: bool) -> None:
    graph = SHIPPED.graphs[name]
    fast = int8.int8_graph(graph)
    inputs = inputs_of(graph, np.random.default_rng(1), 10, extreme)
    for a, b in zip(GraphRunner(graph)(inputs), GraphRunner(fast)(inputs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_every_hidden_layer_has_an_8_bit_form() -> None:
    import onnx

    for name in INTEGER:
        kinds = [
            n.op_type
            for n in onnx.load_model_from_string(int8.int8_graph(SHIPPED.graphs[name])).graph.node
        ]
        # what stays in float32 are outputs that 8 unsigned bits do not hold
        assert kinds.count("Conv") <= 1 and "QLinearConv" in kinds


def test_floor_graphs_stay_as_they_are(tiny_file: bytes) -> None:
    for name, graph in container.parse(tiny_file).graphs.items():
        if name != "chain":
            import onnx

            fast = onnx.load_model_from_string(int8.int8_graph(graph))
            assert not any(n.op_type == "QLinearConv" for n in fast.graph.node)


def test_kernels_that_differ_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = SHIPPED.graphs["stage0"]
    wrong = int8.int8_graph(SHIPPED.graphs["stage0"])
    import onnx

    model = onnx.load_model_from_string(wrong)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_b"):
            values = onnx.numpy_helper.to_array(tensor) + 200
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.int32), tensor.name))
    monkeypatch.setattr(session, "exact_kernels", lambda: True)
    monkeypatch.setattr(session, "int8_graph", lambda _: model.SerializeToString())
    inputs = inputs_of(graph, np.random.default_rng(2), 4, False)
    for a, b in zip(IntegerRunner(graph)(inputs), GraphRunner(graph)(inputs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_machines_without_exact_kernels_keep_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: bytes) -> bytes:
        raise AssertionError("not to be called")

    monkeypatch.setattr(session, "exact_kernels", lambda: False)
    monkeypatch.setattr(session, "int8_graph", never)
    graph = SHIPPED.graphs["hyper"]
    inputs = inputs_of(graph, np.random.default_rng(3), 4, False)
    for a, b in zip(IntegerRunner(graph)(inputs), GraphRunner(graph)(inputs), strict=True):
        np.testing.assert_array_equal(a, b)
