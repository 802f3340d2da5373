"""Dependent quantisation: the state machine, and the search that encoders make through it."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from scipy.special import ndtr

from wsicodec.entropy import kernel, reference
from wsicodec.entropy.tables import MAX_RADIUS, SymbolTables, tables_from_weights
from wsicodec.entropy.trellis import (
    NEXT_STATE,
    PACKED,
    STATES,
    search_levels,
    split_levels,
)

TABLES = 15


def normal_weights(scale: float, quantiser: int) -> np.ndarray:
    """Probabilities of indices -radius ... radius and the escape under a normal distribution."""
    radius = int(np.clip(np.ceil(5 * scale), 1, MAX_RADIUS // 2))
    k = np.arange(-radius - 1, radius + 2)
    points = k - 0.5 * quantiser * np.sign(k)
    p = np.diff(ndtr((points[1:] + points[:-1]) / 2 / scale))
    return np.append(p, max(1 - p.sum(), 1e-4))


def scale_of(symbol_class: int) -> float:
    return 0.3 * 2 ** (symbol_class / 4)


@pytest.fixture(scope="module")
def tables() -> SymbolTables:
    """Wider by the class; classes beyond 15 have raw bits."""
    return tables_from_weights(
        [normal_weights(scale_of(c), u) for u in (0, 1) for c in range(1, TABLES + 1)]
    )


def drawn(
    rng: np.random.Generator, shape: tuple[int, int], share: float = 0.8
) -> tuple[np.ndarray, np.ndarray]:
    """(values, classes) of random spreads, of classes 1 ... 15 and, for 1 - share, 0."""
    classes = rng.integers(1, TABLES + 1, shape).astype(np.uint8)
    values = (rng.standard_normal(shape) * scale_of(1) * 2 ** (classes / 4)).astype(np.float32)
    classes[rng.random(shape) >= share] = 0
    return values, classes


def squared_error(values: np.ndarray, classes: np.ndarray, levels: np.ndarray) -> float:
    error = np.where(classes > 0, values.astype(np.float64) - levels / 2, 0)
    return float((error**2).sum())


# -- the state machine --


def test_every_state_has_two_predecessors() -> None:
    assert len(NEXT_STATE) == STATES
    targets = [state for row in NEXT_STATE for state in row]
    assert sorted(targets) == sorted([*range(STATES)] * 2)
    for row in NEXT_STATE:
        assert row[0] != row[1]


def test_every_state_is_reached_from_the_first() -> None:
    """Within three symbols: no part of the trellis is idle."""
    reached = {0}
    for _ in range(3):
        reached = {target for state in reached for target in NEXT_STATE[state]}
    assert reached == set(range(STATES))


def test_states_whose_branches_meet_are_of_one_quantiser() -> None:
    """The two ways into a state differ in parity: a path that leaves another lies farther off."""
    for target in range(STATES):
        ways = [(s, odd) for s in range(STATES) for odd in (0, 1) if NEXT_STATE[s][odd] == target]
        assert len(ways) == 2
        assert len({s & 1 for s, _ in ways}) == 1 and len({odd for _, odd in ways}) == 2


def test_packed_is_the_same_table() -> None:
    assert 0 < PACKED < 2**64
    for state in range(STATES):
        for odd in (0, 1):
            assert PACKED >> 4 * (2 * state + odd) & 15 == NEXT_STATE[state][odd]
            assert reference.state_after(state, 6 + odd) == NEXT_STATE[state][odd]
            assert reference.state_after(state, -6 - odd) == NEXT_STATE[state][odd]


# -- levels and indices --


def levels_of(
    indices: np.ndarray, classes: np.ndarray, lanes: int
) -> tuple[np.ndarray, np.ndarray]:
    """(levels, quantisers) of one array of indices, by the document."""
    states = [0] * lanes
    levels, quantisers = np.zeros_like(indices), np.zeros_like(classes)
    coded = np.flatnonzero(classes)
    for n, i in enumerate(coded):
        state, k = states[n % lanes], int(indices.flat[i])
        quantisers.flat[i] = state & 1
        levels.flat[i] = 2 * k - (state & 1) * np.sign(k)
        states[n % lanes] = NEXT_STATE[state][k % 2]
    return levels, quantisers


@pytest.mark.parametrize("lanes", [1, 2, 4, 32])
@pytest.mark.parametrize("peak", [1, 3, 2**20])
def test_split_gives_the_indices_back(lanes: int, peak: int) -> None:
    rng = np.random.default_rng(lanes)
    for shape in ((0, 7), (1, 1), (3, 50), (8, 129)):
        classes = rng.integers(0, 4, shape).astype(np.uint8)
        indices = rng.integers(-peak, peak + 1, shape).astype(np.int32)
        indices[classes == 0] = 0
        levels, quantisers = levels_of(indices, classes, lanes)
        found = split_levels(levels, classes, lanes)
        assert found[0].dtype == np.int32 and found[1].dtype == np.uint8
        np.testing.assert_array_equal(found[0], indices)
        np.testing.assert_array_equal(found[1], quantisers)


@pytest.mark.parametrize("level", [1, -1, 3, -5, 2**21 - 1])
def test_a_level_on_the_other_quantiser_is_refused(level: int) -> None:
    classes = np.ones(2, np.uint8)
    # quantiser 0 first; an odd and an even index lead to quantiser 1, of odd levels
    for levels in ([0, level], [level, 0]):
        with pytest.raises(ValueError, match="quantiser"):
            split_levels(np.array(levels, np.int32), classes, 2)
    path = np.array([2, 4, level], np.int32)  # states 0, 2, 1
    split_levels(path, np.ones(3, np.uint8), 1)
    path[2] *= 2
    with pytest.raises(ValueError, match="quantiser"):
        split_levels(path, np.ones(3, np.uint8), 1)


def test_a_level_of_class_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="quantiser"):
        split_levels(np.array([2], np.int32), np.zeros(1, np.uint8), 1)


# -- the search --


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("worth", [0.0, 0.3, 6.0, 300.0, np.inf])
def test_found_levels_can_be_coded(tables: SymbolTables, lanes: int, worth: float) -> None:
    rng = np.random.default_rng(lanes)
    for shape in ((0, 5), (1, 1), (1, 3), (5, 64), (9, 300)):
        values, classes = drawn(rng, shape)
        classes[rng.random(shape) < 0.1] = 100  # raw bits
        values[rng.random(shape) < 0.05] *= 1e4
        price = np.full(shape[0], worth, np.float32)
        levels = search_levels(values, classes, price, tables, lanes)
        assert levels.shape == shape and levels.dtype == np.int32
        assert not levels[classes == 0].any()
        assert (levels * values >= 0).all()
        encoder = kernel.Encoder(tables, lanes)
        encoder.put(levels, classes, dependent=True)
        decoder = kernel.Decoder(encoder.finish(), tables, lanes)
        np.testing.assert_array_equal(decoder.get(classes, dependent=True), levels)
        decoder.finish()


def test_values_at_the_formats_bounds(tables: SymbolTables) -> None:
    values = np.array([[2.0**20 - 2, 2 - 2.0**20] * 9], np.float32)
    classes = np.full(values.shape, 127, np.uint8)
    for worth in (1.0, np.inf):
        levels = search_levels(values, classes, np.full(1, worth, np.float32), tables, 1)
        assert abs(levels / 2 - values).max() <= 1.5
        kernel.Encoder(tables, 1).put(levels, classes, dependent=True)


PEAK_INDEX = 4


def least_cost(
    values: np.ndarray, classes: np.ndarray, worth: np.ndarray, tables: SymbolTables, rate: float
) -> float:
    """The least cost of one lane's sequence: all paths of magnitudes 0 ... 4, one by one."""
    count = len(tables.radii) // 2

    @cache
    def cost(n: int, magnitude: int, quantiser: int) -> float:
        point = magnitude - 0.5 * quantiser * (magnitude > 0)
        table = int(classes[n]) - 1 + quantiser * count
        bits = float(tables.bits[table, int(tables.radii[table]) + magnitude])
        return rate * bits + float(worth[n]) * (abs(float(values[n])) - point) ** 2

    def rest(n: int, state: int) -> float:
        if n == len(values):
            return 0.0
        return min(
            cost(n, k, state & 1) + rest(n + 1, NEXT_STATE[state][k % 2])
            for k in range(PEAK_INDEX + 1)
        )

    return rest(0, 0)


