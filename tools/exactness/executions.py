"""Ways to run a decoder model's networks, all of which must give the same integers.

An execution makes a ``DecoderModel`` from a model's file. What walks through cells asks it for
nothing else, so one more entry of ``EXECUTIONS`` is all that comparing a new backend takes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from wsicodec.models import container
from wsicodec.models.decoder import DecoderModel, load_decoder
from wsicodec.models.int8 import exact_kernels
from wsicodec.models.lattice import lattice_positions
from wsicodec.models.session import GraphRunner, IntegerRunner, StageRunner, runtime
from wsicodec.models.vnni import available

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import second_decoder  # (tests/ is no package)

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
Runner = Callable[[Arrays], list[Array]]
"""A graph with its inputs and outputs as docs/format.md has them, under a batch axis."""


class NotHereError(Exception):
    """This machine, or this model, has no such execution; the message says why."""


# -- one graph --


def onnxruntime_of(
    *, threads: int = 1, level: str = "ENABLE_ALL", batch: int = 1
) -> Callable[[bytes], Runner]:
    """float32 kernels of onnxruntime on the CPU.

    level: of graph optimisation: DISABLE_ALL, ENABLE_BASIC, ENABLE_EXTENDED or ENABLE_ALL. batch:
    the inputs run last among as many of their shape.
    """

    def build(graph: bytes) -> Runner:
        ort = runtime()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

        def run(inputs: Arrays) -> list[Array]:
            mixed = {
                name: np.concatenate([*(np.roll(x, i, axis=-1) for i in range(1, batch)), x])
                for name, x in inputs.items()
            }
            count = len(next(iter(inputs.values())))
            return [np.asarray(output)[-count:] for output in session.run(None, mixed)]

        return run

    return build


def interpreter(graph: bytes) -> Runner:
    """int64 NumPy; the types are the graph's."""
    model = onnx.load_from_string(graph)
    types = {
        o.name: onnx.helper.tensor_dtype_to_np_dtype(o.type.tensor_type.elem_type)
        for o in model.graph.output
    }

    def run(inputs: Arrays) -> list[Array]:
        for x in inputs.values():
            assert (x == np.rint(x)).all()
        found = []
        for n in range(len(next(iter(inputs.values())))):
            whole = {name: x[n].astype(np.int64) for name, x in inputs.items()}
            found.append(second_decoder.run_graph(model, whole))
        return [np.stack([f[name].astype(types[name]) for f in found]) for name in types]

    return run


# -- a model --


def real(inputs: Arrays) -> dict[str, Array]:
    """Inputs of float32 graphs from those of ``IntegerRunner``."""
    kept = {n: x.astype(np.float32) for n, x in inputs.items() if n != "magnitude"}
    return {n: x - 128 if n == "context" else x for n, x in kept.items()}


def on_lattice(outputs: list[Array], lattice: int) -> list[Array]:
    """Outputs (N, channels, rows, columns) at the positions of a lattice."""
    where = lattice_positions(lattice, *outputs[0].shape[2:])
    return [np.ascontiguousarray(x.reshape(*x.shape[:2], -1)[..., where]) for x in outputs]


def whole_graphs(file: bytes, build: Callable[[bytes], Runner]) -> DecoderModel:
    """The model with all its graphs run this way, as the file has them."""
    model, graphs = load_decoder(file, fused=False), container.parse(file).graphs

    def hyper() -> Runner:
        run = build(graphs["hyper"])

        def call(inputs: Arrays) -> list[Array]:
            h, step = run(real(inputs))
            return [h.astype(np.uint8), step]

        return call

    def stage(k: int, lattice: int) -> Runner:
        run = build(graphs[f"stage{k}"])
        return lambda inputs: on_lattice(run(real(inputs)), lattice)

    stages = [stage(k, s.lattice) for k, s in enumerate(model.architecture.stages)]
    chain = build(graphs["chain"])
    model.graphs = replace(model.graphs, hyper=hyper(), stages=stages, chain=chain)  # type: ignore[arg-type]
    return model


def compiled_programs(file: bytes) -> DecoderModel:
    """One program of 8-bit dot products for all networks (``wsicodec.models.fused``)."""
    if not available():
        raise NotHereError("this CPU has no AVX-512 with VNNI")
    model = load_decoder(file)
    if model.fused is None:
        raise NotHereError("the model's graphs are not of the form that programs take")
    return model


def eight_bit_kernels(file: bytes) -> DecoderModel:
    """onnxruntime's 8-bit kernels, graphs cut to their lattices."""
    if not exact_kernels():
        raise NotHereError("this CPU has no exact 8-bit dot products")
    model = load_decoder(file, fused=False)
    inputs = model.graphs.hyper.session().get_inputs()
    # float32 where the first use found them missing or different
    if any(port.type != "tensor(uint8)" for port in inputs if port.name != "z"):
        raise NotHereError("8-bit kernels are missing or differ here: float32 takes their place")
    return model


def float_kernels(file: bytes) -> DecoderModel:
    """onnxruntime's float32 kernels, graphs cut to their lattices: CPUs without 8-bit products."""
    model, graphs = load_decoder(file, fused=False), container.parse(file).graphs
    stages = [
        StageRunner(graphs[f"stage{k}"], stage.lattice, eight_bit=False)
        for k, stage in enumerate(model.architecture.stages)
    ]
    hyper = IntegerRunner(graphs["hyper"], eight_bit=False)
    model.graphs = replace(
        model.graphs, hyper=hyper, stages=stages, chain=GraphRunner(graphs["chain"])
    )
    return model


EXACT = "int64"
EXECUTIONS: dict[str, Callable[[bytes], DecoderModel]] = {
    "compiled": compiled_programs,
    "8 bits": eight_bit_kernels,
    "float32": float_kernels,
    "float32, whole graphs, two threads": lambda file: whole_graphs(
        file, onnxruntime_of(threads=2)
    ),
    "float32, not optimised": lambda file: whole_graphs(file, onnxruntime_of(level="DISABLE_ALL")),
    "float32, basic optimisation": lambda file: whole_graphs(
        file, onnxruntime_of(level="ENABLE_BASIC")
    ),
    "float32, extended optimisation": lambda file: whole_graphs(
        file, onnxruntime_of(level="ENABLE_EXTENDED")
    ),
    "float32, last of 16": lambda file: whole_graphs(file, onnxruntime_of(batch=16)),
    EXACT: lambda file: whole_graphs(file, interpreter),
}
"""By name. Each takes a model's file and raises NotHereError."""
