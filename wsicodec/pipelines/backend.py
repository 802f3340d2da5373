"""Where a batch lives while it is decoded: arrays, kernels, networks and clocks of one place.

``HostBackend`` keeps NumPy arrays and calls the CPU decoder's own kernels; it is what the batched
decoder is tested with, and what it falls back to. ``wsicodec.pipelines.cuda`` has the other one.
Both run the same graphs, bound to the arrays' own memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from wsicodec.codec import cell
from wsicodec.codec.cell import BAD_HYPER, STEPS
from wsicodec.entropy.kernel import Decoder
from wsicodec.entropy.tables import SymbolTables
from wsicodec.errors import FormatError, WsicodecError
from wsicodec.models.decoder import Z_PEAK
from wsicodec.models.factors import OCTAVE_TABLE, Factors
from wsicodec.models.provider import Provider, session_of
from wsicodec.pipelines.images import Images

if TYPE_CHECKING:
    from wsicodec.models.decoder import DecoderModel

Array = Any
"""NumPy's, or a device array of numba; C-contiguous."""
Run = Callable[[], None]

FAULTY = 101
"""Status of a stream that is broken before its first symbol, beside those of the decoders."""

# compiled functions take their types from their arguments
_dequantise: Any = cell._dequantise
_shift_classes: Any = cell._shift_classes

_NO_MEANS = np.zeros((0, 0), np.int16)
_NO_FACTOR = np.zeros(0, np.int64)


class Streams(Protocol):
    """Entropy-coded streams of a batch. A broken one gets a status, and gives zeros from then on.

    state: (N,) int32 of the backend, 0 while all is well.
    """

    state: Array

    def decode(self, classes: Array, dependent: bool, levels: Array) -> None:
        """The next symbols: classes (N, channels, places) uint8 to levels int32, all written."""
        ...

    def close(self) -> None:
        """No more symbols will be read. Waits for nothing."""
        ...

    def errors(self) -> list[WsicodecError | None]:
        """What is wrong with each stream, once it is known; ``close`` comes first."""
        ...


class Backend(Protocol):
    """What the batched decoder asks of a place. Work goes on in the order of the calls; only
    ``fetch``, ``wait`` and ``Streams.errors`` wait for it.

    kind: name of the place. memory: bytes that a decoder may take there unless told otherwise.
    """

    kind: str
    memory: int

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array: ...

    def constant(self, values: npt.NDArray[Any]) -> Array:
        """An array that nobody writes to."""
        ...

    def put(self, target: Array, values: npt.NDArray[Any]) -> None:
        """Host to ``target``. ``values`` may change as soon as this returns."""
        ...

    def fill(self, target: Array, byte: int) -> None: ...

    def fetch(self, array: Array) -> npt.NDArray[Any]:
        """A copy on the host."""
        ...

    def images(self, pixels: Array, into: Images | None) -> Images:
        """A copy of pixels that is the caller's: a new one, or ``into``."""
        ...

    def mark(self) -> Any:
        """A moment in the order of the work."""
        ...

    def wait(self, mark: Any) -> None:
        """Until all work before the mark is done."""
        ...

    def seconds(self, first: Any, last: Any) -> float:
        """Between two marks that are past."""
        ...

    def network(self, graph: bytes) -> Network: ...

    def bind(
        self, network: Network, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> Run:
        """A call that runs a network from and to the memory of these arrays."""
        ...

    def tables(self, tables: SymbolTables) -> Any:
        """A model's tables, as ``streams`` takes them."""
        ...

    def factors(self, model: DecoderModel) -> Any:
        """A model's factors of all tilts, as the kernels take them."""
        ...

    def streams(self, payloads: Sequence[bytes], tables: Any, lanes: int) -> Streams: ...

    def hyper_latents(self, symbols: Array, z: Array, state: Array) -> None:
        """symbols int32 to z float32, same shape; 0 and a status where one is out of range."""
        ...

    def effective_gains(
        self, step: Array, indices: Array, gains: Array, plane: Array, chain: Array
    ) -> None:
        """step (N, 1, 2r, 2c) int8 and gain indices (N,) uint8 to effective ones: gains (N, R, C)
        uint8, plane (N, 1, R, C) float32 and, from 1 on, the last channel of chain, uint8."""
        ...

    def shift_classes(self, classes: Array, factors: Any, tilts: Array, first: int) -> None:
        """Classes (N, channels, places) of channels from ``first`` on, by the tiles' tilts."""
        ...

    def dequantise(
        self, levels: Array, means: Array | None, where: Array, gains: Array, factors: Any,
        tilts: Array, first: int, y: Array, chain: Array | None, real: Array | None, state: Array,
    ) -> None:  # fmt: skip
        """Levels (N, channels, places) to latents y (N, all channels, positions) and, where the
        stage is context, to its integers: chain uint8 (128 added), real float32."""
        ...


class Network:
    """One graph in a session of a provider."""

    def __init__(
        self, graph: bytes, provider: Provider, device: str = "cpu", stream: Any = None
    ) -> None:
        """stream: what the session works on and must not outlive."""
        self._session = session_of(graph, provider)
        self._provider, self._device, self._stream = provider, device, stream

    def bind(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], runs: Any = None
    ) -> Run:
        """A call that runs the graph from and to the memory of these arrays, which it keeps.

        runs: onnxruntime's options of a run.
        """
        binding, session = self._session.io_binding(), self._session
        for bind, ports in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, array in ports.items():
                bind(
                    name, self._device, self._provider.device, np.dtype(array.dtype).type,
                    tuple(array.shape), address_of(array),
                )  # fmt: skip
        kept = (dict(inputs), dict(outputs))

        def run(_kept: Any = kept) -> None:
            session.run_with_iobinding(binding, runs)

        return run


