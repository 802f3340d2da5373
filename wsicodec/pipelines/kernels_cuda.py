"""Kernels of the CUDA backend: streams to levels, levels to latents and contexts, for N tiles.

Importing this module imports ``numba.cuda``, which asks no driver for anything; only the CUDA
backend does. What the kernels compute is what ``entropy.kernel.decode_symbols`` and
``codec.cell._dequantise`` compute, to the bit.

Not run on a GPU so far. They compile to machine code for compute capability 9.0 (no register
spilled, no double-precision operation), and are tested compiled for the CPU and in numba's
simulator. What is said of speed below follows from the machine code; it is not measured.

**Streams.** A tile is a block of as many threads as it has lanes (4 in tiles that this package
writes). Two kernels per array of symbols:

- ``_gather``, bound by memory, a block of many threads per tile: zeroes the levels and lists the
  places of coded symbols in order, each packed with its table and raw bits, by a prefix sum over
  the block. Lanes then find symbol n without looking at the others, a round ahead.
- ``_decoder``, bound by latency: in round r, lane l decodes symbol r L + l. All lanes look up their
  symbols at once; then each has to know how many words the lanes before it take. A table step
  takes a word or none, and raw bits behind it take a second one or none, which the state tells
  before any word is read. So lanes publish small numbers in shared memory and, after one barrier,
  each sums up those of the lanes before it. Only of an escape nobody knows how long it is before it
  is read: lanes with one take their turns, a barrier each.

Warp votes would do the same with some tens of cycles less, of several hundred for a round: three
dependent loads and about two hundred instructions. The simulator does not know them, and the code
that is tested should be the code that runs. The exchange is cheap as it stands: one store, a
barrier of a block that is one warp or less, and, the number of lanes being a constant of the
kernel, one load of 16 bytes for four lanes. Tiles side by side hide all of it; a batch needs some
hundred of them. Tiles share no warp, so that escapes of one do not stop the others.

**Tables** are the CPU's, ``first`` and ``entries`` of ``SymbolTables``, in global memory: about
100 KB for a model, which stay in the first-level cache of a multiprocessor (256 KB, of which these
kernels ask almost nothing as shared memory), where a load takes about as long as one of shared
memory. Shared memory itself holds 48 KB unless asked, and every block would have to fill it anew. A
table of all slots has 2 MB: a second-level access per symbol, ten times as long. A binary search is
six or seven dependent loads where this is two or three.

**Bounds.** Streams are hostile. Words are read within their stream only, a state's slot is below
2^14, tables were validated to cover those, classes index tables of 256 entries. A tile at fault is
marked; from then on its blocks return before their first barrier, its levels are 0, and its
neighbours never notice.

No thread leaves between barriers, and every condition around a barrier is on values that all
threads of the block read from shared memory or compute alike.

Arrays are C-contiguous device arrays. All calls are asynchronous on ``stream`` but for
``CudaStreams.errors`` and ``finish``.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import cuda

from wsicodec.codec.cell import BAD_HYPER, LEVEL_PEAK, STEPS
from wsicodec.entropy.kernel import BAD_ESCAPE, LOW, OK, TRUNCATED
from wsicodec.entropy.tables import (
    CLASSES,
    COARSE_BITS,
    LENGTH_BITS,
    MAX_MAGNITUDE_BITS,
    PROBABILITY_BITS,
    SYMBOL_PEAK,
    TOTAL,
    SymbolTables,
)
from wsicodec.entropy.trellis import PACKED
from wsicodec.errors import FormatError, LimitError, TruncatedError, WsicodecError
from wsicodec.models.decoder import CONTEXT_PEAK, GAINS, Z_PEAK
from wsicodec.models.factors import OCTAVE_TABLE, Factors

UNFINISHED, SHORT, ODD, LOW_STATE = 4, 5, 6, 7
"""Outcomes beside those of ``entropy.kernel``: words are left or a lane's state is not at its
start; fewer bytes than states; an odd number of bytes; a state below its range."""

MOST_LANES = 32
MOST_SYMBOLS = 1 << 21  # of one array of a tile: what a place is packed into
MOST_TILES = 65535
MOST_WORDS = 1 << 31
SIMULATED = bool(getattr(numba.config, "ENABLE_CUDASIM", False))
MOST_GATHERERS = 256
GATHERERS = 8 if SIMULATED else MOST_GATHERERS
"""Threads of a block where all threads do the same. The simulator starts a Python thread each."""
_LEAST_BLOCK = 1 << 9
_RUN = 16  # neighbouring positions that one thread of ``_gather`` looks at
_BLOCKS = 2 if SIMULATED else 1 << 14
_OCTAVES = OCTAVE_TABLE
_SIXTEENTHS = (STEPS * np.float32(1 / 16)).astype(np.float32)

# bits of a packed place: table, raw bits, place
_RAW_AT, _PLACE_AT = 7, 11
# bits of what a lane publishes: words that it takes, whether it is an escape, whether it failed
_ESCAPE, _FAULT = 4, 8
_MASK = TOTAL - 1

DeviceArray = Any
"""A device array of ``numba.cuda``."""
Stream = Any
"""A stream of ``numba.cuda``, or 0, the default one."""


def _kernel(function: Callable[..., None]) -> Any:
    return cuda.jit(function)


def _inline(function: Callable[..., Any]) -> Any:
    return cuda.jit(function, device=True)


@_inline
def _clip(value, low, high):
    """``min`` and ``max`` by hand: numba 0.68's own CUDA target, without the package numba-cuda,
    fails to compile those."""
    if value < low:
        return low
    if value > high:
        return high
    return value


# -- streams to levels --


@_kernel
def _gather(classes, places, coded, counts, levels, outcomes):
    """A block per tile: levels (tiles, size) to 0; into ``coded`` (tiles, size or more) uint32,
    the coded ones of ``classes`` (tiles, size) in order; how many, into ``counts``.

    places: (256,) uint32, table and raw bits of a class, packed.
    """
    sums = cuda.shared.array((2, MOST_GATHERERS), np.int32)
    tile, thread, threads = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    size = classes.shape[1]
    for i in range(thread, size, threads):
        levels[tile, i] = 0
    idle = outcomes[tile] != OK
    done = np.int64(0)
    for chunk in range(0, 0 if idle else size, threads * _RUN):
        begin = chunk + thread * _RUN
        end = _clip(begin + _RUN, 0, size)
        number = np.int32(0)
        for i in range(begin, end):
            if classes[tile, i] != 0:
                number += np.int32(1)
        # inclusive prefix sum; the sides take turns, so that one barrier a step is enough
        side, step = 0, 1
        sums[side, thread] = number
        cuda.syncthreads()
        while step < threads:
            total = sums[side, thread]
            if thread >= step:
                total += sums[side, thread - step]
            side, step = 1 - side, 2 * step
            sums[side, thread] = total
            cuda.syncthreads()
        at = done + sums[side, thread] - number
        for i in range(begin, end):
            c = classes[tile, i]
            if c != 0:
                coded[tile, at] = places[c] | np.uint32(i << _PLACE_AT)
                at += 1
        done += sums[side, threads - 1]
        cuda.syncthreads()
    if thread == 0:
        counts[tile] = done


@_inline
def _word(words, origin, position, end):
    """The word at a stream's position; 0 behind its end."""
    if position < end:
        return np.int64(words[origin + position])
    return np.int64(0)