def cost_of(
    values: np.ndarray,
    classes: np.ndarray,
    worth: np.ndarray,
    levels: np.ndarray,
    tables: SymbolTables,
    rate: float,
) -> float:
    """Bits of levels under the tables, plus worth times squared error."""
    indices, quantisers = split_levels(levels, classes, 1)
    total = 0.0
    for n, k in enumerate(indices):
        table = int(classes[n]) - 1 + int(quantisers[n]) * (len(tables.radii) // 2)
        total += rate * float(tables.bits[table, int(tables.radii[table]) + abs(int(k))])
        total += float(worth[n]) * (float(values[n]) - int(levels[n]) / 2) ** 2
    return total


@pytest.mark.parametrize("worth", [0.5, 3.0, 12.0, np.inf])
def test_no_path_costs_less_than_the_one_found(tables: SymbolTables, worth: float) -> None:
    rng = np.random.default_rng(int(min(worth, 99)))
    for _ in range(12):
        length = 6
        # wide enough for magnitudes up to 4, so that none is an escape
        classes = rng.integers(9, TABLES + 1, length).astype(np.uint8)
        values = rng.uniform(-1.7, 1.7, length).astype(np.float32)
        weight = np.full(length, 1.0 if np.isinf(worth) else worth)
        rate = 0.0 if np.isinf(worth) else 1.0
        levels = search_levels(
            values[None], classes[None], np.full(1, worth, np.float32), tables, 1
        )[0]
        found = cost_of(values, classes, weight, levels, tables, rate)
        best = least_cost(values, classes, weight, tables, rate)
        assert found == pytest.approx(best, rel=1e-6, abs=1e-6)


def test_channels_have_a_worth_each(tables: SymbolTables) -> None:
    """One lane runs through the channels; each is weighed by its own worth."""
    rng = np.random.default_rng(5)
    values = rng.uniform(-1.7, 1.7, (3, 2)).astype(np.float32)
    classes = np.full((3, 2), 10, np.uint8)
    worth = np.array([0.5, 20, 3], np.float32)
    levels = search_levels(values, classes, worth, tables, 1)
    flat = values.reshape(-1), classes.reshape(-1), np.repeat(worth, 2)
    found = cost_of(*flat, levels.reshape(-1), tables, 1.0)
    assert found == pytest.approx(least_cost(*flat, tables, 1.0), rel=1e-6)


@pytest.mark.parametrize("lanes", [2, 4, 8, 32])
@pytest.mark.parametrize("worth", [2.0, np.inf])
def test_lanes_are_searches_of_their_own(tables: SymbolTables, lanes: int, worth: float) -> None:
    """Every L-th coded symbol makes a sequence, searched as if there were no other."""
    rng = np.random.default_rng(lanes)
    values, classes = drawn(rng, (4, 100))
    levels = search_levels(values, classes, np.full(4, worth, np.float32), tables, lanes)
    coded = np.flatnonzero(classes)
    one = np.full(1, worth, np.float32)
    for lane in range(lanes):
        mine = coded[lane::lanes]
        alone = search_levels(
            values.reshape(1, -1)[:, mine], classes.reshape(1, -1)[:, mine], one, tables, 1
        )
        np.testing.assert_array_equal(levels.reshape(-1)[mine], alone[0])


@pytest.mark.parametrize("length", [1, 2, 5, 300])
def test_infinite_worth_gives_the_least_error(tables: SymbolTables, length: int) -> None:
    """Of all sequences that the trellis permits: dynamic programming over every level nearby."""
    rng = np.random.default_rng(length)
    values = rng.normal(0, 3, (1, length)).astype(np.float32)
    classes = np.full((1, length), 12, np.uint8)
    levels = search_levels(values, classes, np.full(1, np.inf, np.float32), tables, 1)
    cost = {0: 0.0}
    for value in values[0].astype(float):
        after: dict[int, float] = {}
        for state, before in cost.items():
            for k in range(int(value) - 4, int(value) + 5):
                error = value - reference.level_of(k, state & 1) / 2
                target = NEXT_STATE[state][k % 2]
                after[target] = min(after.get(target, np.inf), before + error**2)
        cost = after
    assert squared_error(values, classes, levels) == pytest.approx(min(cost.values()), rel=1e-9)
    if length > 100:  # below what one quantiser of whole steps reaches
        scalar = squared_error(values, classes, 2 * np.rint(values))
        assert squared_error(values, classes, levels) < 0.75 * scalar


def test_more_worth_is_less_error_and_more_bits(tables: SymbolTables) -> None:
    values, classes = drawn(np.random.default_rng(6), (4, 500))
    errors, sizes = [], []
    for worth in (0.5, 2, 8, 30, 200):
        levels = search_levels(values, classes, np.full(4, worth, np.float32), tables, 4)
        errors.append(squared_error(values, classes, levels))
        encoder = kernel.Encoder(tables, 4)
        encoder.put(levels, classes, dependent=True)
        sizes.append(len(encoder.finish()))
    assert errors == sorted(errors, reverse=True) and sizes == sorted(sizes)


# -- what it is for --


RADIUS = 24


def scalar_search(values: np.ndarray, worth: float, bits: np.ndarray, radius: int) -> np.ndarray:
    """Indices of whole steps that cost least, each for itself."""
    k = np.arange(-radius, radius + 1)
    cost = worth * (values[:, None] - k) ** 2 + bits[None, : 2 * radius + 1]
    return k[np.argmin(cost, 1)]


def conditional_entropy(indices: np.ndarray, quantisers: np.ndarray) -> float:
    """Bits of a symbol under tables fitted to the counts, one for each quantiser."""
    total = 0.0
    for u in (0, 1):
        _, counts = np.unique(indices[quantisers == u], return_counts=True)
        total -= float((counts * np.log2(counts / counts.sum())).sum()) if len(counts) else 0.0
    return total / len(indices)


def fitted(indices: np.ndarray, quantisers: np.ndarray, radius: int) -> SymbolTables:
    weights = []
    for u in (0, 1):
        k = np.clip(indices[quantisers == u], -radius, radius)
        counts = np.bincount(k + radius, minlength=2 * radius + 2) + 0.1
        counts[:-1] = (counts[:-1] + counts[-2::-1]) / 2
        weights += [counts] * TABLES
    return tables_from_weights(weights)


def normal_tables(scale: float, radius: int) -> SymbolTables:
    k = np.arange(-radius - 1, radius + 2)
    weights = []
    for u in (0, 1):
        points = k - 0.5 * u * np.sign(k)
        p = np.diff(ndtr((points[1:] + points[:-1]) / 2 / scale))
        weights += [np.append(p, 1e-5)] * TABLES
    return tables_from_weights(weights)


def rate_curve(source: np.ndarray, dependent: bool, worth: float) -> np.ndarray:
    """(log2 of relative squared error, bits of a symbol) at several steps, with tables that were
    fitted to what the search finds; (2, steps), the error falling."""
    points = []
    for deviation in (0.5, 0.6, 0.7, 0.85, 1.0, 1.2):  # in steps
        values = (source * deviation).astype(np.float32)
        classes = np.ones((1, len(values)), np.uint8)
        tables = normal_tables(deviation, RADIUS)
        for _ in range(3):
            if dependent:
                price = np.full(1, worth, np.float32)
                levels = search_levels(values[None], classes, price, tables, 4)
                indices, quantisers = (x[0] for x in split_levels(levels, classes, 4))
                found = levels[0] / 2
            else:
                indices = scalar_search(values, worth, tables.bits[0], RADIUS)
                quantisers, found = np.zeros(len(indices), np.uint8), indices
            tables = fitted(indices, quantisers, RADIUS)
        error = float(((values - found) ** 2).mean()) / deviation**2
        points.append((np.log2(error), conditional_entropy(indices, quantisers)))
    return np.array(points).T


def test_it_saves_bits_against_scalar_quantisation() -> None:
    """A normal source at about 1.5 bits a symbol: at least 4 % fewer at the same squared error.

    Both sides search, and choose their best step and worth of an error.
    """
    source = np.random.default_rng(7).standard_normal(20_000)
    at = np.linspace(-3, -2.2, 9)

    def least(dependent: bool) -> np.ndarray:
        # the slope of rate over error at high rates is -1 / (2 ln 2 D), D the nearest levels' error
        slope = 1 / (2 * np.log(2) * (0.056 if dependent else 1 / 12))
        curves = [rate_curve(source, dependent, f * slope) for f in (0.5, 0.75, 1)]
        return np.min([np.interp(at, c[0, ::-1], c[1, ::-1], np.inf, np.inf) for c in curves], 0)

    dependent, scalar = least(True), least(False)
    assert scalar.min() < 1.5 < scalar.max()
    assert (dependent < 0.96 * scalar).all()
