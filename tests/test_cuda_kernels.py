"""The CUDA kernels against the CPU's decoder, to the bit, on machines without a GPU.

The checks below run in two places:

- *compiled*, in this process: numba compiles the kernels' own source for the CPU, each thread a
  generator that yields at every barrier. Integers have the types that they have on a GPU, and
  threads of a block meet at the same barriers or the run fails. Fast enough for real tiles.
- *simulated*, in a process of its own: numba's CUDA simulator, with its launches, threads, shared
  memory and device arrays, in plain Python.

Neither is a GPU. Where NVIDIA's compiler library is installed, kernels are also compiled for one.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from test_entropy import (
    encoded,
    laplace_weights,
    levels_of,
    random_arrays,
    scale_of,
)

import wsicodec
from wsicodec.bitstream import parse
from wsicodec.codec import cell
from wsicodec.entropy import kernel, reference
from wsicodec.entropy.tables import CLASSES, SymbolTables, tables_from_weights
from wsicodec.errors import FormatError, LimitError, WsicodecError
from wsicodec.models.decoder import Z_PEAK, DecoderModel, load_decoder
from wsicodec.models.factors import MAX_FACTOR, OCTAVE_TABLE, Factors, tilted
from wsicodec.models.lattice import lattice_positions
from wsicodec.models.store import decoder_of_prefix
from wsicodec.pipelines import kernels_cuda as kernels

CONFORMANCE = Path(__file__).parent / "conformance"
LANES = (1, 2, 4, 8, 16, 32)

# ---------------------------------------------------------------------------- the compiled place


class HostArray(np.ndarray):
    """What launchers ask of a device array."""

    def copy_to_device(self, values: np.ndarray, stream: Any = 0) -> None:
        assert values.shape == self.shape and values.dtype == self.dtype
        self[...] = values

    def copy_to_host(self, target: np.ndarray | None = None, stream: Any = 0) -> np.ndarray:
        if target is None:
            return np.array(self)
        target[...] = self
        return target


def on_host(values: np.ndarray, stream: Any = 0) -> HostArray:
    return np.array(values, order="C").view(HostArray)


def blank(shape: Any, dtype: Any, stream: Any = 0) -> HostArray:
    found = np.empty(shape, dtype).view(HostArray)
    found.view(np.uint8).fill(0xA5)
    return found


class Event:
    def record(self, stream: Any = 0) -> None: ...

    def synchronize(self) -> None: ...


CUDA = kernels.cuda
HOST = types.SimpleNamespace(jit=CUDA.jit, to_device=on_host, device_array=blank, event=Event)
COMPILED: dict[Any, Any] = {}
LAUNCHED: dict[tuple[str, Any], tuple[Any, Any]] = {}
"""Kernels and the types of the arguments that they were called with."""


def compiled_source(function: Any) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """A kernel's function for the CPU, and what its shared arrays are made of, by name.

    It takes block, thread, blocks, threads and the shared arrays before its arguments.
    """
    if function.__code__ in COMPILED:
        return COMPILED[function.__code__]
    names = dict(function.__globals__)
    for name, value in inspect.getclosurevars(function).globals.items():
        if hasattr(value, "py_func"):
            names[name] = compiled_source(value.py_func)[0]
    source = textwrap.dedent(inspect.getsource(function))
    device = "device=True" in inspect.getsource(kernels._inline) and "@_inline" in source
    source = source[source.index("def ") :]
    shared: dict[str, str] = {}

    def taken(match: re.Match[str]) -> str:
        shared[match[1]] = match[2]
        return f"{match[1]} = shared_{match[1]}"

    source = re.sub(r"(\w+) = cuda\.shared\.array(\(.*\))", taken, source)
    if not device:
        added = ["block", "thread_", "blocks", "threads_", *(f"shared_{name}" for name in shared)]
        source = source.replace("(", f"({', '.join(added)}, ", 1)
    for what, instead in {
        r"cuda\.blockIdx\.x": "block", r"cuda\.threadIdx\.x": "thread_",
        r"cuda\.gridDim\.x": "blocks", r"cuda\.blockDim\.x": "threads_",
        r"cuda\.grid\(1\)": "(block * threads_ + thread_)", r"cuda\.syncthreads\(\)": "yield 0",
        r"cuda\.const\.array_like": "", r"\blanes\b": "threads_",
    }.items():  # fmt: skip
        source = re.sub(what, instead, source)
    assert "cuda." not in source
    found: dict[str, Any] = {}
    exec(source, names, found)
    (body,) = found.values()
    COMPILED[function.__code__] = numba.njit(body), shared, names
    return COMPILED[function.__code__]


class Launcher:
    """Stands for a kernel: runs its blocks one by one, their threads from barrier to barrier."""

    def __init__(self, kernel: Any) -> None:
        self.function = kernel.py_func
        self.order = np.random.default_rng(0)

    def __getitem__(self, configuration: tuple[int, int, Any]) -> Callable[..., None]:
        blocks, threads, _ = configuration

        def launch(*arguments: Any) -> None:
            given = [np.asarray(a) if isinstance(a, np.ndarray) else a for a in arguments]
            assert all(a.flags.c_contiguous for a in given if isinstance(a, np.ndarray))
            signature = tuple(numba.typeof(a) for a in given)
            LAUNCHED[self.function.__qualname__, signature] = self.function, signature
            run, shared, names = compiled_source(self.function)
            for block in range(blocks):
                memory = []
                for text in shared.values():
                    shape, dtype = eval(text, names | {"threads_": threads, "lanes": threads})
                    memory.append(np.full(shape, 77, dtype))
                made = [run(block, t, blocks, threads, *memory, *given) for t in range(threads)]
                waiting: list[Iterator[int]] = [g for g in made if g is not None]
                while waiting:
                    # threads of a block come to a barrier in any order, and all of them or none
                    left = [waiting[i] for i in self.order.permutation(len(waiting))]
                    arrived = [g for g in left if next(g, None) is not None]
                    assert len(arrived) in (0, len(waiting)), "not all threads meet"
                    waiting = arrived

        return launch


KERNELS = ("_gather", "_end", "_shift", "_dequantise", "_hyper_latents", "_effective_gains")


@pytest.fixture(scope="module", autouse=True)
def compiled() -> Iterator[None]:
    """Kernels of this process are those compiled for the CPU."""
    made = kernels._decoder
    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            patch.setattr(kernels, name, Launcher(getattr(kernels, name)))
        patch.setattr(kernels, "_decoder", lambda lanes: Launcher(made(lanes)))
        patch.setattr(kernels, "cuda", HOST)
        patch.setattr(kernels, "GATHERERS", 32)
        yield


# ---------------------------------------------------------------- streams, in either place


def some_tables() -> SymbolTables:
    return tables_from_weights(
        [laplace_weights(scale_of(c), u) for u in (0, 1) for c in range(1, 56)]
    )


def escaping_tables() -> SymbolTables:
    """Of many escapes, and many raw bits."""
    return tables_from_weights(
        [np.array([1.0, 4, 1, 2])] * 15 + [np.array([1.0, 1, 3, 1, 1, 2])] * 15
    )


Arrays = list[tuple[np.ndarray, bool]]
"""Classes (channels, places) and whether symbols are dependent."""


def cpu_outcome(
    payload: bytes, arrays: Arrays, tables: SymbolTables, lanes: int
) -> tuple[list[np.ndarray], WsicodecError | None]:
    """What the CPU's decoder makes of a stream: the arrays that it could read, and its error."""
    values: list[np.ndarray] = []
    try:
        decoder = kernel.Decoder(payload, tables, lanes)
        for classes, dependent in arrays:
            values.append(decoder.get(classes, dependent=dependent))
        decoder.finish()
    except WsicodecError as error:
        return values, error
    return values, None


