"""The matrix of docs/exactness.md: every way to run networks and coders, one set of hashes.

``tools.exactness`` does the comparing, here and on other machines; these tests hold it to the
record, and hold it to noticing what is wrong. The record is data: no test writes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tools.exactness import __main__ as command
from tools.exactness import comparing
from tools.exactness.bounds import LayerBound, layer_bounds
from tools.exactness.comparing import (
    Comparison,
    compare_document,
    compare_vectors,
    compare_walks,
    first_difference,
    recorded,
    shipped,
    vector_names,
)
from tools.exactness.executions import EXACT, EXECUTIONS, eight_bit_kernels, float_kernels
from tools.exactness.reading import CODERS
from tools.exactness.walks import WALKS, Walk, walked, walked_by_the_document
from wsicodec.codec.network import decode_tile, decode_tiles
from wsicodec.errors import ModelError
from wsicodec.models import container, session
from wsicodec.models.decoder import load_decoder
from wsicodec.models.int8 import exact_kernels, int8_graph
from wsicodec.models.proof import SUM_BOUND
from wsicodec.models.vnni import available

ROOT = Path(__file__).parents[1]
SHIPPED = shipped()
NEEDS = {"compiled": available, "8 bits": exact_kernels}
"""Executions that not every machine has."""
SOME_VECTORS = (
    "learned-48x64-gain100-stages6-lanes2-turned",
    "learned-16x80-gain200-lanes8-random",
    "lapped/40x72-gain60-lanes2-turned",
    "tilted/40x72-gain60-lanes2-tilt15-turned",
    "tilted/49x65-gain180-tilt7-random",
    "smallest/50x40-gain100-turned",
)


def skip_unless_here(execution: str) -> None:
    if not NEEDS.get(execution, lambda: True)():
        pytest.skip(f"this CPU cannot run {execution!r}")


# -- what is on record --


def test_the_record_is_of_the_shipped_models() -> None:
    """A new model needs ``python -m tools.exactness --write`` and a new table in the document."""
    record = recorded()
    assert SHIPPED and set(record) == set(SHIPPED)
    for name, file in SHIPPED.items():
        assert record[name]["sha256"] == hashlib.sha256(file).hexdigest()
        assert record[name]["layers"] == [asdict(layer) for layer in layer_bounds(file)]
        assert list(record[name]["walks"]) == [walk.name for walk in WALKS]


def test_the_document_has_the_figures() -> None:
    text = (ROOT / "docs" / "exactness.md").read_text("utf-8")
    for file in SHIPPED.values():
        assert "\n".join(command.rows_of(layer_bounds(file))) in text
        assert hashlib.sha256(file).hexdigest() in text
    for execution in EXECUTIONS:
        assert f"`{execution}`" in text


@pytest.mark.parametrize("walk", WALKS[:3] + WALKS[5:6], ids=lambda walk: walk.name)
@pytest.mark.parametrize("name", SHIPPED)
def test_the_record_is_what_the_document_says(name: str, walk: Walk) -> None:
    """The second decoder's walk, networks in int64 and an entropy encoder of its own."""
    found = walked_by_the_document(walk, SHIPPED[name]).digests()
    expected = recorded()[name]["walks"][walk.name]
    assert (found["tile"], found["symbols"]) == (expected["tile"], expected["symbols"])


def test_walks_differ_and_reach_far() -> None:
    """Both bounds of the symbols, every class that is coded at all, cells that are cut."""
    for name, file in SHIPPED.items():
        model = float_kernels(file)
        runs = [walked(walk, model) for walk in WALKS]
        assert len({run.digests()["tile"] for run in runs}) == len(WALKS), name
        symbols = np.concatenate([s.reshape(-1) for run in runs for s in run.symbols])
        assert (symbols.min(), symbols.max()) == (-(2**21), 2**21)
        gains = np.concatenate([run.numbers["cell 0, gains"] for run in runs])
        assert (gains.min(), gains.max()) == (0, 255)
        found = [x.reshape(-1) for run in runs for k, x in run.numbers.items() if "classes" in k]
        classes = np.unique(np.concatenate(found))
        assert len(classes) > 64 and 0 in classes
        assert any("cell 1" in name for run in runs for name in run.numbers)