@_inline
def _raw(x, words, origin, position, end, bits):
    """``bits`` raw bits, 1 ... 14, of a lane's state. Returns (value, state, position)."""
    shift = PROBABILITY_BITS - bits
    slot = x & _MASK
    part = slot >> shift
    x = ((x >> PROBABILITY_BITS) << shift) + slot - (part << shift)
    if x < LOW:
        x = (x << 16) | _word(words, origin, position, end)
        position += 1
    return part, x, position


@_inline
def _settle(x, words, origin, position, end, radius, escape, top, raw):
    """What follows the table step of a symbol that it does not say all of: its word, if it takes
    one, an escape's fields and raw bits. Returns (outcome, index, state, position).

    All int64. A position behind the end is the outcome TRUNCATED wherever it comes first.
    """
    if x < LOW:
        x = (x << 16) | _word(words, origin, position, end)
        position += 1
    fault = OK
    if position > end:
        fault = TRUNCATED
    if escape and fault == OK:
        length, x, position = _raw(x, words, origin, position, end, np.int64(LENGTH_BITS))
        if position > end:
            fault = TRUNCATED
        elif length > MAX_MAGNITUDE_BITS:
            fault = BAD_ESCAPE
        if fault != OK:
            length = np.int64(0)
        magnitude = np.int64(0)
        if length > PROBABILITY_BITS:
            magnitude, x, position = _raw(
                x, words, origin, position, end, length - PROBABILITY_BITS
            )
        part = _clip(length, np.int64(0), np.int64(PROBABILITY_BITS))
        if part > 0:
            field, x, position = _raw(x, words, origin, position, end, part)
            magnitude = (magnitude << part) | field
        sign, x, position = _raw(x, words, origin, position, end, np.int64(1))
        top = radius + (np.int64(1) << length) + magnitude
        if sign != 0:
            top = -top
        if fault == OK and position > end:
            fault = TRUNCATED
    if raw > 0:
        field, x, position = _raw(x, words, origin, position, end, raw)
        top = ((top << raw) | field) - ((np.int64(1) << raw) >> 1)
        if fault == OK and position > end:
            fault = TRUNCATED
    if fault == OK and (top > SYMBOL_PEAK or top < -SYMBOL_PEAK):
        fault = BAD_ESCAPE
    return fault, top, x, position


