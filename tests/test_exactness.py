"""Cross-execution: what one way of running a model codes, every other decodes to the same pixels.

The integer graphs run under onnxruntime (one and two threads, optimised and not, alone and within
a batch), under torch where it is installed, and in int64 by the second decoder's interpreter. All
must give the same integers for every input that the format allows, so all code the same bytes.
Graphs cut to a lattice, in float32 and in 8 bits, give what the whole graphs give at its positions.
Compared here: the graphs' outputs, bytes, symbols, pixels. The encoder's float network, which
decides nothing that a decoder must know, runs one way only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import second_decoder

import wsicodec
from tools.exactness.executions import (
    Arrays,
    Runner,
    interpreter,
    on_lattice,
    onnxruntime_of,
    whole_graphs,
)
from wsicodec.codec import learned, network
from wsicodec.codec.network import encode_tile
from wsicodec.entropy import kernel
from wsicodec.models import container, session
from wsicodec.models.decoder import DecoderModel, load_decoder
from wsicodec.models.int8 import exact_kernels, int8_graph
from wsicodec.models.lattice import lattice_graph, lattice_positions
from wsicodec.models.networks import Cells, FusedCells, GraphCells
from wsicodec.models.session import GraphRunner, IntegerRunner
from wsicodec.models.store import encoder_of, find_model, models
from wsicodec.models.vnni import available

SHIPPED = tuple(record.name for record in models() if record.shipped and record.encoder_path)
MODELS = ("tiny", *SHIPPED)

# -- ways to run a graph --


def with_torch(graph: bytes) -> Runner:
    """torch's float32 kernels, node by node."""
    import torch
    import torch.nn.functional as F

    model = onnx.load_from_string(graph)
    constants = {
        t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy())
        for t in model.graph.initializer
    }
    types = {1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16}

    def per_axis(values: Any, rank: int, axis: int) -> Any:
        if values.numel() == 1:
            return values.reshape(())
        return values.reshape([-1 if i == axis else 1 for i in range(rank)])

    def step(kind: str, a: dict[str, Any], x: list[Any]) -> Any:
        if kind == "Conv":
            return F.conv2d(x[0], x[1], x[2], padding=x[1].shape[-1] // 2)
        if kind == "Clip":
            return torch.clamp(x[0], x[1].reshape(()), x[2].reshape(()))
        if kind == "Concat":
            return torch.cat(x, dim=1)
        if kind == "DepthToSpace":  # CRD is torch's order
            return F.pixel_shuffle(x[0], a["blocksize"])
        if kind == "Cast":
            return x[0].to(types[a["to"]])
        if kind == "Transpose":
            return x[0].permute(a["perm"])
        if kind == "DequantizeLinear":
            levels = x[0].to(torch.float32)
            if len(x) == 3:
                levels = levels - x[2].reshape(())
            return levels * per_axis(x[1], levels.ndim, a.get("axis", 1))
        if kind == "QuantizeLinear":
            limits = torch.iinfo(x[2].dtype)
            levels = torch.round(x[0] / x[1].reshape(())) + x[2].reshape(())
            return levels.clamp(limits.min, limits.max).to(x[2].dtype)
        plain = {"Round": torch.round, "Floor": torch.floor, "Abs": torch.abs}
        return x[0] * x[1] if kind == "Mul" else plain[kind](x[0])

    def run(inputs: Arrays) -> list[np.ndarray]:
        values = {**constants, **{k: torch.from_numpy(v.copy()) for k, v in inputs.items()}}
        with torch.inference_mode():
            for node in model.graph.node:
                a = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
                values[node.output[0]] = step(node.op_type, a, [values[n] for n in node.input])
        return [np.ascontiguousarray(values[o.name].numpy()) for o in model.graph.output]

    return run


def torch_if_installed(graph: bytes) -> Runner:
    pytest.importorskip("torch")
    return with_torch(graph)


EXECUTIONS: dict[str, Callable[[bytes], Runner]] = {
    "runtime": onnxruntime_of(),
    "two threads": onnxruntime_of(threads=2),
    "not optimised": onnxruntime_of(level="DISABLE_ALL"),
    "batch of four": onnxruntime_of(batch=4),
    "two threads, not optimised, batch of four": onnxruntime_of(
        threads=2, level="DISABLE_ALL", batch=4
    ),
    "int64": interpreter,
    "torch": torch_if_installed,
}
AS_USERS_DO = "as users run it"  # on lattices, in 8 bits where this machine can

# -- models --


def files(name: str) -> bytes:
    if name == "tiny":
        return (Path(__file__).parent / "conformance" / "tiny.wscm").read_bytes()
    return find_model(name).path.read_bytes()


def levels(inputs: Arrays) -> dict[str, np.ndarray]:
    """The other way round."""
    eight = {n: x.astype(np.uint8) for n, x in inputs.items() if n in ("h", "plane")}
    if "context" in inputs:
        eight["context"] = (inputs["context"] + 128).astype(np.uint8)
        eight["magnitude"] = (np.abs(inputs["context"]) + 128).astype(np.uint8)
    return eight


def executed(file: bytes, build: Callable[[bytes], Runner] | None) -> DecoderModel:
    """The decoder model with all its graphs run this way, whole; None: as users run them."""
    return load_decoder(file) if build is None else whole_graphs(file, build)


@pytest.fixture
def code(
    tiny_installed: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str, Any, int], tuple[bytes, np.ndarray]]:
    """code(model name, execution, image or tile, quality): (tile, pixels) under an execution."""

    def run(name: str, execution: str, given: Any, quality: int) -> tuple[bytes, np.ndarray]:
        model = executed(files(name), EXECUTIONS.get(execution))
        calls, cells = [], model.cells

        def counted(*shape: int) -> Cells:
            calls.append(shape)
            return cells(*shape)

        def counted_cell(*arguments: Any) -> None:
            calls.append(())
            decode_cell(*arguments)

        model.cells, decode_cell = counted, network.decode_cell
        _, encoder = encoder_of(find_model(name))
        with monkeypatch.context() as patch:
            patch.setattr(network, "decode_cell", counted_cell)
            patch.setattr(learned, "encoder_of", lambda record: (model, encoder))
            patch.setattr(learned, "decoder_of_prefix", lambda prefix: model)
            tile = given
            if not isinstance(given, bytes):
                tile = wsicodec.encode(given, model=name, quality=quality)
            decoded = tile, wsicodec.decode(tile)
        assert len(calls) == (1 if given is tile else 2), "the execution under test did not run"
        return decoded

    return run


