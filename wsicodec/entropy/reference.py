"""The entropy coder in plain Python: the specification, and what the kernel is tested against.

rANS after Duda (arXiv:1311.2540) with the letters of Giesen (arXiv:1402.3392): state ``x`` within
[L, 2**32), L = 2**16, 16-bit renormalisation, 2**14 slots. A symbol becomes one or more *steps*
``(start, frequency)``, all of them in one lane: coded symbol n belongs to lane n mod lanes. The
encoder runs through the steps backwards, so that the decoder reads forwards.

Arrays of dependent symbols hold *levels*, half steps of two quantisers (``trellis``); their indices
are what is coded. Here the state machine is that of docs/format.md, "Levels", word for word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from wsicodec.entropy.tables import (
    LENGTH_BITS,
    MAX_MAGNITUDE_BITS,
    PROBABILITY_BITS,
    SYMBOL_PEAK,
    TOTAL,
    SymbolTables,
)
from wsicodec.errors import FormatError, TruncatedError

LOW = 1 << 16
Step = tuple[int, int]

AFTER_EVEN = (0, 5, 1, 6, 2, 4, 3, 7)
AFTER_ODD = (2, 7, 3, 4, 0, 6, 1, 5)


def state_after(state: int, index: int) -> int:
    """A lane's state after an index; ``state & 1`` is the quantiser of its next symbol."""
    return AFTER_ODD[state] if index % 2 else AFTER_EVEN[state]


def level_of(index: int, quantiser: int) -> int:
    """What an index means, in half steps."""
    sign = (index > 0) - (index < 0)
    return 2 * index - quantiser * sign


def index_of(level: int, quantiser: int) -> int:
    """The index of a level. Raises ValueError where the quantiser does not hold it."""
    sign = (level > 0) - (level < 0)
    index = (level + quantiser * sign) // 2
    if level_of(index, quantiser) != level:
        raise ValueError(f"level {level} is not on quantiser {quantiser}")
    return index


def raw_steps(value: int, bits: int) -> list[Step]:
    """``bits`` equiprobable bits, at most 14 to the step, high part first."""
    steps = []
    if bits > PROBABILITY_BITS:
        steps += raw_steps(value >> PROBABILITY_BITS, bits - PROBABILITY_BITS)
        value &= TOTAL - 1
        bits = PROBABILITY_BITS
    shift = PROBABILITY_BITS - bits
    if bits:
        steps.append((value << shift, 1 << shift))
    return steps