def address_of(array: Array) -> int:
    """Where an array's bytes begin."""
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        return int(array.ctypes.data)
    return int(interface["data"][0])


class HostStreams:
    """Streams read by the CPU's kernel, one after the other."""

    def __init__(self, payloads: Sequence[bytes], tables: SymbolTables, lanes: int) -> None:
        self.state = np.zeros(len(payloads), np.int32)
        self._errors: list[WsicodecError | None] = [None] * len(payloads)
        self._decoders: list[Decoder | None] = [None] * len(payloads)
        for n, payload in enumerate(payloads):
            try:
                self._decoders[n] = Decoder(payload, tables, lanes)
            except FormatError as error:
                self._fail(n, error)

    def _fail(self, n: int, error: WsicodecError) -> None:
        self.state[n], self._errors[n] = FAULTY, error

    def decode(self, classes: Array, dependent: bool, levels: Array) -> None:
        for n, decoder in enumerate(self._decoders):
            levels[n] = 0
            if decoder is None or self.state[n]:
                continue
            try:
                levels[n] = decoder.get(classes[n], dependent=dependent)
            except FormatError as error:
                self._fail(n, error)

    def close(self) -> None:
        for n, decoder in enumerate(self._decoders):
            if self.state[n] == BAD_HYPER:
                self._errors[n] = FormatError("a hyper-latent is beyond its range")
            elif not self.state[n] and decoder is not None:
                try:
                    decoder.finish()
                except FormatError as error:
                    self._fail(n, error)
            elif self._errors[n] is None:
                self._errors[n] = FormatError("a symbol is beyond the format's range")

    def errors(self) -> list[WsicodecError | None]:
        return list(self._errors)


class HostBackend:
    """NumPy arrays, the CPU decoder's kernels, onnxruntime's CPU provider in float32."""

    kind = "host"
    memory = 2**29

    def __init__(self, threads: int = 1) -> None:
        self._provider = Provider(threads=threads)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return np.empty(shape, dtype)

    def constant(self, values: npt.NDArray[Any]) -> Array:
        return values

    def put(self, target: Array, values: npt.NDArray[Any]) -> None:
        target[...] = values

    def fill(self, target: Array, byte: int) -> None:
        target.reshape(-1).view(np.uint8).fill(byte)

    def fetch(self, array: Array) -> npt.NDArray[Any]:
        return np.array(array)

    def images(self, pixels: Array, into: Images | None) -> Images:
        if into is None:
            return Images(pixels.copy())
        into.array[...] = pixels
        return into

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self, mark: Any) -> None:
        """All work is done when its call returns."""

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def network(self, graph: bytes) -> Network:
        return Network(graph, self._provider)

    def bind(
        self, network: Network, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> Run:
        return network.bind(inputs, outputs)

    def tables(self, tables: SymbolTables) -> SymbolTables:
        return tables

    def factors(self, model: DecoderModel) -> tuple[Factors, ...]:
        return model.factors

    def streams(self, payloads: Sequence[bytes], tables: SymbolTables, lanes: int) -> HostStreams:
        return HostStreams(payloads, tables, lanes)

    def hyper_latents(self, symbols: Array, z: Array, state: Array) -> None:
        beyond = (np.abs(symbols) > Z_PEAK).any(axis=(1, 2, 3))
        z[...] = np.where(beyond[:, None, None, None], 0, symbols)
        state[beyond & (state == 0)] = BAD_HYPER

    def effective_gains(
        self, step: Array, indices: Array, gains: Array, plane: Array, chain: Array
    ) -> None:
        rows, columns = gains.shape[1:]
        moved = step[:, 0, :rows, :columns].astype(np.int16) + indices[:, None, None]
        gains[...] = np.clip(moved, 0, 255)
        plane[:, 0] = gains
        chain[:, -1] = np.maximum(gains, 1)

    def shift_classes(
        self, classes: Array, factors: Sequence[Factors], tilts: Array, first: int
    ) -> None:
        for one, tilt in zip(classes, tilts, strict=True):
            _shift_classes(one, factors[tilt].shift[first : first + len(one)])

    def dequantise(
        self, levels: Array, means: Array | None, where: Array, gains: Array,
        factors: Sequence[Factors], tilts: Array, first: int, y: Array, chain: Array | None,
        real: Array | None, state: Array,
    ) -> None:  # fmt: skip
        end = first + levels.shape[1]
        places = np.arange(y.shape[2])
        for n, tilt in enumerate(tilts):
            f = factors[tilt]
            context = np.empty((0, len(places)), np.uint8)
            if chain is not None:
                context = chain[n].reshape(len(chain[n]), -1)[first:end]
            magnitudes = np.empty_like(context)
            fine = _dequantise(
                levels[n], _NO_MEANS if means is None else means[n], where, gains[n].reshape(-1),
                OCTAVE_TABLE, _NO_FACTOR if means is None else f.mean[first:end],
                f.context[first:end], f.inverse_gain[first:end], STEPS, y[n, first:end],
                context, magnitudes, places, 128,
            )  # fmt: skip
            if not fine and not state[n]:
                state[n] = FAULTY
            if real is not None:
                target = real[n].reshape(len(real[n]), -1)[first:end]
                target[:, where] = context[:, where].astype(np.float32) - 128
