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
            return ort.InferenceSession(self._graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own types, which differ by release
            raise ModelError(f"onnxruntime cannot load a graph of the model: {error}") from error

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Outputs in the graph's order."""
        outputs: list[Array] = self.session().run(None, dict(inputs))
        return [np.asarray(o) for o in outputs]


def _after_fork() -> None:
    for runner in _runners:
        if runner._session is not None:
            _abandoned.append(runner._session)
        runner._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