# -- bounds --


def with_bias_up_to(file: bytes, layer: LayerBound, bound: int) -> bytes:
    """The model with one bias changed such that the layer's largest sum has this bound."""
    parsed = container.parse(file)
    model = onnx.load_model_from_string(parsed.graphs[layer.graph])
    conv = [n for n in model.graph.node if n.op_type == "Conv"][layer.layer]
    casts = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Cast"}
    tensors = {t.name: t for t in model.graph.initializer}
    weight, tensor = (tensors[casts[x]] for x in conv.input[1:])
    bias = onnx.numpy_helper.to_array(tensor).astype(np.int32)
    sizes = np.abs(onnx.numpy_helper.to_array(weight).astype(int)).sum((1, 2, 3))
    # channels differ in what they read: the row of the largest sum is one of the largest
    for row in np.argsort(-layer.peak * sizes - np.abs(bias)):
        changed = bias.copy()
        changed[row] += (bound - layer.bound) * (1 if bias[row] >= 0 else -1)
        tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
        graphs = {**parsed.graphs, layer.graph: model.SerializeToString()}
        other = container.pack(parsed.header, graphs, parsed.tensors)
        mine = [x for x in layer_bounds(other) if x.graph == layer.graph]
        if mine[layer.layer].bound == bound:
            return other
    raise AssertionError("no bias leads to this bound")


@pytest.mark.parametrize("graph", ["hyper", "stage0", "stage5"])
def test_the_proof_refuses_at_the_bound_that_is_counted(graph: str) -> None:
    """The tool's count is another one than the proof's: they must part at the same integer."""
    file = SHIPPED["he-fast"]
    layer = max((x for x in layer_bounds(file) if x.graph == graph), key=lambda x: x.bound)
    load_decoder(with_bias_up_to(file, layer, SUM_BOUND - 1))
    with pytest.raises(ModelError, match=f"{graph}: a Conv sum may reach {SUM_BOUND}"):
        load_decoder(with_bias_up_to(file, layer, SUM_BOUND))


def test_sums_come_near_their_bounds() -> None:
    """A bound that nothing comes near would prove little: inputs that suit the weights reach it."""
    file = SHIPPED["he-fast"]
    (layer, *_) = [x for x in layer_bounds(file) if x.graph == "stage9"]
    model = onnx.load_model_from_string(container.parse(file).graphs["stage9"])
    convs = [n for n in model.graph.node if n.op_type == "Conv"]
    casts = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Cast"}
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    w, b = (tensors[casts[x]].astype(np.int64) for x in convs[0].input[1:])
    up = 127 * np.maximum(w, 0).sum((1, 2, 3)) + b
    down = 127 * np.minimum(w, 0).sum((1, 2, 3)) + b
    assert layer.bound // 2 < max(up.max(), -down.min()) <= layer.bound


# -- executions --


@pytest.mark.parametrize("execution", [e for e in EXECUTIONS if e != "compiled"])
def test_every_execution_reads_the_vectors(execution: str) -> None:
    skip_unless_here(execution)
    comparison = Comparison()
    names = SOME_VECTORS if execution == EXACT else vector_names()
    compare_vectors(comparison, names, [execution])
    assert comparison.differences == []
    assert comparison.compared == len(names)


def test_plain_python_reads_the_vectors() -> None:
    """The entropy coder's specification, and the second decoder."""
    comparison = Comparison()
    compare_vectors(comparison, SOME_VECTORS, ["float32"], "plain Python")
    compare_document(comparison, SOME_VECTORS)
    assert comparison.differences == []
    assert comparison.compared == 2 * len(SOME_VECTORS)


