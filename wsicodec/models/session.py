"""onnxruntime sessions: built when first used, once per process, one thread each."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.errors import ModelError, RuntimeMissingError
from wsicodec.models.int8 import exact_kernels, int8_graph

INSTALL_LINE = 'pip install "wsicodec[cpu]"  (or "wsicodec[gpu]" on a machine with a CUDA GPU)'

Array = npt.NDArray[Any]

_runners: weakref.WeakSet[GraphRunner] = weakref.WeakSet()
_abandoned: list[Any] = []  # sessions of a parent process: never run nor destroyed in the child


def runtime() -> Any:
    """The onnxruntime module, or RuntimeMissingError with the install line."""
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissingError(
            f"learned tiles need onnxruntime, which is not installed: {INSTALL_LINE}"
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise RuntimeMissingError(
            "onnxruntime is broken: onnxruntime and onnxruntime-gpu overwrite each other's files. "
            f"Uninstall both, then: {INSTALL_LINE}"
        )
    return onnxruntime


class GraphRunner:
    """Runs one ONNX graph on the CPU. Thread-safe; rebuilt in forked children."""

    def __init__(self, graph: bytes, *, threads: int = 1, optimise: bool = True) -> None:
        self._graph, self._threads, self._optimise = graph, threads, optimise
        self._reset()
        _runners.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._session: Any = None

    def session(self) -> Any:
        """The session of this process."""
        if self._session is None:
            with self._lock:
                if self._session is None:
                    self._session = self._build()
        return self._session

    def _build(self) -> Any:
        return self._session_of(self._graph)

    def _session_of(self, graph: bytes) -> Any:
        ort = runtime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        # the arena keeps the largest tile's buffers for ever; tiles of many sizes would grow it
        options.enable_cpu_mem_arena = False
        if not self._optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own types, which differ by release
            raise ModelError(f"onnxruntime cannot load a graph of the model: {error}") from error

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Outputs in the graph's order."""
        outputs: list[Array] = self.session().run(None, dict(inputs))
        return [np.asarray(o) for o in outputs]


class IntegerRunner(GraphRunner):
    """Runs a proved integer graph on this machine's 8-bit kernels when they are exact.

    Whether they are is not taken on trust: the first use compares both forms on extreme inputs, and
    keeps the float32 form, which the proof covers, where they differ.
    """

    def _build(self) -> Any:
        plain = super()._build()
        if not exact_kernels():
            return plain
        fast = self._session_of(int8_graph(self._graph))
        rng = np.random.default_rng(0)
        for extreme in (False, True):
            inputs = {}
            for port in plain.get_inputs():
                low, high = (-127, 127) if port.name in ("context", "z") else (0, 255)
                grid = (4, 4) if port.name == "z" else (8, 8)
                x = rng.integers(low, high + 1, (1, port.shape[1], *grid)).astype(np.float32)
                inputs[port.name] = np.where(x > 0, np.float32(high), x) if extreme else x
            if any(
                not np.array_equal(a, b)
                for a, b in zip(plain.run(None, inputs), fast.run(None, inputs), strict=True)
            ):
                return plain
        return fast


def _after_fork() -> None:
    for runner in _runners:
        if runner._session is not None:
            _abandoned.append(runner._session)
        runner._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
