"""Cross-execution: what one way of running a model codes, every other decodes to the same pixels.

The integer graphs run under onnxruntime (one and two threads, optimised and not, alone and within
a batch), under torch where it is installed, and in int64 by the second decoder's interpreter. All
must give the same integers for every input that the format allows, so all code the same bytes.
Compared here: the graphs' outputs, bytes, symbols, pixels. The encoder's float networks, which
decide nothing that a decoder must know, run one way only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import second_decoder

import wsicodec
from wsicodec.codec import learned
from wsicodec.models import container
from wsicodec.models.decoder import DecoderModel, load_decoder
from wsicodec.models.session import GraphRunner
from wsicodec.models.store import encoder_of, find_model, models

Arrays = Mapping[str, np.ndarray]
Runner = Callable[[Arrays], list[np.ndarray]]

SHIPPED = tuple(record.name for record in models() if record.shipped and record.encoder_path)
MODELS = ("tiny", *SHIPPED)

# -- ways to run a graph --


def runtime(threads: int, optimise: bool, batch: int) -> Callable[[bytes], Runner]:
    """onnxruntime. batch: the inputs run last among others of their shape."""

    def build(graph: bytes) -> Runner:
        runner = GraphRunner(graph, threads=threads, optimise=optimise)

        def run(inputs: Arrays) -> list[np.ndarray]:
            mixed = {
                name: np.concatenate([*(np.roll(x, i, axis=-1) for i in range(1, batch)), x])
                for name, x in inputs.items()
            }
            return [output[-1:] for output in runner(mixed)]

        return run

    return build


def interpreter(graph: bytes) -> Runner:
    """int64 NumPy; the types are the graph's."""
    model = onnx.load_from_string(graph)
    types = {
        o.name: onnx.helper.tensor_dtype_to_np_dtype(o.type.tensor_type.elem_type)
        for o in model.graph.output
    }

    def run(inputs: Arrays) -> list[np.ndarray]:
        for x in inputs.values():
            assert (x == np.rint(x)).all()
        whole = {name: x[0].astype(np.int64) for name, x in inputs.items()}
        outputs = second_decoder.run_graph(model, whole)
        return [outputs[name].astype(types[name])[None] for name in types]

    return run


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
    "runtime": runtime(1, True, 1),
    "two threads": runtime(2, True, 1),
    "not optimised": runtime(1, False, 1),
    "batch of four": runtime(1, True, 4),
    "two threads, not optimised, batch of four": runtime(2, False, 4),
    "int64": interpreter,
    "torch": torch_if_installed,
}

# -- models --


def files(name: str) -> bytes:
    if name == "tiny":
        return (Path(__file__).parent / "conformance" / "tiny.wscm").read_bytes()
    return find_model(name).path.read_bytes()


def executed(file: bytes, build: Callable[[bytes], Runner]) -> DecoderModel:
    """The decoder model with all its graphs run this way."""
    model, graphs = load_decoder(file), container.parse(file).graphs
    model.hyper = build(graphs["hyper"])
    model.stages = [build(graphs[f"stage{k}"]) for k in range(len(model.stages))]
    model.chain = build(graphs["chain"])
    return model


@pytest.fixture
def code(
    tiny_installed: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str, Any, int], tuple[bytes, np.ndarray]]:
    """code(model name, execution, image or tile, quality): (tile, pixels) under an execution."""

    def run(name: str, execution: str, given: Any, quality: int) -> tuple[bytes, np.ndarray]:
        model = executed(files(name), EXECUTIONS[execution])
        calls, hyper = [], model.hyper

        def counted(inputs: Arrays) -> list[np.ndarray]:
            calls.append(inputs)
            return hyper(inputs)

        model.hyper = counted
        _, encoder = encoder_of(find_model(name))
        with monkeypatch.context() as patch:
            patch.setattr(learned, "encoder_of", lambda record: (model, encoder))
            patch.setattr(learned, "decoder_of_prefix", lambda prefix: model)
            tile = given
            if not isinstance(given, bytes):
                tile = wsicodec.encode(given, model=name, quality=quality)
            decoded = tile, wsicodec.decode(tile)
        assert len(calls) == (1 if given is tile else 2), "the execution under test did not run"
        return decoded

    return run


@pytest.mark.parametrize("execution", EXECUTIONS)
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


@pytest.mark.parametrize("quality", [1, 45, 70, 100])
@pytest.mark.parametrize("name", MODELS)
def test_the_second_decoder_reads_what_wsicodec_writes(
    name: str, quality: int, tissue: Any, tiny_installed: str
) -> None:
    tile = wsicodec.encode(tissue(47, 70, seed=3), model=name, quality=quality)
    second = second_decoder.decode(tile, [files(name)])
    error = np.abs(wsicodec.decode(tile).astype(int) - second.pixels)
    assert error.max() <= 2 and (error > 1).mean() <= 0.001


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