def test_programs_take_no_vectors_model() -> None:
    """Why there are walks."""
    comparison = Comparison()
    compare_vectors(comparison, SOME_VECTORS[:1], ["compiled"])
    assert comparison.differences == []
    assert "ran" not in comparison.executions["compiled"].values()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_every_execution_walks_alike(execution: str) -> None:
    """Tile, symbols and all the networks' numbers; decoded again by both entropy decoders."""
    skip_unless_here(execution)
    comparison = Comparison()
    walks = WALKS[:6] if execution == EXACT else WALKS
    compare_walks(comparison, recorded(), walks, [execution])
    assert comparison.differences == []
    assert set(comparison.executions[execution].values()) == {"ran"}
    assert comparison.compared == len(SHIPPED) * (1 + 2 * len(walks))


@pytest.mark.parametrize("form", [float_kernels, eight_bit_kernels])
def test_sixteen_tiles_at_once_are_sixteen_tiles(form: Callable[[bytes], Any]) -> None:
    """Cells of a batch share a call of every network, and nothing else."""
    if form is eight_bit_kernels:
        skip_unless_here("8 bits")
    model = form(SHIPPED["he-fast"])
    tiles = [walked(Walk(40, 56, 16 * n + 15, n), model).tile for n in range(16)]
    outs = [np.empty((40, 56, 3), np.uint8) for _ in tiles]
    decode_tiles(tiles, model, outs)
    for tile, pixels in zip(tiles, outs, strict=True):
        np.testing.assert_array_equal(decode_tile(tile, model), pixels)


RESTRICTED = """
import json, sys
from numba.core import config
from tools.exactness.comparing import Comparison, compare_vectors, recorded, shipped
from tools.exactness.executions import float_kernels
from tools.exactness.reading import digest_of, read_symbols
from tools.exactness.walks import WALKS, walked
from wsicodec.entropy import kernel

comparison = Comparison()
compare_vectors(comparison, sys.argv[1:], ["float32"])
for name, file in shipped().items():
    model = float_kernels(file)
    for walk in WALKS[1:3]:
        run = walked(walk, model)
        comparison.compare(walk.name, run.digests(), recorded()[name]["walks"][walk.name])
        found = digest_of(read_symbols(run.tile, model))
        comparison.compare(walk.name, found, digest_of(run.symbols))
(code,) = kernel.decode_symbols.inspect_asm().values()
print(json.dumps([
    comparison.compared, comparison.differences, [x for x in ("%ymm", "%zmm") if x in code],
    config.CPU_NAME,
]))
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="instruction sets of x86")
@pytest.mark.parametrize(
    ("name", "features"),
    [("haswell", "+avx2,+fma,+bmi,+bmi2,+sse4.2,+popcnt"), ("x86-64", "+sse2")],
    ids=["AVX2", "SSE2"],
)
def test_compiled_code_of_lesser_machines_reads_alike(name: str, features: str) -> None:
    """Entropy coder and dequantisation, compiled without AVX-512, and without any AVX."""
    environment = {**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    done = subprocess.run(
        [sys.executable, "-c", RESTRICTED, *SOME_VECTORS], cwd=ROOT, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    compared, differences, registers, cpu = json.loads(done.stdout.splitlines()[-1])
    assert differences == [] and compared == len(SOME_VECTORS) + 4 * len(SHIPPED)
    assert cpu == name and "%zmm" not in registers
    assert features.startswith("+avx2") or not registers


@pytest.mark.parametrize("features", [{}, {"NUMBA_CPU_FEATURES": "+avx2,+fma"}])
def test_programs_are_left_out_where_numba_compiles_for_less(features: dict[str, str]) -> None:
    """LLVM would end the process: it has no other code for these instructions."""
    script = (
        "from tools.exactness.comparing import shipped\n"
        "from wsicodec.models.decoder import load_decoder\n"
        "print([load_decoder(file).fused for file in shipped().values()])"
    )
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", **features}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, str([None] * len(SHIPPED))), done.stderr


def test_a_runtime_without_an_8_bit_kernel_runs_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime 1.20 has no DepthToSpace of 8 bits."""

    def lacking(graph: bytes) -> bytes:
        model = onnx.load_model_from_string(int8_graph(graph))
        model.graph.node[0].op_type = "NoSuchOperator"
        return model.SerializeToString()

    monkeypatch.setattr(session, "exact_kernels", lambda: True)
    monkeypatch.setattr(session, "int8_graph", lacking)
    model = load_decoder(SHIPPED["he-fast"], fused=False)
    expected = recorded()["he-fast"]["walks"][WALKS[4].name]
    assert walked(WALKS[4], model).digests() == expected


