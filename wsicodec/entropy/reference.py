"""The entropy coder in plain Python: the specification, and what the kernel is tested against.

rANS after Duda (arXiv:1311.2540) with the letters of Giesen (arXiv:1402.3392): state ``x`` within
[L, 2**32), L = 2**16, 16-bit renormalisation, 2**14 slots. A symbol becomes one or more *steps*
``(start, frequency)``; step n belongs to lane n mod lanes. The encoder runs through the steps
backwards, so that the decoder reads forwards.
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


def symbol_steps(symbol: int, symbol_class: int, tables: SymbolTables) -> list[Step]:
    """Steps of one symbol; none for class 0, whose symbol must be 0."""
    if abs(symbol) > SYMBOL_PEAK:
        raise ValueError(f"symbol {symbol} is beyond the format's range")
    if symbol_class == 0:
        if symbol:
            raise ValueError(f"class 0 holds zeros alone, not {symbol}")
        return []
    table, raw = tables.place(symbol_class)
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


def encode(
    symbols: Iterable[int], classes: Iterable[int], tables: SymbolTables, lanes: int
) -> bytes:
    """Code symbols under their classes; ``Decoder`` with the same classes gives them back."""
    steps = [s for q, c in zip(symbols, classes, strict=True) for s in symbol_steps(q, c, tables)]
    states = [LOW] * lanes
    words: list[int] = []
    for n in reversed(range(len(steps))):
        start, frequency = steps[n]
        x = states[n % lanes]
        if x >= frequency << (32 - PROBABILITY_BITS):
            words.append(x & 0xFFFF)
            x >>= 16
        # x = C(s, x)
        states[n % lanes] = (x // frequency << PROBABILITY_BITS) + x % frequency + start
    head = b"".join(x.to_bytes(4, "little") for x in states)
    return head + b"".join(w.to_bytes(2, "little") for w in reversed(words))


class Decoder:
    """Reads symbols in the order in which they were coded, any number at a time."""

    def __init__(self, data: bytes, tables: SymbolTables, lanes: int) -> None:
        if len(data) < 4 * lanes:
            raise TruncatedError("entropy-coded data is shorter than its lane states")
        if len(data) % 2:
            raise FormatError("entropy-coded data has an odd number of bytes")
        self.tables, self.lanes = tables, lanes
        self.states = [int.from_bytes(data[4 * i : 4 * i + 4], "little") for i in range(lanes)]
        if min(self.states) < LOW:
            raise FormatError("a lane's state is below its range")
        self.data, self.position, self.step = data, 4 * lanes, 0

    def _slot(self) -> int:
        return self.states[self.step % self.lanes] & (TOTAL - 1)

    def _advance(self, start: int, frequency: int) -> None:
        lane = self.step % self.lanes
        x = self.states[lane]
        x = frequency * (x >> PROBABILITY_BITS) + (x & (TOTAL - 1)) - start
        if x < LOW:
            if self.position + 2 > len(self.data):
                raise TruncatedError("entropy-coded data ends early")
            word = int.from_bytes(self.data[self.position : self.position + 2], "little")
            x = x << 16 | word
            self.position += 2
        self.states[lane] = x
        self.step += 1

    def raw(self, bits: int) -> int:
        """The next ``bits`` raw bits."""
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

    def symbol(self, symbol_class: int) -> int:
        """The next symbol, given its class."""
        if symbol_class == 0:
            return 0
        table, raw = self.tables.place(symbol_class)
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
        return symbol

    def symbols(self, classes: Sequence[int]) -> list[int]:
        """The next symbols, given their classes."""
        return [self.symbol(int(c)) for c in classes]

    def finish(self) -> None:
        """Check that everything was read and every lane is back at its start."""
        if self.position != len(self.data) or any(x != LOW for x in self.states):
            raise FormatError("entropy-coded data does not end where its symbols do")
