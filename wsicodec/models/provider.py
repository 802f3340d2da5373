"""Which provider runs the graphs of a batch: the CPU's, or CUDA's where it truly works.

onnxruntime falls back to the CPU in silence, or with a line on stderr, where CUDA's libraries are
missing. Whether they work is therefore asked once per process, by a graph that has to come back
with the CUDA provider in its list.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsicodec.errors import RuntimeMissingError, UnsupportedError
from wsicodec.models.session import CPU, load_session, runtime

CUDA = "CUDAExecutionProvider"
INSTALL_CUDA = 'pip install "wsicodec[gpu]"'

_state = {"forked": False}


@dataclass(frozen=True)
class Provider:
    """Where sessions run.

    cuda: on CUDA, else on the CPU with ``threads`` threads. device: number of the GPU.
    stream: address of the CUDA stream that all work goes to; not 0, which onnxruntime takes for
        none. tf32: let convolutions round their operands to 11 bits. That keeps the integer graphs
        exact, by their proof; off unless asked for, all the same.
    graphs: record each run as a CUDA graph and play it back while shapes and buffers stay.
    """

    cuda: bool = False
    threads: int = 1
    device: int = 0
    stream: int = 0
    tf32: bool = False
    graphs: bool = False

    def options(self) -> dict[str, str]:
        """Options of the CUDA provider."""
        return {
            "device_id": str(self.device),
            "user_compute_stream": str(self.stream),
            "use_tf32": str(int(self.tf32)),
            "enable_cuda_graph": str(int(self.graphs)),
            "arena_extend_strategy": "kSameAsRequested",  # powers of two waste up to half
            # direct sums: transforms (Winograd, FFT) are not covered by the integer graphs' proof
            "cudnn_conv_algo_search": "DEFAULT",
        }


def session_of(graph: bytes, provider: Provider) -> Any:
    """An onnxruntime session. Raises ModelError where the graph does not load, UnsupportedError
    where onnxruntime would not run it on CUDA after all."""
    wanted: list[Any] = [(CUDA, provider.options()), CPU] if provider.cuda else [CPU]
    session = load_session(graph, wanted, threads=provider.threads)
    if provider.cuda and CUDA not in session.get_providers():
        raise UnsupportedError(f"onnxruntime fell back to {', '.join(session.get_providers())}")
    return session


def cuda_problem() -> str | None:
    """Why CUDA cannot be used in this process, None where it can."""
    if _state["forked"]:
        return "this process was forked from one that used CUDA; start workers by spawn"
    return _problem()


@functools.cache
def _problem() -> str | None:
    ort = runtime()
    if CUDA not in ort.get_available_providers():
        return f"onnxruntime {ort.__version__} is built without CUDA"
    try:
        cuda: Any = importlib.import_module("numba.cuda")
        if not cuda.is_available():
            return "no CUDA device or driver is found"
    except Exception as error:  # numba raises its own types where parts of CUDA are missing
        return f"numba cannot use CUDA: {type(error).__name__}: {error}"
    if hasattr(ort, "preload_dlls") and importlib.util.find_spec("nvidia") is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it lacks
            ort.preload_dlls()  # CUDA from wheels, which no loader finds by itself
    try:
        stream = cuda.stream()
        session = session_of(_doubling(), Provider(cuda=True, stream=int(stream)))
        found = session.run(None, {"x": np.ones(4, np.float32)})[0]
        del session  # before its stream
    except Exception as error:
        return f"onnxruntime cannot run on CUDA: {error}"
    if not (found == 2).all():
        return "onnxruntime computes wrongly on CUDA"
    return None


def _doubling() -> bytes:
    """A graph of one addition."""
    from onnx import TensorProto, helper

    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    node = helper.make_node("Add", ["x", "x"], ["y"])
    graph = helper.make_graph([node], "doubling", ports[:1], ports[1:])
    opset = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())


def cuda_expected() -> bool:
    """Whether a GPU's driver and an onnxruntime for CUDA are both there: CUDA should work."""
    return Path("/proc/driver/nvidia/version").exists() and (
        CUDA in runtime().get_available_providers()
    )


def require_cuda() -> None:
    """Raise RuntimeMissingError, with reason and install line, where CUDA cannot be used."""
    if (problem := cuda_problem()) is not None:
        raise RuntimeMissingError(f"device 'cuda' cannot be used: {problem}. {INSTALL_CUDA}")


def _after_fork() -> None:
    # a CUDA context does not survive a fork
    if _problem.cache_info().currsize and _problem() is None:
        _state["forked"] = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
