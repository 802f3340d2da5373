"""Dependent quantisation: two quantisers, and a state machine that says which one is next.

After Marcellin and Fischer (trellis-coded quantisation, 1990) in the form of VVC (Schwarz et al.,
DCC 2019) with eight states. Quantiser 0 holds the whole steps, quantiser 1 zero and the odd half
steps; the parities of the indices coded so far choose between them. Points lie twice as densely as
either quantiser's, for little more than its rate: worth about 0.8 dB, or 0.13 bits a symbol.

A *level* counts half steps: ``level = 2 k - quantiser * sign(k)`` for index ``k``. Decoders take
the state along; encoders search the path of least cost (Viterbi). Every lane of the entropy coder
has a state of its own, so that neighbours do not wait for each other. docs/format.md, "Levels".
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from wsicodec.entropy.compiled import compiled
from wsicodec.entropy.tables import CLASSES, SymbolTables

STATES = 8
NEXT_STATE = ((0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5))
"""State after an even and after an odd index. Odd states use quantiser 1."""
PACKED = sum(
    s << 4 * (2 * i + odd) for i, row in enumerate(NEXT_STATE) for odd, s in enumerate(row)
)
"""The same, four bits each, for kernels."""

_NEXT = np.array(NEXT_STATE, np.int64)
_BEFORE = np.array(((0, 4), (2, 6), (0, 4), (2, 6), (3, 5), (1, 7), (3, 5), (1, 7)), np.int64)
"""The two states before each state, and the parities that lead from them to it."""
_ODD = np.array(((0, 1), (0, 1), (1, 0), (1, 0), (1, 0), (0, 1), (0, 1), (1, 0)), np.int64)
_ESCAPE_BITS = 7.0  # length and sign, about
_COMMON = 16  # magnitudes below are priced in advance


@compiled
def _split(levels, classes, lanes, indices, quantisers):
    """Indices and quantisers of ``levels``. False where a level is not on its quantiser."""
    states = np.zeros(lanes, np.int64)
    lane = 0
    for i in range(len(classes)):
        level = np.int64(levels[i])
        if classes[i] == 0:
            indices[i] = 0
            quantisers[i] = 0
            if level != 0:
                return False
            continue
        state = states[lane]
        q = state & 1
        if level != 0 and (level & 1) != q:
            return False
        k = level >> 1
        if q == 1 and level > 0:
            k += 1
        indices[i] = k
        quantisers[i] = q
        states[lane] = _NEXT[state, k & 1]
        lane = (lane + 1) % lanes
    return True


@compiled
def _price(j, row, radius, raw, bits):
    """Bits of magnitude ``j`` under a table, without the raw bits that all magnitudes pay."""
    top = (j + ((np.int64(1) << raw) >> 1)) >> raw
    if top <= radius:
        return bits[row, top + radius]
    return bits[row, 2 * radius + 1] + np.float32(_ESCAPE_BITS + 2 * np.log2(top - radius))


@compiled
def _candidates(
    values, classes, worth, rate_weight, radii, class_table, class_raw, bits, prices, where, best,
    price,
):  # fmt: skip
    """For each coded value, by quantiser and parity (2 quantiser + parity): the magnitude of the
    best index, and its cost. Returns how many there are.

    prices: (classes, 2 quantisers, magnitudes) bits of the small ones; the others are computed.
    """
    channels, positions = values.shape
    tables = len(radii) // 2
    common = np.int64(prices.shape[2])
    n = 0
    for c in range(channels):
        weight = worth[c]
        for p in range(positions):
            k = classes[c, p]
            if k == 0:
                continue
            where[n] = c * positions + p
            u = abs(values[c, p])
            for q in range(2):
                shift = np.float32(0.5) * np.float32(q)
                cost = prices[k, q]
                for odd in range(2):
                    # the nearest magnitude of this parity, and the one below it
                    half = (u + shift - np.float32(odd)) * np.float32(0.5) + np.float32(0.5)
                    j = np.int64(odd + 2 * np.int64(max(half, np.float32(0))))
                    error = u - (np.float32(j) - shift) if j > 0 else u
                    least = weight * error * error
                    if j < common:
                        least += rate_weight * cost[j]
                    else:
                        row = np.int64(class_table[k]) + q * tables
                        raw = np.int64(class_raw[k])
                        least += rate_weight * _price(j, row, np.int64(radii[row]), raw, bits)
                    if j >= 2:
                        i = j - 2
                        error = u - (np.float32(i) - shift) if i > 0 else u
                        other = weight * error * error
                        if i < common:
                            other += rate_weight * cost[i]
                        else:
                            row = np.int64(class_table[k]) + q * tables
                            raw = np.int64(class_raw[k])
                            other += rate_weight * _price(i, row, np.int64(radii[row]), raw, bits)
                        if other < least:
                            least, j = other, i
                    price[n, 2 * q + odd] = least
                    best[n, 2 * q + odd] = j
            n += 1
    return n


@compiled
def _prices(radii, class_table, class_raw, bits, prices):
    """Fill in bits of magnitudes by class and quantiser; those of class 0 stay as they are."""
    tables = len(radii) // 2
    for k in range(1, prices.shape[0]):
        for q in range(2):
            row = np.int64(class_table[k]) + q * tables
            for j in range(prices.shape[2]):
                raw = np.int64(class_raw[k])
                prices[k, q, j] = _price(j, row, np.int64(radii[row]), raw, bits)


@functools.lru_cache(maxsize=8)
def _price_table(tables: SymbolTables) -> npt.NDArray[np.float32]:
    prices = np.zeros((CLASSES, 2, _COMMON), np.float32)
    _prices(tables.radii, tables.class_table, tables.class_raw, tables.bits, prices)
    return prices


@compiled
def _join(a, b, even, odd):
    """Two states that lead to the same two: least costs (a even or b odd; a odd or b even), and
    whether they come from b."""
    a_even, b_odd = a + even, b + odd
    a_odd, b_even = a + odd, b + even
    first, second = b_odd < a_even, b_even < a_odd
    return min(a_even, b_odd), first, min(a_odd, b_even), second


@compiled
def _search(values, lanes, where, best, price, count, levels):
    """Least cost levels of ``count`` coded values, each lane's on a path of its own."""
    back = np.empty((count + lanes - 1) // lanes, np.uint8)  # bit t: state t comes from its second
    flat, signs = levels.reshape(-1), values.reshape(-1)
    for lane in range(lanes):
        far = np.float64(1e30)
        c0, c1, c2, c3 = np.float64(0), far, far, far
        c4, c5, c6, c7 = far, far, far, far
        n = 0
        for i in range(lane, count, lanes):
            e0, o0, e1, o1 = price[i, 0], price[i, 1], price[i, 2], price[i, 3]
            n0, f0, n2, f2 = _join(c0, c4, e0, o0)
            n5, f5, n7, f7 = _join(c1, c7, e1, o1)
            n1, f1, n3, f3 = _join(c2, c6, e0, o0)
            n6, f6, n4, f4 = _join(c3, c5, e1, o1)
            c0, c1, c2, c3, c4, c5, c6, c7 = n0, n1, n2, n3, n4, n5, n6, n7
            back[n] = (
                f0 | f1 << 1 | f2 << 2 | f3 << 3 | f4 << 4 | f5 << 5 | f6 << 6 | f7 << 7
            )  # fmt: skip
            n += 1
        least, state = c0, 0
        for t, cost in enumerate((c1, c2, c3, c4, c5, c6, c7)):
            if cost < least:
                least, state = cost, t + 1
        while n > 0:
            n -= 1
            i = lane + n * lanes
            second = (back[n] >> state) & 1
            odd = _ODD[state, second]
            state = _BEFORE[state, second]
            j = np.int64(best[i, 2 * (state & 1) + odd])
            level = 2 * j - (state & 1) if j > 0 else 0
            flat[where[i]] = -level if signs[where[i]] < 0 else level


def split_levels(
    levels: npt.NDArray[np.int32], classes: npt.NDArray[np.uint8], lanes: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """(indices, quantisers) of one array of levels, of its shape.

    Raises ValueError for a level that is not on the quantiser whose turn it is.
    """
    indices = np.empty(levels.shape, np.int32)
    quantisers = np.empty(levels.shape, np.uint8)
    outputs = indices.reshape(-1), quantisers.reshape(-1)
    if not _split(levels.reshape(-1), classes.reshape(-1), lanes, *outputs):
        raise ValueError("a level is not on its quantiser")
    return indices, quantisers


def search_levels(
    values: npt.NDArray[np.float32],
    classes: npt.NDArray[np.uint8],
    worth: npt.NDArray[np.float32],
    tables: SymbolTables,
    lanes: int,
) -> npt.NDArray[np.int32]:
    """Levels that cost least in bits plus ``worth`` times squared error, 0 in class 0.

    values: (channels, positions) in steps, magnitudes below 2**20. worth: (channels,) bits that a
    squared error of one step is worth; infinite in all channels: the nearest levels.
    """
    levels = np.zeros(classes.shape, np.int32)
    count = int(np.count_nonzero(classes))
    if count == 0:
        return levels
    finite = bool(np.isfinite(worth).all())
    weight = worth if finite else np.ones_like(worth)
    where = np.empty(count, np.int64)
    best = np.empty((count, 4), np.int32)
    price = np.empty((count, 4), np.float32)
    _candidates(
        values, classes, weight, np.float32(finite), tables.radii, tables.class_table,
        tables.class_raw, tables.bits, _price_table(tables), where, best, price,
    )  # fmt: skip
    _search(values, lanes, where, best, price, count, levels)
    return levels
