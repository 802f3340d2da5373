"""The entropy coder compiled with numba: the same bytes as ``reference``, a thousand times faster.

The functions release the GIL, check every bound and return status codes; the classes around them
raise.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wsicodec.entropy.compiled import compiled
from wsicodec.entropy.tables import (
    COARSE_BITS,
    LENGTH_BITS,
    MAX_MAGNITUDE_BITS,
    PROBABILITY_BITS,
    SYMBOL_PEAK,
    TOTAL,
    SymbolTables,
)
from wsicodec.entropy.trellis import PACKED, split_levels
from wsicodec.errors import FormatError, TruncatedError

_Array = npt.NDArray[np.generic]
Arguments = tuple[_Array, _Array, _Array, _Array, _Array, _Array, _Array, _Array, _Array]
"""Words, cursor, states; first, entries, offsets, radii, class_table, class_raw of tables."""

OK, TRUNCATED, BAD_ESCAPE, BAD_SYMBOL = 0, 1, 2, 3
LOW = 1 << 16
_MASK = TOTAL - 1
_ENCODE_SHIFT = 32 - PROBABILITY_BITS
_BLOCK = 2048
_MOST_STEPS = 6  # of one symbol: table, length, two of magnitude, sign, raw bits


@compiled
def _raw(x, words, position, bits):
    """``bits`` raw bits, at most 14, of a lane's state. Returns (value, state, position)."""
    shift = np.uint64(PROBABILITY_BITS) - bits
    slot = x & np.uint64(_MASK)
    part = slot >> shift
    x = ((x >> np.uint64(PROBABILITY_BITS)) << shift) + slot - (part << shift)
    if x < np.uint64(LOW):
        x = (x << np.uint64(16)) | np.uint64(words[position])
        position += np.uint64(1)
    return part, x, position


@compiled
def _escaped(x, words, position, end, radius, escape, level, raw):
    """What follows a table symbol that does not say all: (status, index, state, position)."""
    high = np.uint64(PROBABILITY_BITS)
    top = level
    if escape:
        field, x, position = _raw(x, words, position, np.uint64(LENGTH_BITS))
        length = field
        if position > end:
            return TRUNCATED, np.int64(0), x, position
        if length > np.uint64(MAX_MAGNITUDE_BITS):
            return BAD_ESCAPE, np.int64(0), x, position
        magnitude = np.uint64(0)
        if length > high:
            magnitude, x, position = _raw(x, words, position, length - high)
            if position > end:
                return TRUNCATED, np.int64(0), x, position
        part = min(length, high)
        if part > np.uint64(0):
            field, x, position = _raw(x, words, position, part)
            magnitude = (magnitude << part) | field
            if position > end:
                return TRUNCATED, np.int64(0), x, position
        field, x, position = _raw(x, words, position, np.uint64(1))
        if position > end:
            return TRUNCATED, np.int64(0), x, position
        top = radius + (np.int64(1) << np.int64(length)) + np.int64(magnitude)
        if field == np.uint64(1):
            top = -top
    if raw > np.uint64(0):
        field, x, position = _raw(x, words, position, raw)
        if position > end:
            return TRUNCATED, np.int64(0), x, position
        wide = np.int64(raw)
        top = ((top << wide) | np.int64(field)) - ((np.int64(1) << wide) >> 1)
    if top > SYMBOL_PEAK or top < -SYMBOL_PEAK:
        return BAD_ESCAPE, np.int64(0), x, position
    return OK, top, x, position