# -- what is wrong is noticed --


def changed_bias(file: bytes, graph: str, by: int) -> bytes:
    """The model with every bias of a graph's last layer changed."""
    parsed = container.parse(file)
    model = onnx.load_model_from_string(parsed.graphs[graph])
    tensor = [t for t in model.graph.initializer if t.name.startswith("b_")][-1]
    value = onnx.numpy_helper.to_array(tensor) + by
    tensor.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.int32), tensor.name))
    graphs = {**parsed.graphs, graph: model.SerializeToString()}
    return container.pack(parsed.header, graphs, parsed.tensors)


@pytest.mark.parametrize("graph", ["hyper", "stage4", "chain"])
def test_another_integer_is_a_difference(graph: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that are a little off: what compares them says so, and where."""
    walk = WALKS[4]
    expected = walked(walk, float_kernels(SHIPPED["he-fast"]))

    def wrong(file: bytes) -> Any:
        model, right = float_kernels(changed_bias(file, graph, 4000)), load_decoder(file)
        model.digest = right.digest
        return model

    found = walked(walk, wrong(SHIPPED["he-fast"]))
    place = {"hyper": "stage", "stage4": "stage 4", "chain": "corrections"}[graph]
    assert place in str(first_difference(found, expected))
    monkeypatch.setitem(EXECUTIONS, "float32", wrong)
    comparison = Comparison()
    compare_walks(comparison, recorded(), [walk], ["float32"])
    assert len(comparison.differences) == len(SHIPPED)
    assert walk.name in comparison.differences[0]


def test_a_decoder_that_reads_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(CODERS["compiled"]):  # type: ignore[misc]
        def get(self, classes: np.ndarray, *, dependent: bool = False) -> np.ndarray:
            found = super().get(classes, dependent=dependent)
            if dependent and found.size > 3:
                found.reshape(-1)[3] += 2
            return found

    monkeypatch.setitem(CODERS, "compiled", Wrong)
    comparison = Comparison()
    compare_vectors(comparison, SOME_VECTORS[:2], ["float32"])
    assert len(comparison.differences) == 2


@pytest.mark.parametrize("fault", ["none", "vector", "walk", "model"])
def test_check_exits_with_1_where_anything_differs(
    fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    record, before = recorded(), comparing.RECORD.read_bytes()
    if fault == "walk":
        record["he-fast"]["walks"][WALKS[1].name]["networks"] = "0" * 64
    if fault == "model":
        record["he-fast"]["sha256"] = "0" * 64

    def vectors(comparison: Comparison, names: Any, *_: Any) -> None:
        assert names == vector_names()
        compare_vectors(comparison, SOME_VECTORS[:1], ["float32"])
        if fault == "vector":
            comparison.compare("a vector", "0", "1")

    monkeypatch.setattr(command, "compare_document", vectors)
    monkeypatch.setattr(command, "compare_vectors", vectors)
    monkeypatch.setattr(
        command, "compare_walks", lambda c, r: compare_walks(c, r, WALKS[1:2], ["float32"])
    )
    monkeypatch.setattr(command, "recorded", lambda: record)
    out = tmp_path / "out.json"
    assert command.main(["--check", "--json", str(out)]) == int(fault != "none")
    assert command.main([]) == 0
    report = json.loads(out.read_text())
    assert len(report["differences"]) == {"none": 0, "vector": 3}.get(fault, 1)
    assert report["executions"]["float32"]["he-fast"] == "ran"
    printed = capsys.readouterr().out
    assert all(
        "\n".join(command.rows_of(layer_bounds(file))) in printed for file in SHIPPED.values()
    )
    assert comparing.RECORD.read_bytes() == before
