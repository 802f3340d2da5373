"""The entropy coder compiled with numba: the same bytes as ``reference``, a thousand times faster.

The functions release the GIL, check every bound and return status codes; the classes around them
raise. Compiled code is cached on disk by numba (beside the package, or in the user's cache
directory where that is read-only).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

from wsicodec.entropy.tables import (
    COARSE_BITS,
    LENGTH_BITS,
    MAX_MAGNITUDE_BITS,
    PROBABILITY_BITS,
    SYMBOL_PEAK,
    TOTAL,
    SymbolTables,
)
from wsicodec.errors import FormatError, TruncatedError

F = TypeVar("F", bound=Callable[..., Any])

OK, TRUNCATED, BAD_ESCAPE, BAD_SYMBOL = 0, 1, 2, 3
LOW = 1 << 16
_MASK = TOTAL - 1
_ENCODE_SHIFT = 32 - PROBABILITY_BITS
_MOST_STEPS = 6  # of one symbol: table, length, two of magnitude, sign, raw bits


@functools.cache
def _fingerprint() -> str:
    """Hash of the sources that compiled code depends on.

    numba looks at one file's time and size. Wheels have constant times, and kernels use constants
    of other modules: code cached by one release could answer for the next.
    """
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for name in ("entropy/kernel.py", "entropy/tables.py", "codec/cell.py"):
        with contextlib.suppress(OSError):  # in an archive: numba keeps no cache there either
            digest.update((package / name).read_bytes())
    return digest.hexdigest()[:12]


def compiled(function: F) -> F:
    """``numba.njit`` without the GIL, cached on disk where any cache directory can be written."""
    # names the cache's files
    function.__qualname__ = f"{function.__qualname__}_{_fingerprint()}"
    try:
        return cast(F, numba.njit(cache=True, nogil=True, boundscheck=False)(function))
    except RuntimeError:  # numba: no locator available, i.e. nowhere to keep a cache
        return cast(F, numba.njit(nogil=True, boundscheck=False)(function))


@compiled
def _decode(classes, out, words, cursor, states, slots, cdf, radii, class_table, class_raw):
    """Fill ``out`` with symbols. cursor: [next word, next lane]. Returns a status."""
    lanes = len(states)
    position, lane = cursor[0], cursor[1]
    end = len(words)
    for i in range(len(classes)):
        c = classes[i]
        if c == 0:
            out[i] = 0
            continue
        t = class_table[c]
        x = states[lane]
        slot = x & np.uint32(_MASK)
        radius = radii[t]
        index = np.int64(slots[t, slot >> np.uint32(COARSE_BITS)])
        while np.uint32(cdf[t, index + 1]) <= slot:
            index += 1
        start = np.uint32(cdf[t, index])
        frequency = np.uint32(cdf[t, index + 1]) - start
        x = np.uint32(frequency * (x >> np.uint32(PROBABILITY_BITS)) + slot - start)
        if x < LOW:
            if position >= end:
                return TRUNCATED
            x = np.uint32((x << np.uint32(16)) | np.uint32(words[position]))
            position += 1
        states[lane] = x
        lane += 1
        if lane == lanes:
            lane = 0
        radius = radii[t]
        raw = np.int64(class_raw[c])
        top = np.int64(index) - radius
        if top > radius or raw > 0:
            # fields of raw bits: escape length, magnitude (two parts), sign, low bits
            escaped = top > radius
            length = np.int64(0)
            magnitude = np.int64(0)
            negative = np.int64(0)
            low = np.int64(0)
            for field in range(5):
                bits = np.int64(0)
                if field == 0 and escaped:
                    bits = np.int64(LENGTH_BITS)
                elif field == 1 and escaped and length > PROBABILITY_BITS:
                    bits = length - PROBABILITY_BITS
                elif field == 2 and escaped:
                    bits = min(length, np.int64(PROBABILITY_BITS))
                elif field == 3 and escaped:
                    bits = np.int64(1)
                elif field == 4:
                    bits = raw
                if bits == 0:
                    continue
                x = states[lane]
                shift = np.uint32(PROBABILITY_BITS - bits)
                slot = x & np.uint32(_MASK)
                part = slot >> shift
                x = np.uint32(
                    ((x >> np.uint32(PROBABILITY_BITS)) << shift) + slot - (part << shift)
                )
                if x < LOW:
                    if position >= end:
                        return TRUNCATED
                    x = np.uint32((x << np.uint32(16)) | np.uint32(words[position]))
                    position += 1
                states[lane] = x
                lane += 1
                if lane == lanes:
                    lane = 0
                if field == 0:
                    length = np.int64(part)
                    if length > MAX_MAGNITUDE_BITS:
                        return BAD_ESCAPE
                elif field in (1, 2):
                    magnitude = (magnitude << bits) | np.int64(part)
                elif field == 3:
                    negative = np.int64(part)
                else:
                    low = np.int64(part)
            if escaped:
                top = radius + (np.int64(1) << length) + magnitude
                if negative:
                    top = -top
            top = ((top << raw) | low) - ((np.int64(1) << raw) >> 1)
            if top > SYMBOL_PEAK or top < -SYMBOL_PEAK:
                return BAD_ESCAPE
        out[i] = top
    cursor[0], cursor[1] = position, lane
    return OK


@compiled
def _steps(symbols, classes, starts, frequencies, begin, cdf, radii, class_table, class_raw):
    """Append the steps of symbols from index ``begin`` on; returns the new end, or -1 - status."""
    n = begin
    for i in range(len(classes)):
        c = classes[i]
        symbol = np.int64(symbols[i])
        if symbol > SYMBOL_PEAK or symbol < -SYMBOL_PEAK:
            return -1 - BAD_SYMBOL
        if c == 0:
            if symbol != 0:
                return -1 - BAD_SYMBOL
            continue
        t = class_table[c]
        raw = np.int64(class_raw[c])
        radius = np.int64(radii[t])
        shifted = symbol + ((np.int64(1) << raw) >> 1)
        top = shifted >> raw
        low = shifted - (top << raw)
        escaped = abs(top) > radius
        index = 2 * radius + 1 if escaped else top + radius
        starts[n] = cdf[t, index]
        frequencies[n] = cdf[t, index + 1] - cdf[t, index]
        n += 1
        length = np.int64(0)
        excess = np.int64(0)
        if escaped:
            excess = abs(top) - radius
            while (excess >> (length + 1)) > 0:
                length += 1
            if length > MAX_MAGNITUDE_BITS:
                return -1 - BAD_SYMBOL
            excess -= np.int64(1) << length
        for field in range(5):
            bits = np.int64(0)
            value = np.int64(0)
            if field == 0 and escaped:
                bits, value = np.int64(LENGTH_BITS), length
            elif field == 1 and escaped and length > PROBABILITY_BITS:
                bits, value = length - PROBABILITY_BITS, excess >> PROBABILITY_BITS
            elif field == 2 and escaped:
                bits = min(length, np.int64(PROBABILITY_BITS))
                value = excess & ((np.int64(1) << bits) - 1)
            elif field == 3 and escaped:
                bits, value = np.int64(1), np.int64(top < 0)
            elif field == 4:
                bits, value = raw, low
            if bits > 0:
                shift = PROBABILITY_BITS - bits
                starts[n] = value << shift
                frequencies[n] = np.int64(1) << shift
                n += 1
    return n


@compiled
def _encode(starts, frequencies, count, states, words):
    """Code steps backwards; words fill from the back of ``words``. Returns the first used index."""
    lanes = len(states)
    position = len(words)
    lane = count % lanes
    for n in range(count - 1, -1, -1):
        lane = lanes - 1 if lane == 0 else lane - 1
        x = np.uint64(states[lane])
        frequency = np.uint64(frequencies[n])
        if x >= frequency << np.uint64(_ENCODE_SHIFT):
            position -= 1
            words[position] = np.uint16(x & np.uint64(0xFFFF))
            x >>= np.uint64(16)
        quotient = x // frequency
        x = (quotient << np.uint64(PROBABILITY_BITS)) + (x - quotient * frequency)
        states[lane] = np.uint32(x + np.uint64(starts[n]))
    return position


class Encoder:
    """Collects symbols in decoding order; ``finish`` gives the bytes."""

    def __init__(self, tables: SymbolTables, lanes: int) -> None:
        self.tables, self.lanes = tables, lanes
        self.starts = np.empty(1 << 14, np.uint16)
        self.frequencies = np.empty(1 << 14, np.uint16)
        self.count = 0

    def put(self, symbols: npt.NDArray[np.int32], classes: npt.NDArray[np.uint8]) -> None:
        """Append symbols (int32) under their classes (uint8), same shape, C order.

        Raises ValueError for a symbol that its class cannot hold: a fault of the caller.
        """
        coded = int(np.count_nonzero(classes))
        needed = self.count + _MOST_STEPS * coded
        if needed > len(self.starts):
            size = max(needed, 2 * len(self.starts))
            self.starts = np.resize(self.starts, size)
            self.frequencies = np.resize(self.frequencies, size)
        t = self.tables
        end = _steps(
            symbols.reshape(-1), classes.reshape(-1), self.starts, self.frequencies, self.count,
            t.cdf, t.radii, t.class_table, t.class_raw,
        )  # fmt: skip
        if end < 0:
            raise ValueError("a symbol is outside what its class can code")
        self.count = end

    def finish(self) -> bytes:
        """All symbols as bytes."""
        states = np.full(self.lanes, LOW, np.uint32)
        words = np.empty(self.count, np.uint16)
        first = _encode(self.starts, self.frequencies, self.count, states, words)
        return states.astype("<u4").tobytes() + words[first:].astype("<u2").tobytes()


class Decoder:
    """Reads symbols in the order in which they were coded, array by array."""

    def __init__(self, data: bytes, tables: SymbolTables, lanes: int) -> None:
        if len(data) < 4 * lanes:
            raise TruncatedError("entropy-coded data is shorter than its lane states")
        if len(data) % 2:
            raise FormatError("entropy-coded data has an odd number of bytes")
        self.tables = tables
        self.states = np.frombuffer(data, "<u4", lanes).astype(np.uint32)
        if int(self.states.min()) < LOW:
            raise FormatError("a lane's state is below its range")
        self.words = np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.uint16, copy=False)
        self.cursor = np.zeros(2, np.int64)

    def get(self, classes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
        """The next symbols, int32 in the shape of ``classes`` (uint8, C order, 0 ... 127)."""
        out = np.empty(classes.shape, np.int32)
        t = self.tables
        status = _decode(
            classes.reshape(-1), out.reshape(-1), self.words, self.cursor, self.states,
            t.slots, t.cdf, t.radii, t.class_table, t.class_raw,
        )  # fmt: skip
        if status == TRUNCATED:
            raise TruncatedError("entropy-coded data ends early")
        if status == BAD_ESCAPE:
            raise FormatError("an escape is beyond the format's range")
        return out

    def finish(self) -> None:
        """Check that everything was read and every lane is back at its start."""
        if self.cursor[0] != len(self.words) or (self.states != LOW).any():
            raise FormatError("entropy-coded data does not end where its symbols do")


_warm = threading.Event()


def warm_up() -> None:
    """Load or compile the kernels once per process (tests and ``wsicodec doctor`` call it)."""
    if _warm.is_set():
        return
    weights = [np.ones(4)] * 8
    from wsicodec.entropy.tables import tables_from_weights

    tables = tables_from_weights(weights)
    classes = np.ones(4, np.uint8)
    encoder = Encoder(tables, 2)
    encoder.put(np.zeros(4, np.int32), classes)
    Decoder(encoder.finish(), tables, 2).get(classes)
    _warm.set()