@functools.cache
def _decoder(lanes: int) -> Any:
    """The kernel for streams of so many lanes: a constant, so that loops over lanes unroll."""

    @_kernel
    def decode(
        coded, counts, levels, words, spans, cursors, states, outcomes,
        first, entries, offsets, radii, dependent,
    ):  # fmt: skip
        """A block per tile, a thread per lane.

        coded, counts: of ``_gather``. spans: (tiles, 2) where a stream's words begin, and how many
        there are. cursors: (tiles, 2) next word, next lane. dependent: 1; 0 for symbols.
        """
        codes = cuda.shared.array((2, lanes), np.int32)
        taken = cuda.shared.array(lanes, np.int32)
        tile, lane = cuda.blockIdx.x, cuda.threadIdx.x
        if outcomes[tile] != OK:  # all threads of the block
            return
        origin, end = spans[tile, 0], spans[tile, 1]
        position, start = np.int64(cursors[tile, 0]), np.int64(cursors[tile, 1])
        count = np.int64(counts[tile])
        tables = radii.shape[0] // 2
        halve = 1 - dependent
        kept = np.uint32(7 * dependent)
        x = np.uint32(states[tile, lane])
        machine = np.uint32(0)
        fault = np.int32(OK)
        i = lane - start  # number of this lane's symbol
        following = np.uint32(0)
        if 0 <= i < count:
            following = coded[tile, i]
        side = 0
        for _ in range((start + count + lanes - 1) // lanes):
            active = 0 <= i < count
            here = following
            i += lanes
            following = np.uint32(0)
            if i < count:  # in flight while this round goes on
                following = coded[tile, i]
            raw = np.uint32((here >> _RAW_AT) & 15)
            quantiser = np.uint32(machine & 1)
            table = np.uint32((here & 127) + quantiser * tables)
            code = np.int32(0)
            level = np.int32(0)
            odd = np.uint32(0)
            short = False
            escape = False
            if active:
                slot = np.uint32(x & _MASK)
                index = np.uint32(offsets[table] + first[table, np.uint32(slot >> COARSE_BITS)])
                entry = entries[index]
                low = np.uint32(entry & np.uint64(0xFFFFFFFF))
                frequency = np.uint32(low >> 16)
                within = np.uint32(slot - np.uint32(low & _MASK))
                while within >= frequency:
                    index = np.uint32(index + 1)
                    entry = entries[index]
                    low = np.uint32(entry & np.uint64(0xFFFFFFFF))
                    frequency = np.uint32(low >> 16)
                    within = np.uint32(slot - np.uint32(low & _MASK))
                x = np.uint32(frequency * np.uint32(x >> PROBABILITY_BITS) + within)
                odd = np.uint32((low >> 14) & 1)
                level = np.int32(np.int64(entry) >> 48)
                escape = (low >> 15) & 1 != 0
                short = x < LOW
                code = np.int32(short)
                if escape:
                    code = np.int32(_ESCAPE)
                elif raw > 0:
                    # after its word, if any, a state below 2^(16 + raw) lacks one more for raw bits
                    wanting = raw if short else raw + 16
                    if x >> wanting == 0:
                        code += np.int32(1)
                if fault != OK:
                    code |= np.int32(_FAULT)
            elif fault != OK:
                code = np.int32(_FAULT)
            codes[side, lane] = code
            cuda.syncthreads()
            # from here on, lanes compute alike what concerns all of them
            before = np.int64(0)
            total = np.int64(0)
            flags = np.int32(0)
            for other in range(lanes):
                theirs = codes[side, other]
                flags |= theirs
                total += theirs & 3
                if other < lane:
                    before += theirs & 3
            side = 1 - side
            if flags >= _FAULT:  # of the round before
                break
            mine = position + before
            settled = False
            k = np.int64(0)
            if flags & _ESCAPE:
                for other in range(lanes):
                    theirs = codes[1 - side, other]
                    if other == lane:
                        mine = position
                        if escape:
                            fault, k, wide, mine = _settle(
                                np.int64(x), words, origin, position, end,
                                np.int64(radii[table]), True, np.int64(0), np.int64(raw),
                            )  # fmt: skip
                            x = np.uint32(wide)
                            settled = True
                            taken[lane] = mine - position
                    if theirs & _ESCAPE:
                        cuda.syncthreads()
                        position += taken[other]
                    else:
                        position += theirs & 3
            else:
                position += total
            if not active:
                continue
            if raw > 0 and not settled:
                sign = np.int32(level > 0) - np.int32(level < 0)
                top = (level + np.int32(quantiser) * sign) >> 1
                fault, k, wide, mine = _settle(
                    np.int64(x), words, origin, mine, end,
                    np.int64(0), False, np.int64(top), np.int64(raw),
                )  # fmt: skip
                x = np.uint32(wide)
                settled = True
            if settled:
                odd = np.uint32(k & 1)
                sign = np.int32(k > 0) - np.int32(k < 0)
                level = np.int32(2 * k - np.int32(quantiser) * sign)
            elif short:
                x = np.uint32((x << 16) | np.uint32(_word(words, origin, mine, end)))
                if mine >= end:
                    fault = np.int32(TRUNCATED)
            packed = np.uint64(PACKED) >> np.uint64((machine << 3) | (odd << 2))
            machine = np.uint32(np.uint32(packed & np.uint64(7)) & kept)
            if fault == OK:
                levels[tile, np.uint32(here >> _PLACE_AT)] = level >> halve
        cuda.syncthreads()  # who is slow may still read it
        taken[lane] = fault
        states[tile, lane] = x
        cuda.syncthreads()
        if lane == 0:
            for other in range(lanes):  # in the order of symbols
                if fault == OK:
                    fault = taken[other]
            if fault != OK:
                outcomes[tile] = fault
            cursors[tile, 0] = position
            cursors[tile, 1] = (start + count) % lanes

    return decode


@_kernel
def _end(spans, cursors, states, outcomes):
    """A thread per tile: UNFINISHED where all was well, but not at its end."""
    tile = cuda.grid(1)
    if tile < outcomes.shape[0] and outcomes[tile] == OK:
        at_end = np.int64(cursors[tile, 0]) == spans[tile, 1]
        for lane in range(states.shape[1]):
            at_end = at_end and states[tile, lane] == LOW
        if not at_end:
            outcomes[tile] = UNFINISHED


# -- levels to latents and contexts --


@_kernel
def _shift(classes, shifts, tilts, first):
    """Classes (tiles, channels, places) by the shifts (tilts, all channels) of the tiles' tilts, in
    place; a row of places at a time. What is not coded stays so."""
    channels = classes.shape[1]
    for row in range(cuda.blockIdx.x, classes.shape[0] * channels, cuda.gridDim.x):
        tile, c = row // channels, row % channels
        by = np.int32(shifts[tilts[tile], first + c])
        if by == 0:
            continue
        for i in range(cuda.threadIdx.x, classes.shape[2], cuda.blockDim.x):
            given = np.int32(classes[tile, c, i])
            if given > 0:
                classes[tile, c, i] = np.uint8(_clip(given + by, 0, CLASSES - 1))


@_kernel
def _dequantise(
    levels, means, where, gains, mean_factor, context_factor, inverse_gain, tilts, first,
    with_mean, with_context, y, chain, real, state,
):  # fmt: skip
    """A row of places at a time; ``codec.cell._dequantise`` has the formulas.

    Grids are flat. means: any array where with_mean is 0; chain and real where with_context is 0.
    """
    octaves = cuda.const.array_like(_OCTAVES)
    sixteenths = cuda.const.array_like(_SIXTEENTHS)
    channels = levels.shape[1]
    for row in range(cuda.blockIdx.x, levels.shape[0] * channels, cuda.gridDim.x):
        tile, c = row // channels, row % channels
        if state[tile] != OK:
            continue
        tilt, channel = tilts[tile], first + c
        scale = inverse_gain[tilt, channel]
        mean_scale = np.int64(0)
        if with_mean:
            mean_scale = np.int64(mean_factor[tilt, channel])
        context_scale = np.int64(0)
        if with_context:
            context_scale = np.int64(context_factor[tilt, channel])
        for i in range(cuda.threadIdx.x, levels.shape[2], cuda.blockDim.x):
            p = where[i]
            e = np.int64(gains[tile, p])
            level = np.int64(levels[tile, c, i])
            if level > LEVEL_PEAK or level < -LEVEL_PEAK:  # of no stream; keeps products in range
                state[tile] = BAD_ESCAPE
                level = np.int64(0)
            v = 8 * level
            if with_mean:
                m = np.int64(means[tile, c, i]) * (mean_scale * (octaves[e & 31] << (e >> 5)))
                v += (m + (np.int64(1) << 30)) >> 31
            y[tile, channel, p] = np.float32(v) * scale * sixteenths[e]
            if with_context:
                r = 255 - e
                shift = 35 - (r >> 5)
                half = np.int64(1) << (shift - 1)
                k = (v * (context_scale * octaves[r & 31]) + half) >> shift
                k = _clip(k, np.int64(-CONTEXT_PEAK), np.int64(CONTEXT_PEAK))
                chain[tile, channel, p] = np.uint8(k + 128)
                real[tile, channel, p] = np.float32(k)


@_kernel
def _hyper_latents(symbols, z, state):
    """symbols (tiles, size) to z, float32; 0, and a mark, for one out of range."""
    for tile in range(cuda.blockIdx.x, symbols.shape[0], cuda.gridDim.x):
        for i in range(cuda.threadIdx.x, symbols.shape[1], cuda.blockDim.x):
            value = symbols[tile, i]
            if value > Z_PEAK or value < -Z_PEAK:
                value = np.int32(0)
                if state[tile] == OK:
                    state[tile] = BAD_HYPER
            z[tile, i] = np.float32(value)


@_kernel
def _effective_gains(step, indices, gains, plane, chain):
    """A tile's rows by blocks, columns by threads; the last channel of chain gets max(E, 1)."""
    rows = gains.shape[1]
    last = chain.shape[1] - 1
    for row in range(cuda.blockIdx.x, gains.shape[0] * rows, cuda.gridDim.x):
        tile, i = row // rows, row % rows
        index = np.int32(indices[tile])
        for j in range(cuda.threadIdx.x, gains.shape[2], cuda.blockDim.x):
            e = _clip(index + np.int32(step[tile, 0, i, j]), 0, GAINS - 1)
            gains[tile, i, j] = np.uint8(e)
            plane[tile, 0, i, j] = np.float32(e)
            chain[tile, last, i, j] = np.uint8(e if e > 1 else 1)


# -- what the backend calls --


def _on_device(values: npt.NDArray[Any], stream: Stream) -> DeviceArray:
    return cuda.to_device(np.array(values, order="C"), stream=stream)


class _Memory:
    """Device memory that batches take by turns: allocating waits, and freeing, for the device.

    Blocks are powers of two. One stream alone may use them: what a block's last user enqueued comes
    before what its next one does.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[DeviceArray]] = {}

    def take(self, count: int, dtype: Any, lease: list[DeviceArray]) -> DeviceArray:
        """A flat array; its block joins ``lease``, to be given back."""
        needed = max(1, count) * np.dtype(dtype).itemsize
        size = max(_LEAST_BLOCK, 1 << (needed - 1).bit_length())
        free = self._free.setdefault(size, [])
        block = free.pop() if free else cuda.device_array(size, np.uint8)
        lease.append(block)
        return block[:needed].view(dtype)

    def give_back(self, lease: list[DeviceArray]) -> None:
        for block in lease:
            self._free[block.shape[0]].append(block)
        lease.clear()


class CudaTables:
    """A model's symbol tables on the device, and the memory of its batches, for one stream."""

    def __init__(self, tables: SymbolTables, stream: Stream = 0) -> None:
        self.memory = _Memory()
        places = np.zeros(256, np.uint32)  # so that no byte leads outside
        places[:CLASSES] = tables.class_table | tables.class_raw.astype(np.uint32) << _RAW_AT
        self.places = _on_device(places, stream)
        self.first = _on_device(tables.first, stream)
        self.entries = _on_device(tables.entries, stream)
        self.offsets = _on_device(tables.offsets, stream)
        self.radii = _on_device(tables.radii, stream)


class CudaFactors:
    """A model's factors on the device, a row per tilt."""

    def __init__(self, factors: Sequence[Factors], stream: Stream = 0) -> None:
        def rows(name: str, dtype: type) -> DeviceArray:
            values: npt.NDArray[Any] = np.stack([getattr(f, name) for f in factors]).astype(dtype)
            # a model without means has none; kernels want an array
            return _on_device(values if values.size else np.zeros((1, 1), dtype), stream)

        self.mean = rows("mean", np.int32)
        self.context = rows("context", np.int32)
        self.inverse_gain = rows("inverse_gain", np.float32)
        self.shift = rows("shift", np.int8)


Staging = Callable[[int, Any], npt.NDArray[Any]]
"""Count and dtype to a flat host array, for copies to or from the device."""


class CudaStreams:
    """Entropy-coded streams of N tiles on the device, read array by array.

    state: (N,) int32 on the device: OK, or what was wrong first. A tile at fault stays idle. Memory
    goes back to the tables with ``errors``: nothing may be enqueued on ``state`` after that.
    """

    def __init__(
        self,
        payloads: Sequence[bytes],
        tables: CudaTables,
        lanes: int,
        stream: Stream = 0,
        staging: Staging = np.empty,
    ) -> None:
        """payloads: entropy-coded data, after the turns. tables: of the same stream. lanes: 1, 2, 4
        ... 32. staging: gives memory that stays as it is until the stream has come past; pinned, if
        copies shall not wait.

        Raises LimitError for more than 2^31 words, ValueError for the caller's faults; a broken
        payload is a fault of its tile alone.
        """
        count = len(payloads)
        if lanes not in (1, 2, 4, 8, 16, 32) or not 1 <= count <= MOST_TILES:
            raise ValueError(f"{count} tiles of {lanes} lanes are not a batch")
        if sum(map(len, payloads)) // 2 > MOST_WORDS:
            raise LimitError("a batch holds more than 2^31 words of entropy-coded data")
        self._tables, self._lanes, self._stream, self._staging = tables, lanes, stream, staging
        self._event: Any = None
        self._errors: list[WsicodecError | None] | None = None
        self._lease: list[DeviceArray] = []
        counts = [max(0, len(payload) - 4 * lanes) // 2 for payload in payloads]
        spans, cursors, state, states, words = (
            staging(size, dtype)
            for size, dtype in (
                (2 * count, np.int64), (2 * count, np.int32), (count, np.int32),
                (count * lanes, np.uint32), (max(1, sum(counts)), np.uint16),
            )
        )  # fmt: skip
        cursors[:], state[:] = 0, OK
        begin = 0
        for n, (payload, size) in enumerate(zip(payloads, counts, strict=True)):
            spans[2 * n : 2 * n + 2] = begin, size
            own = states[n * lanes : (n + 1) * lanes]
            own[:] = LOW
            if len(payload) < 4 * lanes:
                state[n] = SHORT
            elif len(payload) % 2:
                state[n] = ODD
            else:
                own[:] = np.frombuffer(payload, "<u4", lanes)
                words[begin : begin + size] = np.frombuffer(payload, "<u2", size, 4 * lanes)
                if own.min() < LOW:
                    state[n] = LOW_STATE
            begin += size
        self._spans = self._upload(spans).reshape(count, 2)
        self._cursors = self._upload(cursors).reshape(count, 2)
        self.state = self._upload(state)
        self._states = self._upload(states).reshape(count, lanes)
        self._words = self._upload(words)
        self._counts = tables.memory.take(count, np.int32, self._lease)

    def _upload(self, values: npt.NDArray[Any]) -> DeviceArray:
        target = self._tables.memory.take(len(values), values.dtype, self._lease)
        target.copy_to_device(values, stream=self._stream)
        return target

    def decode(self, classes: DeviceArray, dependent: bool, levels: DeviceArray) -> None:
        """The next symbols of all tiles, or levels where ``dependent``.

        classes: (N, channels, places) uint8. levels: int32 of that shape, all written: 0 where the
        class is 0; some levels or 0 in a tile at fault. Raises ValueError for arrays too large.
        """
        count, size = len(self.state), int(np.prod(classes.shape[1:], dtype=np.int64))
        if classes.shape != levels.shape or classes.shape[0] != count or size > MOST_SYMBOLS:
            raise ValueError(f"cannot decode {levels.shape} levels from {classes.shape} classes")
        if size == 0:
            return
        t, flat = self._tables, levels.reshape(count, size)
        lease: list[DeviceArray] = []
        coded = t.memory.take(count * size, np.uint32, lease).reshape(count, size)
        _gather[count, GATHERERS, self._stream](
            classes.reshape(count, size), t.places, coded, self._counts, flat, self.state
        )
        _decoder(self._lanes)[count, self._lanes, self._stream](
            coded, self._counts, flat, self._words, self._spans, self._cursors,
            self._states, self.state, t.first, t.entries, t.offsets, t.radii, int(dependent),
        )  # fmt: skip
        t.memory.give_back(lease)  # whoever takes it next, comes later on the stream

    def close(self) -> None:
        """Check, on the device, that every stream is at its end. Waits for nothing."""
        count = len(self.state)
        _end[-(-count // GATHERERS), GATHERERS, self._stream](
            self._spans, self._cursors, self._states, self.state
        )
        self._outcomes = self._staging(count, np.int32)
        self.state.copy_to_host(self._outcomes, stream=self._stream)
        self._event = cuda.event()
        self._event.record(self._stream)

    def errors(self) -> list[WsicodecError | None]:
        """What is wrong with each stream, as the CPU's decoder names it; after the last symbol."""
        if self._errors is None:
            if self._event is None:
                self.close()
            self._event.synchronize()
            self._errors = [error_of(int(outcome)) for outcome in self._outcomes]
            self._tables.memory.give_back(self._lease)
        return list(self._errors)

    def finish(self) -> None:
        """Raise what is wrong with the first stream at fault, naming its number in the batch."""
        for n, error in enumerate(self.errors()):
            if error is not None:
                raise type(error)(f"tile {n} of the batch: {error}")


def error_of(outcome: int) -> WsicodecError | None:
    """A tile's outcome as the error that the CPU's decoder would raise."""
    if outcome == OK:
        return None
    if outcome == TRUNCATED:
        return TruncatedError("entropy-coded data ends early")
    if outcome == SHORT:
        return TruncatedError("entropy-coded data is shorter than its lane states")
    reasons = {
        ODD: "entropy-coded data has an odd number of bytes",
        LOW_STATE: "a lane's state is below its range",
        UNFINISHED: "entropy-coded data does not end where its symbols do",
        BAD_HYPER: "a hyper-latent is beyond its range",
    }
    return FormatError(reasons.get(outcome, "an escape is beyond the format's range"))


def _blocks(rows: int) -> int:
    return max(1, min(rows, _BLOCKS))


def shift_classes(
    classes: DeviceArray,
    factors: CudaFactors,
    tilts: DeviceArray,
    first: int,
    stream: Stream = 0,
) -> None:
    """Classes of tilted tiles, in place.

    classes: (N, channels, places) uint8 of channels from ``first`` on. tilts: (N,) uint8, 0 ... 16.
    """
    tiles, channels, _ = classes.shape
    _shift[_blocks(tiles * channels), GATHERERS, stream](classes, factors.shift, tilts, first)


def hyper_latents(
    symbols: DeviceArray, z: DeviceArray, state: DeviceArray, stream: Stream = 0
) -> None:
    """symbols int32 (N, ...) to z, float32 of that shape; BAD_HYPER for tiles beyond +-127."""
    count = symbols.shape[0]
    _hyper_latents[_blocks(count), GATHERERS, stream](
        symbols.reshape(count, -1), z.reshape(count, -1), state
    )


def effective_gains(
    step: DeviceArray,
    indices: DeviceArray,
    gains: DeviceArray,
    plane: DeviceArray,
    chain: DeviceArray,
    stream: Stream = 0,
) -> None:
    """Effective gain indices E of positions, where the networks want them.

    step: (N, 1, 2 r, 2 c) int8, R or more rows and C or more columns. indices: (N,) uint8. Written:
    gains (N, R, C) uint8; plane (N, 1, R, C) float32; the last channel of chain (N, contexts + 1,
    R, C) uint8, from 1 on.
    """
    _effective_gains[_blocks(gains.shape[0] * gains.shape[1]), GATHERERS, stream](
        step, indices, gains, plane, chain
    )


def dequantise(
    levels: DeviceArray,
    means: DeviceArray | None,
    where: DeviceArray,
    gains: DeviceArray,
    factors: CudaFactors,
    tilts: DeviceArray,
    first: int,
    y: DeviceArray,
    chain: DeviceArray | None,
    real: DeviceArray | None,
    state: DeviceArray,
    stream: Stream = 0,
) -> None:
    """Levels of one stage to latents and, where the stage is context, to context integers.

    levels: (N, channels, used) int32 of channels from ``first`` on. means: int16 of that shape.
    where: (used,) int32 positions. gains: (N, R, C) uint8, effective. tilts: (N,) uint8. y: (N, all
    channels, R C) float32. chain: (N, contexts + 1, R, C) uint8, 128 added; real: (N, contexts, R,
    C) float32; both None where the stage is no context. Tiles whose ``state`` is not OK are left as
    they are; a level out of range marks its tile.
    """
    tiles, channels, _ = levels.shape

    def flat(grid: DeviceArray | None) -> DeviceArray:
        return levels if grid is None else grid.reshape(tiles, grid.shape[1], -1)

    _dequantise[_blocks(tiles * channels), GATHERERS, stream](
        levels, levels if means is None else means, where, gains.reshape(tiles, -1),
        factors.mean, factors.context, factors.inverse_gain, tilts, first,
        int(means is not None), int(chain is not None), flat(y), flat(chain), flat(real), state,
    )  # fmt: skip