@compiled
def decode_symbols(
    classes, out, words, cursor, states, first, entries, offsets, radii, class_table, class_raw,
    packed,
):  # fmt: skip
    """Fill ``out`` with levels of dependent symbols, or with symbols where ``packed``, the state
    machine, is 0. words: one more than there are. cursor: [next word, next lane]. Returns a status.

    Unsigned indices, and selections in place of branches that nobody can predict.
    """
    one, zero = np.uint64(1), np.uint64(0)
    lanes = np.uint64(len(states))
    position, lane = np.uint64(cursor[0]), np.uint64(cursor[1])
    end = np.uint64(len(words) - 1)
    tables = np.uint64(len(radii) // 2)
    fine = np.uint64(COARSE_BITS)
    machine = np.zeros(lanes, np.uint64)
    halve = np.int64(1) if packed == zero else np.int64(0)
    size = np.uint64(len(classes))
    block = np.uint64(_BLOCK)
    coded = np.empty(_BLOCK, np.uint64)
    for begin in range(zero, size, block):
        # the coded ones first: whether a class is 0 is not for branch predictors
        count = np.uint64(0)
        for i in range(begin, min(begin + block, size)):
            coded[count] = i
            out[i] = 0
            count += np.uint64(classes[i] != 0)
        for n in range(count):
            at = np.uint64(coded[n])
            c = np.uint64(classes[at])
            m = machine[lane]
            t = np.uint64(class_table[c]) + (m & one) * tables
            x = np.uint64(states[lane])
            slot = x & np.uint64(_MASK)
            index = np.uint64(offsets[t]) + np.uint64(first[t, slot >> fine])
            entry = entries[index]
            frequency = (entry >> np.uint64(16)) & np.uint64(0xFFFF)
            within = slot - (entry & np.uint64(_MASK))
            while within >= frequency:
                index += one
                entry = entries[index]
                frequency = (entry >> np.uint64(16)) & np.uint64(0xFFFF)
                within = slot - (entry & np.uint64(_MASK))
            x = frequency * (x >> np.uint64(PROBABILITY_BITS)) + within
            low = np.uint64(x < np.uint64(LOW))
            x = (x << (low << np.uint64(4))) | (np.uint64(words[position]) & (zero - low))
            position += low
            if position > end:
                return TRUNCATED
            odd = (entry >> np.uint64(14)) & one
            level = np.int64(entry) >> np.int64(48)
            escape = (entry >> np.uint64(15)) & one
            if escape | np.uint64(class_raw[c]):
                quantiser = np.int64(m & one)
                sign = np.int64(level > 0) - np.int64(level < 0)
                status, k, x, position = _escaped(
                    x, words, position, end, np.int64(radii[t]), escape == one,
                    (level + quantiser * sign) >> np.int64(1), np.uint64(class_raw[c]),
                )  # fmt: skip
                if status != OK:
                    return status
                odd = np.uint64(k & 1)
                level = 2 * k - quantiser * (np.int64(k > 0) - np.int64(k < 0))
            states[lane] = np.uint32(x)
            machine[lane] = (packed >> ((m << np.uint64(3)) | (odd << np.uint64(2)))) & np.uint64(7)
            out[at] = level >> halve
            lane += one
            if lane == lanes:
                lane = zero
    cursor[0], cursor[1] = position, lane
    return OK


@compiled
def _steps(
    symbols, classes, quantisers, starts, frequencies, owners, begin, lane, lanes,
    cdf, radii, class_table, class_raw,
):  # fmt: skip
    """Append the steps of symbols from index ``begin`` on, the first symbol's in ``lane``; returns
    the new end, or -1 - status."""
    n = begin
    tables = len(radii) // 2
    for i in range(len(classes)):
        c = classes[i]
        symbol = np.int64(symbols[i])
        if symbol > SYMBOL_PEAK or symbol < -SYMBOL_PEAK:
            return -1 - BAD_SYMBOL
        if c == 0:
            if symbol != 0:
                return -1 - BAD_SYMBOL
            continue
        t = np.int64(class_table[c]) + tables * np.int64(quantisers[i])
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
        while begin < n:
            owners[begin] = lane
            begin += 1
        lane = (lane + 1) % lanes
    return n


@compiled
def _encode(starts, frequencies, owners, count, states, words):
    """Code steps backwards; words fill from the back of ``words``. Returns the first used index."""
    position = len(words)
    for n in range(count - 1, -1, -1):
        lane = owners[n]
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
        self.owners = np.empty(1 << 14, np.uint8)
        self.count = self.symbols = 0

    def put(
        self,
        values: npt.NDArray[np.int32],
        classes: npt.NDArray[np.uint8],
        *,
        dependent: bool = False,
    ) -> None:
        """Append symbols (int32) under their classes (uint8), same shape, C order.

        dependent: ``values`` are levels of dependent symbols (wsicodec.entropy.trellis).
        Raises ValueError for a value that its class or quantiser cannot hold: the caller's fault.
        """
        coded = int(np.count_nonzero(classes))
        needed = self.count + _MOST_STEPS * coded
        if needed > len(self.starts):
            size = max(needed, 2 * len(self.starts))
            self.starts = np.resize(self.starts, size)
            self.frequencies = np.resize(self.frequencies, size)
            self.owners = np.resize(self.owners, size)
        t = self.tables
        if dependent:
            values, quantisers = split_levels(values, classes, self.lanes)
        else:
            quantisers = np.zeros(classes.shape, np.uint8)
        end = _steps(
            values.reshape(-1), classes.reshape(-1), quantisers.reshape(-1),
            self.starts, self.frequencies, self.owners,
            self.count, self.symbols % self.lanes, self.lanes,
            t.cdf, t.radii, t.class_table, t.class_raw,
        )  # fmt: skip
        if end < 0:
            raise ValueError("a symbol is outside what its class can code")
        self.count = end
        self.symbols += coded

    def finish(self) -> bytes:
        """All symbols as bytes."""
        states = np.full(self.lanes, LOW, np.uint32)
        words = np.empty(self.count, np.uint16)
        first = _encode(self.starts, self.frequencies, self.owners, self.count, states, words)
        return states.astype("<u4").tobytes() + words[first:].astype("<u2").tobytes()


def check_status(status: int) -> None:
    """Raise what ``decode_symbols`` found, if anything."""
    if status == TRUNCATED:
        raise TruncatedError("entropy-coded data ends early")
    if status != OK:
        raise FormatError("an escape is beyond the format's range")


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
        words = np.frombuffer(data, "<u2", offset=4 * lanes)
        self.words = np.zeros(len(words) + 1, np.uint16)  # one more: read, never used
        self.words[:-1] = words
        self.cursor = np.zeros(2, np.int64)

    def get(
        self, classes: npt.NDArray[np.uint8], *, dependent: bool = False
    ) -> npt.NDArray[np.int32]:
        """The next symbols, int32 in the shape of ``classes`` (uint8, C order, 0 ... 127).

        dependent: they are dependent symbols; their levels are returned.
        """
        out = np.empty(classes.shape, np.int32)
        if classes.size >= 2**32:
            raise ValueError("too many symbols at once")
        packed = np.uint64(PACKED if dependent else 0)
        check_status(
            decode_symbols(classes.reshape(-1), out.reshape(-1), *self.arguments(), packed)
        )
        return out

    def arguments(self) -> Arguments:
        """What ``decode_symbols`` takes of a stream and its tables."""
        t = self.tables
        return (
            self.words, self.cursor, self.states,
            t.first, t.entries, t.offsets, t.radii, t.class_table, t.class_raw,
        )  # fmt: skip

    def finish(self) -> None:
        """Check that everything was read and every lane is back at its start."""
        if self.cursor[0] != len(self.words) - 1 or (self.states != LOW).any():
            raise FormatError("entropy-coded data does not end where its symbols do")