def same_error(first: WsicodecError | None, second: WsicodecError | None) -> bool:
    return type(first) is type(second) and str(first) == str(second)


EARLY, ESCAPE, LEFT = "data ends early", "an escape is beyond", "does not end where"


def check_batch(
    payloads: list[bytes], arrays: list[Arrays], tables: SymbolTables, lanes: int
) -> list[str]:
    """A batch gives every tile what the CPU gives it alone, errors too. Returns their texts.

    arrays: by tile; of equal shapes.
    """
    streams = kernels.CudaStreams(payloads, kernels.CudaTables(tables), lanes)
    found = []
    for batch in zip(*arrays, strict=True):
        classes = np.stack([classes for classes, _ in batch])
        levels = np.full(classes.shape, 7_777_777, np.int32)
        device = kernels.cuda.to_device(levels)
        streams.decode(kernels.cuda.to_device(classes), batch[0][1], device)
        found.append(device.copy_to_host())
        assert (abs(found[-1]) <= cell.LEVEL_PEAK).all()
    errors = streams.errors()
    for n, (payload, own) in enumerate(zip(payloads, arrays, strict=True)):
        values, error = cpu_outcome(payload, own, tables, lanes)
        assert same_error(errors[n], error), (n, errors[n], error)
        for levels, value in zip(found, values, strict=False):
            np.testing.assert_array_equal(levels[n], value)
        for levels in found[len(values) + 1 :]:
            assert not levels[n].any()  # idle
    return ["" if error is None else str(error) for error in errors]


