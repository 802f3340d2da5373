"""Probability tables of the symbol classes (docs/format.md, "Symbol tables").

A class is an integer 0 ... 127 that the entropy network picks for each symbol. Class 0 is always
zero and never coded. Classes 1 ... T have a table each for either quantiser (see ``trellis``);
larger classes, eight to the octave of standard deviation, reuse a table of the last octave and code
their low bits raw.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from wsicodec.errors import ModelError

PROBABILITY_BITS = 14
TOTAL = 1 << PROBABILITY_BITS
COARSE_BITS = 5
CLASSES = 128
OCTAVE = 8
MAX_RADIUS = 126  # 2 * radius + 2 symbols fit in a byte
LEAST_TABLES = 15  # so that no class has more raw bits
MAX_MAGNITUDE_BITS = 20  # escapes beyond are refused
LENGTH_BITS = 5  # an escape's length field
SYMBOL_PEAK = 2**20  # symbols beyond are refused


@dataclass(frozen=True, eq=False)
class SymbolTables:
    """Integer probability tables, validated.

    radii: (2 T,) table t holds the values -radii[t] ... radii[t] and, last, the escape. The first
        T tables are quantiser 0's, the others quantiser 1's.
    cdf: (2 T, width) uint16 cumulative frequencies, row t has 2 * radii[t] + 3 entries from 0 to
        2**14, strictly increasing; the rest of the row repeats 2**14.
    """

    radii: npt.NDArray[np.int32]
    cdf: npt.NDArray[np.uint16]

    def __post_init__(self) -> None:
        radii, cdf = self.radii, self.cdf
        if radii.ndim != 1 or cdf.ndim != 2 or len(radii) != len(cdf):
            raise ModelError(f"symbol tables of shapes {radii.shape} and {cdf.shape} do not match")
        count = len(radii) // 2
        if len(radii) % 2 or not LEAST_TABLES <= count < CLASSES:
            raise ModelError(
                f"{len(radii)} symbol tables: must be two sets of {LEAST_TABLES} to 127"
            )
        if radii.min() < 1 or radii.max() > MAX_RADIUS or cdf.shape[1] != 2 * radii.max() + 3:
            raise ModelError("a symbol table's radius does not fit")
        for t, radius in enumerate(radii):
            row = cdf[t].astype(np.int64)
            used = 2 * int(radius) + 3
            if row[0] != 0 or row[used - 1] != TOTAL or (row[used - 1 :] != TOTAL).any():
                raise ModelError(f"symbol table {t} does not run from 0 to {TOTAL}")
            if (np.diff(row[:used]) < 1).any():
                raise ModelError(f"symbol table {t} has a symbol of zero frequency")

    @cached_property
    def offsets(self) -> npt.NDArray[np.uint32]:
        """(2 T,): where each table begins within ``entries``."""
        sizes = 2 * self.radii.astype(np.int64) + 2
        return (np.cumsum(sizes) - sizes).astype(np.uint32)

    @cached_property
    def entries(self) -> npt.NDArray[np.uint64]:
        """All that a decoder needs of a symbol, one after the other, table after table.

        Bits 0-13: start of its interval; 14: parity of its index; 15: it is the escape; 16-31:
        frequency; 48-63: its level, signed.
        """
        parts = []
        for t, radius in enumerate(self.radii):
            edges = self.cdf[t, : 2 * int(radius) + 3].astype(np.int64)
            k = np.arange(-int(radius), int(radius) + 2)
            level = 2 * k - (t >= len(self.radii) // 2) * np.sign(k)
            entry = edges[:-1] | (k & 1) << 14 | np.diff(edges) << 16 | level << 48
            entry[-1] |= 1 << 15
            parts.append(entry)
        return np.concatenate(parts).astype(np.uint64)

    @cached_property
    def first(self) -> npt.NDArray[np.uint8]:
        """(2 T, 2**9): the symbol that owns the first of every 32 slots of the probability range.

        Tables of all slots would take a megabyte, and a cache miss for most symbols.
        """
        step = 1 << COARSE_BITS
        first = np.empty((len(self.radii), TOTAL // step), np.uint8)
        for t, radius in enumerate(self.radii):
            edges = self.cdf[t, : 2 * int(radius) + 3].astype(np.int64)
            counts = edges[1:] - edges[:-1]
            first[t] = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)[::step]
        return first

    @cached_property
    def bits(self) -> npt.NDArray[np.float32]:
        """(2 T, width - 1): code length of each symbol index, for encoders' decisions."""
        counts = np.diff(self.cdf.astype(np.float64), axis=1)
        return (PROBABILITY_BITS - np.log2(np.maximum(counts, 1))).astype(np.float32)

    @cached_property
    def class_table(self) -> npt.NDArray[np.uint8]:
        """(128,): quantiser 0's table of each class (0 for class 0, which has none)."""
        return np.array([self.place(c)[0] for c in range(CLASSES)], np.uint8)

    @cached_property
    def class_raw(self) -> npt.NDArray[np.uint8]:
        """(128,): raw low bits of each class."""
        return np.array([self.place(c)[1] for c in range(CLASSES)], np.uint8)

    def place(self, symbol_class: int) -> tuple[int, int]:
        """(quantiser 0's table, raw bits) of a class 1 ... 127; quantiser 1's is T further."""
        count = len(self.radii) // 2
        if symbol_class <= count:
            return max(symbol_class - 1, 0), 0
        raw = (symbol_class - count + OCTAVE - 1) // OCTAVE
        return symbol_class - OCTAVE * raw - 1, raw


def quantised_frequencies(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Integer frequencies >= 1 that sum to 2**14, as near as possible to ``weights``.

    For exporting tables only: floats decide nothing at run time.
    """
    share = weights / weights.sum() * TOTAL
    counts: npt.NDArray[np.int64] = np.maximum(1, np.floor(share)).astype(np.int64)
    while (rest := TOTAL - int(counts.sum())) != 0:
        # move the cheapest units in code length first
        if rest > 0:
            counts[np.argmax(share / counts)] += 1
        else:
            able = np.where(counts > 1, share / counts, np.inf)
            counts[np.argmin(able)] -= 1
    return counts


def tables_from_weights(weights: list[npt.NDArray[np.float64]]) -> SymbolTables:
    """Tables from unnormalised probabilities, one array of 2 * radius + 2 entries per table:
    quantiser 0's classes, then quantiser 1's."""
    radii = np.array([(len(w) - 2) // 2 for w in weights], np.int32)
    cdf = np.full((len(weights), 2 * int(radii.max()) + 3), TOTAL, np.uint16)
    for t, w in enumerate(weights):
        cdf[t, 0] = 0
        cdf[t, 1 : len(w) + 1] = np.cumsum(quantised_frequencies(w))
    return SymbolTables(radii, cdf)