@pytest.mark.parametrize("execution", [AS_USERS_DO, *EXECUTIONS])
@pytest.mark.parametrize("quality", [10, 70, 95])
@pytest.mark.parametrize("name", MODELS)
def test_every_execution_codes_the_same_bytes_and_pixels(
    name: str, quality: int, execution: str, code: Any, tissue: Any
) -> None:
    """Encoded as users do, decoded this way; and encoded this way to the same bytes."""
    image = tissue(75, 115, seed=quality)
    tile, pixels = code(name, "runtime", image, quality)
    assert tile[5] == 1
    same, _ = code(name, execution, image, quality)
    assert same == tile
    _, decoded = code(name, execution, tile, quality)
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize("execution", list(EXECUTIONS)[1:])
@pytest.mark.parametrize("name", MODELS)
def test_every_execution_gives_the_same_integers_for_all_inputs(name: str, execution: str) -> None:
    """Inputs from the whole range that the format allows, its ends most of all."""
    file = files(name)
    graphs = container.parse(file).graphs
    a = load_decoder(file).architecture
    rng = np.random.default_rng(7)
    rows, columns = 6, 10

    def draw(channels: int, low: int, high: int, shape: tuple[int, int]) -> np.ndarray:
        x = rng.integers(low, high + 1, (1, channels, *shape))
        ends = rng.random(x.shape)
        x = np.where(ends < 0.2, low, np.where(ends > 0.8, high, x))
        return x.astype(np.float32)

    for repeat in range(3):
        for graph in graphs:
            plane = draw(1, 0, 255, (rows, columns))
            if graph == "hyper":
                z = draw(a.z_channels, -127, 127, (rows // 2, columns // 2))
                inputs = {"z": z, "plane": plane}
            elif graph == "chain":
                x = draw(a.context_channels + 1, 0, 255, (rows, columns))
                inputs = {"context": x.astype(np.uint8)}
            else:
                inputs = {"h": draw(a.hyper, 0, 255, (rows, columns)), "plane": plane}
                if seen := a.seen(int(graph.removeprefix("stage"))):
                    inputs["context"] = draw(seen, -127, 127, (rows, columns))
            if repeat == 0:  # all at one end: the largest sums
                inputs = {k: np.full_like(v, v.max()) for k, v in inputs.items()}
            expected = EXECUTIONS["runtime"](graphs[graph])(inputs)
            found = EXECUTIONS[execution](graphs[graph])(inputs)
            for x, y in zip(expected, found, strict=True):
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(x, y, err_msg=graph)


GRIDS = [(7, 9), (8, 8), (9, 8), (6, 7), (2, 2), (3, 2), (1, 1), (1, 5), (5, 1), (1, 2), (2, 1)]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
@pytest.mark.parametrize("name", MODELS)
def test_graphs_on_lattices_give_what_whole_graphs_give(
    name: str, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage, on its lattice: values and types, in float32 and in 8 bits."""
    file = files(name)
    graphs, model, plain = container.parse(file).graphs, load_decoder(file), load_decoder(file)
    a = model.architecture
    for k, stage in enumerate(a.stages):
        whole, cut = graphs[f"stage{k}"], lattice_graph(graphs[f"stage{k}"], stage.lattice)
        rng = np.random.default_rng(k)
        ports = {"h": (a.hyper, 0, 255), "plane": (1, 0, 255)}
        if k:
            ports["context"] = a.seen(k), -127, 127
        for extreme in (False, True):
            inputs = {}
            for port, (channels, low, high) in ports.items():
                x = rng.integers(low, high + 1, (2, channels, *grid))
                x = np.where(x > (low + high) / 2, high, low) if extreme else x
                inputs[port] = x.astype(np.float32)
            expected = on_lattice(GraphRunner(whole)(inputs), stage.lattice)
            eight = levels(inputs)
            found = {"as users run it": model.graphs.stages[k](eight)}
            with monkeypatch.context() as patch:
                patch.setattr(session, "exact_kernels", lambda: False)
                found["as users without 8-bit kernels run it"] = plain.graphs.stages[k](eight)
            if min(grid) > 1 or stage.lattice < 2:  # runtimes have no convolutions of nothing
                found["cut graph"] = GraphRunner(cut)(inputs)
                found["cut graph, 8-bit inputs"] = IntegerRunner(cut)(eight)
                if exact_kernels():
                    fast = GraphRunner(int8_graph(cut))
                    used = {port.name for port in fast.session().get_inputs()}
                    found["8 bits"] = fast({n: x for n, x in eight.items() if n in used})
            for form, outputs in found.items():
                for x, y in zip(expected, outputs, strict=True):
                    assert x.dtype == y.dtype, form
                    np.testing.assert_array_equal(x, y, err_msg=f"stage{k}, {form}")


@pytest.mark.parametrize("name", MODELS)
def test_stages_run_in_their_8_bit_form(name: str) -> None:
    """What the tests above compare is not twice the same."""
    if not exact_kernels():
        pytest.skip("this CPU has no exact 8-bit dot products")
    model = load_decoder(files(name))
    for k, stage in enumerate(model.architecture.stages):
        runner = IntegerRunner(lattice_graph(model.graph_bytes(f"stage{k}"), stage.lattice))
        ports = runner.session().get_inputs()
        assert {port.type for port in ports} == {"tensor(uint8)"}


@pytest.mark.skipif(not available(), reason="this CPU has no AVX-512 with VNNI")
@pytest.mark.parametrize("name", SHIPPED)
def test_compiled_programs_give_what_graphs_give(name: str) -> None:
    """Every network, its whole range of inputs, every kind of grid; memory that was used before."""
    model = load_decoder(files(name))
    assert model.fused is not None
    plain = load_decoder(files(name), fused=False)
    assert plain.fused is None
    a, rng = model.architecture, np.random.default_rng(11)

    def draw(shape: tuple[int, ...], extreme: int) -> np.ndarray:
        x = rng.integers(-127, 128, shape)
        return (x, np.where(x > 0, 127, -127), np.full(shape, 127), np.full(shape, -127))[extreme]

    for rows, columns in (*GRIDS, (16, 16), (32, 32), *GRIDS):
        for extreme in range(4):
            shape = (2, a.z_channels, -(-rows // 2), -(-columns // 2))
            z, gains = draw(shape, extreme), rng.integers(0, 256, 2).tolist()
            both = (
                FusedCells(model.fused, 2, rows, columns),
                GraphCells(plain.graphs, 2, rows, columns),
            )
            np.testing.assert_array_equal(*(cells.hyper(z, gains) for cells in both))
            for k in range(len(a.stages)):
                for n in range(2):
                    context = draw((a.context_channels, rows * columns), extreme)
                    # earlier stages have been decoded, later ones have not
                    context[a.seen(k) :] = 0
                    for cells in both:
                        port = cells.port(n)
                        port.values[: len(context), port.places] = context + 128
                        port.magnitudes[: len(context), port.places] = np.abs(context) + port.base
                for ours, theirs in zip(*(cells.stage(k) for cells in both), strict=True):
                    for x, y in zip(ours, theirs, strict=True):
                        assert x.dtype == y.dtype or not x.size
                        np.testing.assert_array_equal(x, y, err_msg=f"stage{k}")
            for x, y in zip(*(cells.corrections() for cells in both), strict=True):
                np.testing.assert_array_equal(x, y)


@pytest.mark.skipif(not available(), reason="this CPU has no AVX-512 with VNNI")
def test_layers_of_too_many_sources_are_left_to_onnxruntime() -> None:
    """A proved model that compiled programs have no room for is decoded all the same."""
    file = container.parse(files("he-fast"))
    model = onnx.load_model_from_string(file.graph("hyper"))
    graph = model.graph
    constants = {t.name: t for t in graph.initializer}
    casts = {n.output[0]: n.input[0] for n in graph.node if n.input[0] in constants}
    at, conv = next(
        (i, n)
        for i, n in enumerate(graph.node)
        if n.op_type == "Conv" and constants[casts[n.input[1]]].dims[2] == 3
    )
    name, times = casts[conv.input[1]], 8  # zeros for all but the first of its inputs
    weight = onnx.numpy_helper.to_array(constants[name])
    wide = np.concatenate([weight] + [np.zeros_like(weight)] * (times - 1), axis=1)
    constants[name].CopyFrom(onnx.numpy_helper.from_array(wide, name))
    graph.node.insert(at, onnx.helper.make_node("Concat", [conv.input[0]] * times, ["//"], axis=1))
    graph.node[at + 1].input[0] = "//"
    graphs = {**file.graphs, "hyper": model.SerializeToString()}
    changed = load_decoder(container.pack(file.header, graphs, file.tensors))
    assert changed.fused is None
    z = np.random.default_rng(1).integers(-127, 128, (1, changed.architecture.z_channels, 3, 4))
    plain = load_decoder(files("he-fast"), fused=False)
    effective = (m.cells(1, 6, 8).hyper(z, [99]) for m in (changed, plain))
    np.testing.assert_array_equal(*effective)


@pytest.mark.skipif(not available(), reason="this CPU has no AVX-512 with VNNI")
def test_compiled_programs_of_all_grids_share_their_weights() -> None:
    model = load_decoder(files("he-fast"))
    assert model.fused is not None
    one, other = (model.fused.plan(*grid).tables for grid in ((3, 7), (16, 16)))
    assert all(a is b for a, b in zip(one[3:], other[3:], strict=True))


def test_lattices_part_the_grid_in_the_documents_order() -> None:
    for rows, columns in GRIDS:
        positions = [lattice_positions(n, rows, columns).tolist() for n in range(4)]
        assert positions[0] == list(range(rows * columns))
        assert sorted(p for part in positions[1:] for p in part) == positions[0]
        for lattice, found in enumerate(positions):
            row, column = second_decoder.lattice_positions(lattice, rows, columns)
            assert (row * columns + column).tolist() == found


def assert_both_decoders_agree(
    tile: bytes, file: bytes, monkeypatch: pytest.MonkeyPatch
) -> second_decoder.Decoded:
    """Hyper-latents and levels exactly, pixels within the tolerance."""
    second = second_decoder.decode(tile, [file])
    ours, read = [], kernel.Decoder.get

    def recorded(self: kernel.Decoder, classes: np.ndarray, **kind: bool) -> np.ndarray:
        ours.append(read(self, classes, **kind))
        return ours[-1]

    pixels = wsicodec.decode(tile)
    with monkeypatch.context() as patch:
        # compiled programs read a cell's arrays without coming by here
        plain = load_decoder(file, fused=False)
        patch.setattr(learned, "decoder_of_prefix", lambda prefix: plain)
        patch.setattr(kernel.Decoder, "get", recorded)
        np.testing.assert_array_equal(wsicodec.decode(tile), pixels)
    theirs = [array for cell in second.cells for array in (cell.z, *cell.levels)]
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(x, y)
    error = np.abs(pixels.astype(int) - second.pixels)
    assert error.max() <= 2 and (error > 1).mean() <= 0.001
    return second


@pytest.mark.parametrize("quality", [1, 45, 70, 100])
@pytest.mark.parametrize("name", MODELS)
def test_the_second_decoder_reads_what_wsicodec_writes(
    name: str, quality: int, tissue: Any, tiny_installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = wsicodec.encode(tissue(47, 70, seed=3), model=name, quality=quality)
    second = assert_both_decoders_agree(tile, files(name), monkeypatch)
    if quality == 100:  # enough symbols for all states: both quantisers
        used = np.concatenate([u[c > 0] for u, c in zip(*symbols_of(second), strict=True)])
        assert set(used.tolist()) == {0, 1}


def symbols_of(decoded: second_decoder.Decoded) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Quantisers and classes of all stages."""
    return (
        [u for cell in decoded.cells for u in cell.quantisers],
        [c for cell in decoded.cells for c in cell.classes],
    )


@pytest.mark.parametrize("size", [(1, 1), (16, 80), (70, 9), (32, 17), (112, 144)])
@pytest.mark.parametrize("name", MODELS)
def test_the_second_decoder_reads_every_kind_of_grid(
    name: str, size: tuple[int, int], tissue: Any, tiny_installed: str, monkeypatch: Any
) -> None:
    image = tissue(*size, seed=5)
    if size == (1, 1):  # one colour would be a constant tile
        tile = learned_tile(name, image)
    else:
        tile = wsicodec.encode(image, model=name, quality=80)
    assert tile[5] == 1
    assert_both_decoders_agree(tile, files(name), monkeypatch)


def learned_tile(name: str, image: np.ndarray) -> bytes:
    model, encoder = encoder_of(find_model(name))
    return encode_tile(image, model, encoder, 120).pack()


@pytest.mark.parametrize("name", MODELS)
def test_pixels_are_the_same_on_every_run(name: str, tissue: Any, code: Any) -> None:
    tile = wsicodec.encode(tissue(64, 80, seed=4), model=name)
    first = wsicodec.decode(tile)
    for _ in range(3):
        np.testing.assert_array_equal(wsicodec.decode(tile), first)
    _, again = code(name, "runtime", tile, 0)  # a model loaded anew
    np.testing.assert_array_equal(again, first)


def test_shipped_models_are_tested() -> None:
    assert SHIPPED