def coded_batch(
    tables: SymbolTables, lanes: int, sizes: list[int], tiles: int, seed: int = 0
) -> tuple[list[bytes], list[Arrays]]:
    """Streams of random arrays, independent and dependent by turns."""
    made = [random_arrays(np.random.default_rng((seed, n)), sizes, lanes) for n in range(tiles)]
    # few, many and no symbols at all beside one another
    for n, arrays in enumerate(made[1:], 1):
        for k, (values, classes, dependent) in enumerate(arrays):
            gone = np.random.default_rng((n, k)).random(len(classes)) < (0.9, 1.0)[n % 2 * (k % 2)]
            classes[gone] = 0
            values[gone] = 0
            if dependent:
                indices = np.clip(values // 2, -70_000, 70_000)
                values[:] = levels_of(np.where(classes, indices, 0), classes, lanes)
    payloads = [encoded(arrays, tables, lanes) for arrays in made]
    shaped: list[Arrays] = [[(c.reshape(1, -1), d) for _, c, d in arrays] for arrays in made]
    return payloads, shaped


def check_streams(lanes: int, sizes: list[int], tiles: int) -> None:
    tables = some_tables()
    payloads, arrays = coded_batch(tables, lanes, sizes, tiles, lanes)
    assert check_batch(payloads, arrays, tables, lanes) == [""] * tiles


def check_damage(lanes: int, sizes: list[int], tiles: int) -> None:
    """Every second tile is damaged; those between are not."""
    tables = some_tables()
    rng = np.random.default_rng(lanes)
    payloads, arrays = coded_batch(tables, lanes, sizes, 1)
    batch = []
    for n in range(tiles):
        bad = bytearray(payloads[0])
        for _ in range(n % 2 * rng.integers(1, 4)):
            bad[rng.integers(len(bad))] = rng.integers(256)
        batch.append(bytes(bad))
    texts = check_batch(batch, arrays * tiles, tables, lanes)
    assert set(texts[::2]) == {""} and set(texts[1::2]) != {""}


def check_truncations(lanes: int, step: int) -> None:
    tables = some_tables()
    payloads, arrays = coded_batch(tables, lanes, [20, 120, 10, 60], 1)
    cuts = [payloads[0][:size] for size in range(0, len(payloads[0]), step)]
    texts = check_batch([*cuts, payloads[0]], arrays * (len(cuts) + 1), tables, lanes)
    assert "" not in texts[:-1] and texts[-1] == "" and len(set(texts)) >= 4


def check_last_words(lanes: int) -> None:
    """Streams without their last word, which may belong to a symbol of any kind."""
    tables = some_tables()
    batch, arrays = [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        classes = rng.integers(1, 128 if seed % 2 else 30, 3 + lanes).astype(np.uint8)
        values = np.rint(rng.laplace(0, [scale_of(c) for c in classes])).astype(np.int32)
        payload = encoded([(values, classes, False)], tables, lanes)
        if len(payload) > 4 * lanes:
            batch.append(payload[:-2])
            arrays.append([(classes[None], False)])
    texts = check_batch(batch, arrays, tables, lanes)
    assert len(texts) > 50 and "" not in texts and sum(EARLY in text for text in texts) > 50


def check_escapes(lanes: int, symbols: int) -> None:
    """Nearly all symbols are escapes, those at the ends of arrays too."""
    tables = escaping_tables()
    rng = np.random.default_rng(symbols)
    classes = rng.integers(1, 60, symbols).astype(np.uint8)
    made = []
    for _ in range(3):
        indices = np.int64(2 ** rng.uniform(0, 20, symbols)) * rng.choice([-1, 1], symbols)
        levels = levels_of(indices, classes, lanes)
        made += [(levels, classes, True), (indices.astype(np.int32), classes, False)]
    payload = encoded(made, tables, lanes)
    arrays: Arrays = [(classes[None], dependent) for _, _, dependent in made]
    assert check_batch([payload] * 2, [arrays] * 2, tables, lanes) == ["", ""]


def check_noise(tiles: int, symbols: int, dependent: bool) -> set[str]:
    """Escapes of all lengths, ends among their fields, values beyond the range: who is first?"""
    tables = escaping_tables()
    rng = np.random.default_rng(symbols)
    payloads, arrays = [], []
    for _ in range(tiles):
        states = rng.integers(2**16, 2**32, 4).astype("<u4").tobytes()
        payloads.append(states + rng.bytes(2 * int(rng.integers(0, 60) ** 2 // 60)))
        arrays.append([(rng.integers(0, CLASSES, (2, symbols)).astype(np.uint8), dependent)])
    return set(check_batch(payloads, arrays, tables, 4))


def check_heads() -> None:
    """What no symbol has to be read for."""
    tables = some_tables()
    (good, *_), arrays = coded_batch(tables, 4, [30, 50], 1)
    low = bytes([255, 255, 0, 0]) + good[4:]
    batch = [good, b"", good[:15], good + b"\0", low, good + b"\0\0", good[:16], good]
    texts = check_batch(batch, arrays * len(batch), tables, 4)
    expected = ("", "shorter", "shorter", "odd", "below", LEFT, EARLY, "")
    assert all(part in text for part, text in zip(expected, texts, strict=True))
    assert [text for text in texts if not text] == ["", ""]
    streams = kernels.CudaStreams([good, low], kernels.CudaTables(tables), 4)
    assert [type(e) for e in streams.errors()] == [FormatError] * 2  # nothing was read
    with pytest.raises(FormatError, match=r"tile 0 of the batch: .* does not end where"):
        streams.finish()


def check_memory_is_used_again() -> None:
    """By batches of other sizes, and by no two at once."""
    plain = some_tables()
    tables, on = kernels.CudaTables(plain), kernels.cuda.to_device
    for tiles, size in ((3, 50), (1, 20), (2, 120), (3, 50)):
        payloads, arrays = coded_batch(plain, 4, [size, size], 2, tiles)
        batches = [kernels.CudaStreams([p] * tiles, tables, 4) for p in payloads]
        values = [cpu_outcome(*pair, plain, 4)[0] for pair in zip(payloads, arrays, strict=True)]
        for k in range(2):
            for streams, own, expected in zip(batches, arrays, values, strict=True):  # by turns
                classes, dependent = own[k]
                levels = on(np.zeros((tiles, 1, size), np.int32))
                streams.decode(on(np.stack([classes] * tiles)), dependent, levels)
                assert (levels.copy_to_host() == expected[k]).all()
        for streams in batches:
            streams.finish()
            assert streams.errors() == [None] * tiles


def check_last_symbol() -> None:
    """A state that is not back at its start, in an idle lane, and in one that was used."""
    tables = some_tables()
    (good, *_), arrays = coded_batch(tables, 8, [0, 3], 1)
    idle = bytearray(good)
    idle[4 * 7] = 1
    texts = check_batch([bytes(idle), good], arrays * 2, tables, 8)
    assert LEFT in texts[0] and not texts[1]


# ---------------------------------------------------------- levels to latents, in either place


def random_factors(rng: np.random.Generator, channels: int, means: int, contexts: int) -> Factors:
    return Factors(
        np.int64(MAX_FACTOR ** rng.random(means)),
        np.int64(MAX_FACTOR ** rng.random(contexts)),
        rng.normal(0, 3, channels).astype(np.float32),
        np.zeros(channels, np.int64),
    )


def check_dequantise(rows: int, columns: int, seed: int) -> None:
    """Integers up to their bounds, every gain, tiles of different tilts; floats to the bit."""
    rng = np.random.default_rng(seed)
    channels, contexts, means, tiles, positions = 9, 6, 4, 4, rows * columns
    tilt = rng.integers(-32, 33, channels).astype(np.int8)
    plain = random_factors(rng, channels, means, contexts)
    factors = [tilted(plain, tilt, share) for share in range(17)]
    tilts = np.array([0, 16, 3, 9], np.uint8)
    state = np.array([0, 0, kernel.TRUNCATED, 0], np.int32)
    gains = rng.integers(0, 256, (tiles, rows, columns)).astype(np.uint8)
    gains.reshape(-1)[:2] = 0, 255
    on = kernels.cuda.to_device
    y = on(np.zeros((tiles, channels, positions), np.float32))
    chain = on(np.full((tiles, contexts + 1, rows, columns), 128, np.uint8))
    real = on(np.zeros((tiles, contexts, rows, columns), np.float32))
    on_tilts, on_state, on_gains = on(tilts), on(state), on(gains)
    on_factors = kernels.CudaFactors(factors)
    expected = np.zeros((tiles, channels, positions), np.float32)
    context = np.full((tiles, contexts + 1, positions), 128, np.uint8)
    for first, end, lattice in ((0, 4, 1), (0, 4, 2), (0, 4, 3), (4, 6, 0), (6, 9, 0)):
        where = lattice_positions(lattice, rows, columns)
        if not len(where):
            continue
        shape = (tiles, end - first, len(where))
        levels = np.rint(rng.laplace(0, 10.0 ** rng.integers(0, 7, shape))).astype(np.int64)
        levels = np.clip(levels, -cell.LEVEL_PEAK, cell.LEVEL_PEAK).astype(np.int32)
        levels[rng.random(shape) < 0.3] = 0
        levels[0, 0, 0], levels[1, 0, 0] = cell.LEVEL_PEAK, -cell.LEVEL_PEAK
        mean = rng.integers(-1023, 1024, shape).astype(np.int16) if end == 4 else None
        seen = end <= contexts
        kernels.dequantise(
            on(levels), None if mean is None else on(mean), on(where), on_gains, on_factors,
            on_tilts, first, y, chain if seen else None, real if seen else None, on_state,
        )  # fmt: skip
        for n in np.flatnonzero(state == 0):
            f = factors[tilts[n]]
            assert cell._dequantise(
                levels[n], np.zeros((0, 0), np.int16) if mean is None else mean[n], where,
                gains[n].reshape(-1), OCTAVE_TABLE,
                np.zeros(0, np.int64) if mean is None else f.mean[first:end],
                f.context[first:end], f.inverse_gain[first:end], cell.STEPS,
                expected[n, first:end], context[n, first:end] if seen else context[n, :0],
                np.zeros((end - first if seen else 0, positions), np.uint8),
                np.arange(positions), 0,
            )  # fmt: skip
    np.testing.assert_array_equal(y.copy_to_host(), expected)
    got = chain.copy_to_host().reshape(tiles, contexts + 1, positions)
    np.testing.assert_array_equal(got, context)
    integers = context[:, :contexts].astype(np.float32) - 128
    np.testing.assert_array_equal(real.copy_to_host().reshape(integers.shape), integers)
    np.testing.assert_array_equal(on_state.copy_to_host(), state)
    assert len(np.unique(integers)) > 10 or positions < 10


def check_level_beyond_peak() -> None:
    on = kernels.cuda.to_device
    factors = [random_factors(np.random.default_rng(0), 1, 0, 0)]
    levels = np.array([1, cell.LEVEL_PEAK + 1, -(2**31)], np.int32).reshape(3, 1, 1)
    y, state = on(np.full((3, 1, 1), 5, np.float32)), on(np.zeros(3, np.int32))
    kernels.dequantise(
        on(levels), None, on(np.zeros(1, np.int32)), on(np.zeros((3, 1, 1), np.uint8)),
        kernels.CudaFactors(factors), on(np.zeros(3, np.uint8)), 0, y, None, None, state,
    )  # fmt: skip
    assert state.copy_to_host().tolist() == [kernel.OK, *2 * [kernel.BAD_ESCAPE]]
    assert y.copy_to_host()[1:].tolist() == [[[0.0]]] * 2


def check_shift() -> None:
    rng = np.random.default_rng(5)
    tilt = rng.integers(-32, 33, 12).astype(np.int8)
    factors = [tilted(random_factors(rng, 12, 2, 4), tilt, share) for share in range(17)]
    tilts = np.array([0, 7, 16], np.uint8)
    classes = rng.integers(0, CLASSES, (3, 5, 40)).astype(np.uint8)
    classes[:, :, :10] *= 0
    classes[:, :, 10:14] = 1, 2, 126, 127
    device = kernels.cuda.to_device(classes)
    on_tilts = kernels.cuda.to_device(tilts)
    kernels.shift_classes(device, kernels.CudaFactors(factors), on_tilts, 6)
    for n, share in enumerate(tilts):
        cell._shift_classes(classes[n], factors[share].shift[6:11])
    np.testing.assert_array_equal(device.copy_to_host(), classes)


def check_hyper() -> None:
    rng = np.random.default_rng(6)
    on = kernels.cuda.to_device
    symbols = rng.integers(-127, 128, (4, 3, 2, 5)).astype(np.int32)
    symbols[1, 2, 1, 4], symbols[2, 0, 0, 0], symbols[3, 0, 0, 1] = 128, -(2**31), -128
    z, state = on(np.full(symbols.shape, 9, np.float32)), on(np.array([0, 0, 0, 1], np.int32))
    kernels.hyper_latents(on(symbols), z, state)
    assert state.copy_to_host().tolist() == [0, cell.BAD_HYPER, cell.BAD_HYPER, kernel.TRUNCATED]
    np.testing.assert_array_equal(
        z.copy_to_host(), np.where(abs(symbols.astype(int)) > 127, 0, symbols)
    )

    step = rng.integers(-48, 49, (3, 1, 6, 8)).astype(np.int8)
    indices = np.array([3, 250, 120], np.uint8)
    gains, plane = on(np.zeros((3, 5, 7), np.uint8)), on(np.zeros((3, 1, 5, 7), np.float32))
    chain = on(np.full((3, 4, 5, 7), 128, np.uint8))
    kernels.effective_gains(on(step), on(indices), gains, plane, chain)
    moved = np.clip(step[:, 0, :5, :7].astype(int) + indices[:, None, None], 0, 255)
    np.testing.assert_array_equal(gains.copy_to_host(), moved)
    np.testing.assert_array_equal(plane.copy_to_host()[:, 0], moved)
    np.testing.assert_array_equal(chain.copy_to_host()[:, 3], np.maximum(moved, 1))
    assert (chain.copy_to_host()[:, :3] == 128).all() and 0 in moved and 255 in moved


# -------------------------------------------------------------------- tiles, in either place


def models_by_prefix() -> dict[bytes, DecoderModel]:
    names = ("tiny", "smallest", "lapped", "tilted")
    found = [load_decoder((CONFORMANCE / f"{name}.wscm").read_bytes()) for name in names]
    return {model.digest[:4]: model for model in found}


def check_tile(data: bytes, model: DecoderModel) -> type[WsicodecError] | None:
    """A tile walked through by the CPU, and its streams again by the kernels, between two broken
    copies of itself: the same symbols, latents, contexts and kind of error. Returns that."""
    tile = parse(data)
    assert tile.learned is not None
    header, a = tile.learned, model.architecture
    places = cell.cells_of(tile.height, tile.width)
    payload, lanes = tile.payload[3 * len(places) :], 1 << header.lanes_log2
    batch = [payload[: 2 * len(payload) // 3], payload, payload[:-2] + bytes([3, 5])]
    streams = kernels.CudaStreams(batch, kernels.CudaTables(model.tables), lanes)
    factors, on = kernels.CudaFactors(model.factors), kernels.cuda.to_device
    tilts = on(np.full(3, header.tilt, np.uint8))
    arrays: Arrays = []

    def thrice(values: np.ndarray) -> Any:
        return on(np.stack([values] * 3))

    def both(classes: np.ndarray, dependent: bool) -> tuple[np.ndarray, Any]:
        """The next symbols, from the CPU's decoder and the kernels, on the host and the device."""
        arrays.append((classes.copy().reshape(len(classes), -1), dependent))
        device = on(np.zeros((3, *arrays[-1][0].shape), np.int32))
        streams.decode(thrice(arrays[-1][0]), dependent, device)
        values = cpu.get(classes, dependent=dependent)  # raises where a stream is broken
        np.testing.assert_array_equal(device.copy_to_host()[1].reshape(values.shape), values)
        return values, device

    def hyper(classes: np.ndarray) -> np.ndarray:
        symbols, device = both(classes, False)
        z = on(np.zeros((3, *classes.shape), np.float32))
        kernels.hyper_latents(device.reshape(3, *classes.shape), z, streams.state)
        return symbols

    kind: type[WsicodecError] | None = None
    try:
        cpu = kernel.Decoder(payload, model.tables, lanes)
        for _, _, shape in places:
            grid, positions = shape.latents, int(np.prod(shape.latents))
            y = on(np.zeros((3, a.channels_of(header.stages), positions), np.float32))
            chain = on(np.full((3, a.context_channels + 1, *grid), 128, np.uint8))
            real = on(np.zeros((3, a.context_channels, *grid), np.float32))

            def stage(
                k: int, classes: np.ndarray, means: np.ndarray, gains: np.ndarray,
                grid: tuple[int, int] = shape.latents, y: Any = y, chain: Any = chain,
                real: Any = real,
            ) -> np.ndarray:  # fmt: skip
                if not classes.size:
                    return np.zeros(classes.shape, np.int32)
                levels, device = both(classes, True)
                first = a.stages[k].first
                seen = first < a.context_channels
                kernels.dequantise(
                    device, thrice(means) if len(means) else None,
                    on(lattice_positions(a.stages[k].lattice, *grid)),
                    thrice(gains.reshape(grid)), factors, tilts, first, y,
                    chain if seen else None, real if seen else None, streams.state,
                )  # fmt: skip
                return levels

            job = cell.CellJob(header.gain, header.tilt, (0, 0, 0), hyper, stage)
            latents = cell.code_cells(model, [job], header.stages, shape)[0]
            np.testing.assert_array_equal(y.copy_to_host()[1], latents.y)
            port = latents.cells.port(latents.index)
            integers = port.values[: a.context_channels, port.places].reshape(-1, *grid)
            np.testing.assert_array_equal(chain.copy_to_host()[1, :-1], integers)
            np.testing.assert_array_equal(
                real.copy_to_host()[1], integers.astype(np.float32) - np.float32(128)
            )
        cpu.finish()
    except WsicodecError as error:
        kind = type(error)
    found = streams.errors()
    assert type(found[1]) is (kind or type(None))
    if kind is None:
        for n in (0, 2):
            values, error = cpu_outcome(batch[n], arrays, model.tables, lanes)
            for (_, dependent), symbols in zip(arrays, values, strict=False):
                if not dependent and abs(symbols).max() > Z_PEAK:
                    error = FormatError("a hyper-latent is beyond its range")
            assert error is not None and same_error(found[n], error)
    return kind


def check_tiles(folder: Path, names: list[str]) -> None:
    known = models_by_prefix()
    for name in names:
        data = (folder / name).read_bytes()
        header = parse(data).learned
        assert header is not None
        assert check_tile(data, known[header.model]) is None, name


# ------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("sizes", [[0, 1], [3, 5, 1, 2], [7, 0, 40, 33, 1, 600, 90, 3000]])
def test_streams(lanes: int, sizes: list[int]) -> None:
    check_streams(lanes, sizes, 4)


@pytest.mark.parametrize("threads", [1, 8, 256])
def test_prefix_sums_of_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(kernels, "GATHERERS", threads)
    check_streams(4, [15, 16, 17, 16 * threads, 16 * threads + 1, 5000], 3)


@pytest.mark.parametrize("lanes", [1, 4, 32])
def test_damage_is_named_and_stays_in_its_tile(lanes: int) -> None:
    check_damage(lanes, [40, 60, 20, 130], 120)


@pytest.mark.parametrize("lanes", [1, 4, 32])
def test_every_truncation_is_named(lanes: int) -> None:
    check_truncations(lanes, 1)


@pytest.mark.parametrize("lanes", [1, 4, 32])
def test_last_words_and_escapes(lanes: int) -> None:
    check_last_words(lanes)
    for symbols in (1, 3, 4, 32, 33, 70):
        check_escapes(lanes, symbols)


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("symbols", [2, 8, 40])
def test_noise_is_refused_as_the_cpu_refuses_it(dependent: bool, symbols: int) -> None:
    texts = " ".join(check_noise(600, symbols, dependent))
    assert ESCAPE in texts and (LEFT if symbols < 40 else EARLY) in texts


@pytest.mark.parametrize("peak", [2**20, -(2**20), 2**20 - 1])
def test_symbols_up_to_the_peak(peak: int) -> None:
    """Of both quantisers, under classes without and with raw bits."""
    tables = some_tables()
    classes = np.repeat(np.array([1, 30, 55, 56, 100, 127], np.uint8), 9)
    indices = np.tile(np.array([peak, 1, 1, peak, peak, 0, peak, -peak, peak]), 6)
    levels = levels_of(indices, classes, 4)
    data = encoded([(indices.astype(np.int32), classes, False), (levels, classes, True)], tables, 4)
    arrays: Arrays = [(classes[None], False), (classes[None], True)]
    assert check_batch([data, data], [arrays] * 2, tables, 4) == ["", ""]


def test_beyond_the_peak_without_an_escape() -> None:
    """Tables as wide as they may be, under the most raw bits: the first lane beyond decides, also
    where a later one of its round finds no word."""
    wide = tables_from_weights([np.ones(254)] * 30)
    assert int(wide.radii.min()) == 126
    rng = np.random.default_rng(9)
    payloads = [
        rng.integers(2**16, 2**32, 4).astype("<u4").tobytes() + rng.bytes(2 * (n % 20))
        for n in range(300)
    ]
    classes = np.tile(np.array([[100, 100, 127, 100]], np.uint8), 3)
    texts = check_batch(payloads, [[(classes, True)]] * len(payloads), wide, 4)
    assert sum(ESCAPE in text for text in texts) > 50 and sum(EARLY in text for text in texts) > 50


def test_heads() -> None:
    check_heads()
    check_last_symbol()
    check_memory_is_used_again()


def test_reference_agrees() -> None:
    """The specification itself, not only the CPU's kernel."""
    tables = some_tables()
    payloads, arrays = coded_batch(tables, 4, [30, 80, 20, 60], 1, 77)
    streams = kernels.CudaStreams(payloads, kernels.CudaTables(tables), 4)
    plain = reference.Decoder(payloads[0], tables, 4)
    for classes, dependent in arrays[0]:
        levels = kernels.cuda.device_array((1, *classes.shape), np.int32)
        streams.decode(kernels.cuda.to_device(classes[None]), dependent, levels)
        assert levels.reshape(-1).tolist() == plain.symbols(classes.reshape(-1).tolist(), dependent)
    plain.finish()
    streams.finish()


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 6), (32, 32)])
def test_dequantise(grid: tuple[int, int]) -> None:
    check_dequantise(*grid, seed=grid[1])
    check_level_beyond_peak()


def test_small_kernels() -> None:
    check_shift()
    check_hyper()


def decodable() -> list[str]:
    folder = CONFORMANCE / "decode"
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.tile"))
    return [name for name in found if parse((folder / name).read_bytes()).learned]


def test_conformance_vectors() -> None:
    names = decodable()
    assert len(names) > 50
    check_tiles(CONFORMANCE / "decode", names)


REFUSED = ("escape", "hyper-latent", "lanes-other", "odd", "state", "symbol", "trailing-w", "words")


def test_refused_vectors() -> None:
    folder, known = CONFORMANCE / "refuse", models_by_prefix()
    expected = json.loads((folder / "errors.json").read_text())
    names = [p.name for p in sorted(folder.glob("*.tile")) if p.name.startswith(REFUSED)]
    count = 0
    for name in names:
        tile = parse((folder / name).read_bytes())
        assert tile.learned is not None
        kind = check_tile((folder / name).read_bytes(), known[tile.learned.model])
        assert kind is not None and kind.__name__ == expected[name.removesuffix(".tile")], name
        count += 1
    assert count >= 15


def test_tiles_of_the_shipped_model(pixels: np.ndarray) -> None:
    for quality, (top, left) in ((40, (0, 0)), (95, (320, 200))):
        image = np.ascontiguousarray(pixels[top : top + 80, left : left + 112])
        data = wsicodec.encode(image, quality=quality)
        header = parse(data).learned
        assert header is not None
        assert check_tile(data, decoder_of_prefix(header.model)) is None


def test_what_is_no_batch_is_refused() -> None:
    tables = kernels.CudaTables(some_tables())
    for payloads, lanes in (([], 4), ([b""], 3), ([b""], 64), ([b""], 0)):
        with pytest.raises(ValueError, match="not a batch"):
            kernels.CudaStreams(payloads, tables, lanes)
    streams = kernels.CudaStreams([b""] * 2, tables, 4)
    make = kernels.cuda.device_array
    for shape, other in (
        ((2, 1, 8), (2, 8, 1)),
        ((1, 1, 8), (1, 1, 8)),
        *[((2, 1, 2**21 + 1),) * 2],
    ):
        with pytest.raises(ValueError, match="cannot decode"):
            streams.decode(make(shape, np.uint8), True, make(other, np.int32))

    class Long(bytes):
        def __len__(self) -> int:
            return 2**31

    with pytest.raises(LimitError, match="words"):
        kernels.CudaStreams([Long()] * 3, tables, 4)


# ------------------------------------------------------------------- simulated, and for a GPU


def simulate() -> None:
    """A part of the checks in numba's simulator; called in a process of its own."""
    assert kernels.SIMULATED
    sys.setswitchinterval(1e-5)  # its manager waits for threads by asking again and again
    check_streams(1, [9, 30], 2)
    check_streams(4, [7, 0, 40, 200], 3)
    check_streams(32, [50, 150], 2)
    check_noise(6, 4, True)
    check_escapes(4, 6)
    check_damage(4, [10, 30], 6)
    check_heads()
    check_last_symbol()
    check_dequantise(3, 4, 1)
    check_level_beyond_peak()
    check_shift()
    check_hyper()
    check_tiles(CONFORMANCE / "decode", ["learned-17x31-gain90-stages2-lanes2.tile"])
    print("simulated")


def test_in_the_simulator() -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout == "simulated\n", done.stderr


def test_kernels_compile_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """To PTX, with the types that launchers pass. Without a double: integers of mixed signs become
    one in numba, and would be slow as well as wrong."""
    from numba.cuda import dispatcher
    from numba.cuda.cudadrv.nvvm import NVVM

    try:
        NVVM()
    except Exception as error:
        pytest.skip(f"NVIDIA's compiler library is not installed: {type(error).__name__}")
    check_streams(4, [3, 5], 1)
    check_dequantise(2, 3, 1)
    check_shift()
    check_hyper()
    monkeypatch.setattr(kernels, "cuda", CUDA)
    hopper = types.SimpleNamespace(compute_capability=(9, 0))
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: hopper)  # functions ask for it
    names = set()
    for (name, _), (function, signature) in LAUNCHED.items():
        ptx, _ = CUDA.compile_ptx(function, numba.void(*signature), cc=(9, 0), device=False)
        assert ".f64" not in ptx
        names.add(name)
    assert len(names) == len(KERNELS) + 1


if __name__ == "__main__":
    simulate()