def table_of(symbol_class: int, quantiser: int, tables: SymbolTables) -> tuple[int, int]:
    """(table, raw bits) of a class 1 ... 127: the second half of the tables is quantiser 1's."""
    table, raw = tables.place(symbol_class)
    return table + quantiser * (len(tables.radii) // 2), raw


def symbol_steps(
    symbol: int, symbol_class: int, tables: SymbolTables, quantiser: int = 0
) -> list[Step]:
    """Steps of one symbol (an index) of a class 1 ... 127."""
    if abs(symbol) > SYMBOL_PEAK:
        raise ValueError(f"symbol {symbol} is beyond the format's range")
    table, raw = table_of(symbol_class, quantiser, tables)
    shifted = symbol + (1 << raw >> 1)
    top, low = shifted >> raw, shifted & ((1 << raw) - 1)
    radius, cdf = int(tables.radii[table]), tables.cdf[table]

    def entry(index: int) -> Step:
        return int(cdf[index]), int(cdf[index + 1]) - int(cdf[index])

    if abs(top) <= radius:
        steps = [entry(top + radius)]
    else:
        excess = abs(top) - radius  # >= 1
        length = excess.bit_length() - 1
        steps = [entry(2 * radius + 1), *raw_steps(length, LENGTH_BITS)]
        steps += raw_steps(excess - (1 << length), length)
        steps += raw_steps(int(top < 0), 1)
    return steps + raw_steps(low, raw)


class Encoder:
    """Collects symbols in decoding order, array by array; ``finish`` gives the bytes."""

    def __init__(self, tables: SymbolTables, lanes: int) -> None:
        self.tables, self.lanes = tables, lanes
        self.steps: list[tuple[int, Step]] = []  # with their lanes
        self.lane = 0  # of the next symbol

    def put(self, values: Iterable[int], classes: Iterable[int], dependent: bool = False) -> None:
        """Append one array: symbols, or levels where ``dependent``."""
        machine = [0] * self.lanes
        for value, symbol_class in zip(values, classes, strict=True):
            if symbol_class == 0:
                if value:
                    raise ValueError(f"class 0 holds zeros alone, not {value}")
                continue
            quantiser, index = 0, value
            if dependent:
                state = machine[self.lane]
                quantiser = state & 1
                index = index_of(value, quantiser)
                machine[self.lane] = state_after(state, index)
            steps = symbol_steps(index, symbol_class, self.tables, quantiser)
            self.steps += [(self.lane, step) for step in steps]
            self.lane = (self.lane + 1) % self.lanes

    def finish(self) -> bytes:
        """All symbols as bytes."""
        states = [LOW] * self.lanes
        words: list[int] = []
        for lane, (start, frequency) in reversed(self.steps):
            x = states[lane]
            if x >= frequency << (32 - PROBABILITY_BITS):
                words.append(x & 0xFFFF)
                x >>= 16
            # x = C(s, x)
            states[lane] = (x // frequency << PROBABILITY_BITS) + x % frequency + start
        head = b"".join(x.to_bytes(4, "little") for x in states)
        return head + b"".join(w.to_bytes(2, "little") for w in reversed(words))


def encode(
    symbols: Iterable[int],
    classes: Iterable[int],
    tables: SymbolTables,
    lanes: int,
    dependent: bool = False,
) -> bytes:
    """Code one array of symbols, or of levels where ``dependent``, under their classes;
    ``Decoder`` with the same classes gives them back."""
    encoder = Encoder(tables, lanes)
    encoder.put(symbols, classes, dependent)
    return encoder.finish()


class Decoder:
    """Reads symbols in the order in which they were coded, array by array."""

    def __init__(self, data: bytes, tables: SymbolTables, lanes: int) -> None:
        if len(data) < 4 * lanes:
            raise TruncatedError("entropy-coded data is shorter than its lane states")
        if len(data) % 2:
            raise FormatError("entropy-coded data has an odd number of bytes")
        self.tables, self.lanes = tables, lanes
        self.states = [int.from_bytes(data[4 * i : 4 * i + 4], "little") for i in range(lanes)]
        if min(self.states) < LOW:
            raise FormatError("a lane's state is below its range")
        self.data, self.position = data, 4 * lanes
        self.lane = 0  # of the next symbol

    def _slot(self) -> int:
        return self.states[self.lane] & (TOTAL - 1)

    def _advance(self, start: int, frequency: int) -> None:
        x = self.states[self.lane]
        x = frequency * (x >> PROBABILITY_BITS) + (x & (TOTAL - 1)) - start
        if x < LOW:
            if self.position + 2 > len(self.data):
                raise TruncatedError("entropy-coded data ends early")
            word = int.from_bytes(self.data[self.position : self.position + 2], "little")
            x = x << 16 | word
            self.position += 2
        self.states[self.lane] = x

    def raw(self, bits: int) -> int:
        """The next ``bits`` raw bits of the symbol."""
        value = 0
        if bits > PROBABILITY_BITS:
            value = self.raw(bits - PROBABILITY_BITS)
            bits = PROBABILITY_BITS
        if not bits:
            return value
        shift = PROBABILITY_BITS - bits
        part = self._slot() >> shift
        self._advance(part << shift, 1 << shift)
        return value << bits | part

    def symbol(self, symbol_class: int, quantiser: int = 0) -> int:
        """The next symbol (an index), given its class."""
        if symbol_class == 0:
            return 0
        table, raw = table_of(symbol_class, quantiser, self.tables)
        radius, cdf = int(self.tables.radii[table]), self.tables.cdf[table]
        slot = self._slot()
        index = 0
        while int(cdf[index + 1]) <= slot:
            index += 1
        self._advance(int(cdf[index]), int(cdf[index + 1]) - int(cdf[index]))
        if index <= 2 * radius:
            top = index - radius
        else:
            length = self.raw(LENGTH_BITS)
            if length > MAX_MAGNITUDE_BITS:
                raise FormatError(f"an escape of {length} bits is beyond the format's range")
            magnitude = radius + (1 << length) + self.raw(length)
            top = -magnitude if self.raw(1) else magnitude
        low = self.raw(raw)
        symbol = (top << raw | low) - (1 << raw >> 1)
        if abs(symbol) > SYMBOL_PEAK:
            raise FormatError(f"symbol {symbol} is beyond the format's range")
        self.lane = (self.lane + 1) % self.lanes
        return symbol

    def symbols(self, classes: Sequence[int], dependent: bool = False) -> list[int]:
        """The next array, given its classes: symbols, or levels where ``dependent``."""
        if not dependent:
            return [self.symbol(int(c)) for c in classes]
        machine = [0] * self.lanes
        levels = []
        for c in classes:
            if c == 0:
                levels.append(0)
                continue
            lane = self.lane
            quantiser = machine[lane] & 1
            index = self.symbol(int(c), quantiser)
            machine[lane] = state_after(machine[lane], index)
            levels.append(level_of(index, quantiser))
        return levels

    def finish(self) -> None:
        """Check that everything was read and every lane is back at its start."""
        if self.position != len(self.data) or any(x != LOW for x in self.states):
            raise FormatError("entropy-coded data does not end where its symbols do")
