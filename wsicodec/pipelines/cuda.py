"""Batches on a CUDA GPU: numba's arrays and kernels, onnxruntime's networks, one stream for both.

Networks read and write the arrays of the kernels, by address and in the order of the stream, so
that nothing is copied and nobody waits between steps. The host only enqueues: while one batch is
computed, the next is parsed, copied to pinned memory and uploaded.

Not run on a GPU so far: tested on the host backend and, kernels and order of work, in numba's
simulator.
"""

from __future__ import annotations

import importlib
import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wsicodec.entropy.tables import SymbolTables
from wsicodec.models.provider import Provider
from wsicodec.models.session import runtime
from wsicodec.pipelines.backend import Array, Network, Run, Streams
from wsicodec.pipelines.images import Images

if TYPE_CHECKING:
    from wsicodec.models.decoder import DecoderModel

SHARE_OF_MEMORY = 0.5
"""Of the GPU's free memory that decoders may take unless told otherwise."""
LEAST_BLOCK = 2**12


class _Pinned:
    """Page-locked host memory in blocks of powers of two, which the GPU copies from by itself."""

    def __init__(self, allocate: Any) -> None:
        self._allocate = allocate
        self._free: dict[int, list[npt.NDArray[np.uint8]]] = {}

    def take(self, count: int, dtype: Any, lease: list[npt.NDArray[np.uint8]]) -> npt.NDArray[Any]:
        """A flat array; its block joins ``lease``, to be given back."""
        needed = count * np.dtype(dtype).itemsize
        size = max(LEAST_BLOCK, 1 << max(0, needed - 1).bit_length())
        free = self._free.setdefault(size, [])
        block = free.pop() if free else self._allocate(size, np.uint8)
        lease.append(block)
        found: npt.NDArray[Any] = block[:needed].view(dtype)
        return found

    def give_back(self, lease: list[npt.NDArray[np.uint8]]) -> None:
        for block in lease:
            self._free[len(block)].append(block)
        lease.clear()


class CudaBackend:
    """A GPU. Implements ``wsicodec.pipelines.backend.Backend``."""

    kind = "cuda"

    def __init__(
        self,
        device: int = 0,
        *,
        tf32: bool = False,
        graphs: bool = False,
        memory: int | None = None,
    ) -> None:
        """tf32, graphs: see ``Provider``. memory: bytes; by default half of what is free.

        Ask ``wsicodec.models.provider.require_cuda`` first.
        """
        from wsicodec.pipelines import kernels_cuda

        kernels: Any = kernels_cuda
        cuda: Any = importlib.import_module("numba.cuda")
        self._cuda, self._kernels, self.device = cuda, kernels, device
        self._choose_device()
        self.stream = cuda.stream()
        self._graphs = itertools.count(1) if graphs else None
        self._provider = self._provided(tf32, graphs)
        self.memory = memory or self._free_memory()
        self._pinned = _Pinned(cuda.pinned_array)
        self._lease: list[npt.NDArray[np.uint8]] = []

    # what numba's simulator lacks

    def _choose_device(self) -> None:
        self._cuda.select_device(self.device)

    def _provided(self, tf32: bool, graphs: bool) -> Provider:
        return Provider(
            cuda=True, device=self.device, stream=int(self.stream), tf32=tf32, graphs=graphs
        )

    def _free_memory(self) -> int:
        free, _ = self._cuda.current_context().get_memory_info()
        return int(SHARE_OF_MEMORY * free)

    # -- arrays --

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return self._cuda.device_array(shape, dtype)

    def constant(self, values: npt.NDArray[Any]) -> Array:
        return self._cuda.to_device(np.array(values))  # numba takes no read-only arrays

    def put(self, target: Array, values: npt.NDArray[Any]) -> None:
        staged = self._pinned.take(values.size, values.dtype, self._lease).reshape(values.shape)
        staged[...] = values
        target.copy_to_device(staged, stream=self.stream)

    def fill(self, target: Array, byte: int) -> None:
        driver: Any = importlib.import_module("numba.cuda.cudadrv.driver")
        size = int(np.prod(target.shape)) * np.dtype(target.dtype).itemsize
        driver.device_memset(target.reshape(-1), byte, size, self.stream)

    def fetch(self, array: Array) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = array.copy_to_host(stream=self.stream)
        self.stream.synchronize()
        return found

    def images(self, pixels: Array, into: Images | None) -> Images:
        if into is None:
            into = Images(self.empty(tuple(pixels.shape), np.uint8), self.device)
        into.array.copy_to_device(pixels, stream=self.stream)
        return into

    # -- time --

    def mark(self) -> Any:
        event = self._cuda.event(timing=True)
        event.record(self.stream)
        return event

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def seconds(self, first: Any, last: Any) -> float:
        return float(self._cuda.event_elapsed_time(first, last)) / 1000

    # -- networks --

    def network(self, graph: bytes) -> Network:
        return Network(graph, self._provider, "cuda", self.stream)

    def bind(
        self, network: Network, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> Run:
        options = runtime().RunOptions()
        # the stream keeps the order; to wait for each network would part the batch
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self._graphs is not None:
            # a recording belongs to the addresses that it was made with
            options.add_run_config_entry("gpu_graph_id", str(next(self._graphs)))
        return network.bind(inputs, outputs, options)

    # -- kernels --

    def tables(self, tables: SymbolTables) -> Any:
        return self._kernels.CudaTables(tables, self.stream)

    def factors(self, model: DecoderModel) -> Any:
        return self._kernels.CudaFactors(model.factors, self.stream)

    def streams(self, payloads: Sequence[bytes], tables: Any, lanes: int) -> Streams:
        """Begins a batch: what is put from now on is staged in memory that its streams keep."""
        lease: list[npt.NDArray[np.uint8]] = []

        def staging(count: int, dtype: Any) -> npt.NDArray[Any]:
            return self._pinned.take(count, dtype, lease)

        streams: Streams = self._kernels.CudaStreams(payloads, tables, lanes, self.stream, staging)
        self._lease = lease
        weakref.finalize(streams, self._pinned.give_back, lease).atexit = False
        return streams

    def hyper_latents(self, symbols: Array, z: Array, state: Array) -> None:
        self._kernels.hyper_latents(symbols, z, state, self.stream)

    def effective_gains(
        self, step: Array, indices: Array, gains: Array, plane: Array, chain: Array
    ) -> None:
        self._kernels.effective_gains(step, indices, gains, plane, chain, self.stream)

    def shift_classes(self, classes: Array, factors: Any, tilts: Array, first: int) -> None:
        self._kernels.shift_classes(classes, factors, tilts, first, self.stream)

    def dequantise(
        self, levels: Array, means: Array | None, where: Array, gains: Array, factors: Any,
        tilts: Array, first: int, y: Array, chain: Array | None, real: Array | None, state: Array,
    ) -> None:  # fmt: skip
        self._kernels.dequantise(
            levels, means, where, gains, factors, tilts, first, y, chain, real, state, self.stream
        )
