"""onnxruntime sessions: built when first used, once per process, one thread each."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.errors import ModelError, RuntimeMissingError
from wsicodec.models.int8 import EIGHT_BIT_INPUTS, MAGNITUDE, exact_kernels, int8_graph
from wsicodec.models.lattice import lattice_graph, lattice_positions

INSTALL_LINE = 'pip install "wsicodec[cpu]"  (or "wsicodec[gpu]" on a machine with a CUDA GPU)'
CPU = "CPUExecutionProvider"

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


def load_session(
    graph: bytes, providers: Sequence[Any], *, threads: int = 1, optimise: bool = True
) -> Any:
    """An onnxruntime session on the first of the providers that works; ModelError where the graph
    does not load."""
    ort = runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    # the arena keeps the largest tile's buffers for ever; tiles of many sizes would grow it
    options.enable_cpu_mem_arena = False
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(graph, options, providers=list(providers))
    except Exception as error:  # onnxruntime's own types, which differ by release
        raise ModelError(f"onnxruntime cannot load a graph of the model: {error}") from error


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
        return load_session(graph, [CPU], threads=self._threads, optimise=self._optimise)

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Outputs in the graph's order."""
        outputs: list[Array] = self.session().run(None, dict(inputs))
        return [np.asarray(o) for o in outputs]


class IntegerRunner(GraphRunner):
    """Runs a proved integer graph on this machine's 8-bit kernels when they are exact.

    Whether they are is not taken on trust: the first use compares both forms on extreme inputs, and
    keeps the float32 form, which the proof covers, where they differ or a kernel is missing. Either
    way, inputs are those of ``int8``: ``h``, ``plane``, ``context`` and its ``magnitude`` in uint8
    (``z`` in float32), and ``h`` comes out as uint8.
    """

    def __init__(self, graph: bytes, *, eight_bit: bool = True, optimise: bool = True) -> None:
        super().__init__(graph, optimise=optimise)
        self._wanted = eight_bit

    def _build(self) -> Any:
        plain = super()._build()
        self._ports = [port.name for port in plain.get_inputs()]
        self._eight_bit = False
        if not self._wanted or not exact_kernels():
            return plain
        try:
            fast = self._session_of(int8_graph(self._graph))
        except ModelError:  # a release without one of the kernels: 1.20 has no 8-bit DepthToSpace
            return plain
        rng = np.random.default_rng(0)
        for extreme in (False, True):
            inputs: dict[str, Array] = {}
            for port in plain.get_inputs():
                grid = (4, 4) if port.name == "z" else (8, 8)
                low, high = (-127, 127) if port.name in ("context", "z") else (0, 255)
                x = rng.integers(low, high + 1, (1, port.shape[1], *grid))
                x = np.where(x > 0, high, x) if extreme else x
                added = EIGHT_BIT_INPUTS.get(port.name)
                inputs[port.name] = x.astype(np.float32) if added is None else _levels(x, added)
                if port.name == "context":
                    inputs[MAGNITUDE] = _levels(np.abs(x), EIGHT_BIT_INPUTS[MAGNITUDE])
            ports = {port.name for port in fast.get_inputs()}
            quick = fast.run(None, {n: x for n, x in inputs.items() if n in ports})
            slow = plain.run(None, self._real(inputs))
            if not all(np.array_equal(a, b) for a, b in zip(slow, quick, strict=True)):
                return plain
        self._ports = [port.name for port in fast.get_inputs()]
        self._eight_bit = True
        return fast

    def _real(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs of the float32 form."""
        real = {}
        for name in self._ports:
            x = inputs[name].astype(np.float32)
            real[name] = x - EIGHT_BIT_INPUTS[name] if EIGHT_BIT_INPUTS.get(name) else x
        return real

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Outputs in the graph's order."""
        session = self.session()
        if self._eight_bit:
            given = {name: inputs[name] for name in self._ports}
        else:
            given = self._real(inputs)
        outputs = session.run(None, given)
        return [o.astype(np.uint8) if o.dtype == np.float32 else o for o in outputs]


def _levels(x: Array, added: int) -> Array:
    return (x + added).astype(np.uint8)


class StageRunner:
    """Runs a stage's graph on the positions of its lattice: outputs (N, channels, positions).

    On a grid of one row or column some part of a lattice is empty, which runtimes do not take:
    there the graph runs at all positions.
    """

    def __init__(
        self, graph: bytes, lattice: int, *, eight_bit: bool = True, optimise: bool = True
    ) -> None:
        self._graph, self._lattice = graph, lattice
        self._eight_bit, self._optimise = eight_bit, optimise
        self._made: dict[int, IntegerRunner] = {}

    def _runner(self, lattice: int) -> IntegerRunner:
        """The graph cut to a lattice when it first runs: where programs are compiled, never."""
        made = self._made.get(lattice)
        if made is not None:
            return made
        # no lock, which a fork could find taken: of two threads' runners one is kept
        graph = lattice_graph(self._graph, lattice)
        runner = IntegerRunner(graph, eight_bit=self._eight_bit, optimise=self._optimise)
        return self._made.setdefault(lattice, runner)

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Outputs in the graph's order."""
        rows, columns = inputs["plane"].shape[2:]
        if min(rows, columns) > 1 or not self._lattice:
            return self._runner(self._lattice)(inputs)
        where = lattice_positions(self._lattice, rows, columns)
        return [np.ascontiguousarray(o[:, :, where]) for o in self._runner(0)(inputs)]


def _after_fork() -> None:
    for runner in _runners:
        if runner._session is not None:
            _abandoned.append(runner._session)
        runner._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
