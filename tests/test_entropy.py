"""The compiled entropy coder against its plain-Python specification, constriction and theory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wsicodec
from wsicodec.entropy import kernel, reference
from wsicodec.entropy.tables import (
    CLASSES,
    TOTAL,
    SymbolTables,
    quantised_frequencies,
    tables_from_weights,
)
from wsicodec.errors import FormatError, ModelError, TruncatedError, WsicodecError


def scale_of(symbol_class: int) -> float:
    return 2 ** ((symbol_class - 1) / 8 - 2.75)


def laplace_weights(scale: float, quantiser: int = 0) -> np.ndarray:
    """Of indices -radius ... radius and the escape; one step is the unit."""
    radius = int(np.clip(np.ceil(5 * scale), 1, 64))
    values = np.arange(-radius, radius + 1)
    points = values - 0.5 * quantiser * np.sign(values)
    weights = np.exp(-np.abs(points) * np.sqrt(2) / scale)
    return np.append(weights, max(1e-6, weights[-1]))


@pytest.fixture(scope="module")
def tables() -> SymbolTables:
    return tables_from_weights(
        [laplace_weights(scale_of(c), u) for u in (0, 1) for c in range(1, 56)]
    )


def random_symbols(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    classes = rng.integers(0, CLASSES, count).astype(np.uint8)
    scales = np.array([0.0] + [scale_of(c) for c in range(1, CLASSES)])[classes]
    symbols = np.round(rng.laplace(0, scales / np.sqrt(2) + 1e-12)).astype(np.int32)
    symbols[classes == 0] = 0
    return symbols, classes


def levels_of(indices: np.ndarray, classes: np.ndarray, lanes: int) -> np.ndarray:
    """The levels of one array of dependent symbols, given their indices."""
    states = [0] * lanes
    levels = np.zeros(len(indices), np.int32)
    coded = np.flatnonzero(classes)
    for n, i in enumerate(coded):
        state, k = states[n % lanes], int(indices[i])
        levels[i] = reference.level_of(k, state & 1)
        states[n % lanes] = reference.state_after(state, k)
    return levels


Array = tuple[np.ndarray, np.ndarray, bool]
"""Values, classes, and whether they are levels of dependent symbols."""


def random_arrays(rng: np.random.Generator, sizes: list[int], lanes: int) -> list[Array]:
    """Independent and dependent arrays by turns."""
    arrays = []
    for n, size in enumerate(sizes):
        values, classes = random_symbols(rng, size)
        dependent = n % 2 == 1
        if dependent:
            values = levels_of(values, classes, lanes)
        arrays.append((values, classes, dependent))
    return arrays


def encoded(arrays: list[Array], tables: SymbolTables, lanes: int) -> bytes:
    """The kernel's bytes, which must be the reference's."""
    encoder, plain = kernel.Encoder(tables, lanes), reference.Encoder(tables, lanes)
    for values, classes, dependent in arrays:
        encoder.put(values, classes, dependent=dependent)
        plain.put(values.tolist(), classes.tolist(), dependent)
    data = encoder.finish()
    assert data == plain.finish()
    return data


def check_both_decoders(arrays: list[Array], tables: SymbolTables, lanes: int, data: bytes) -> None:
    plain, fast = reference.Decoder(data, tables, lanes), kernel.Decoder(data, tables, lanes)
    for values, classes, dependent in arrays:
        assert plain.symbols(classes.tolist(), dependent) == values.tolist()
        found = fast.get(classes, dependent=dependent)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, values)
    plain.finish()
    fast.finish()


def kernel_bytes(
    symbols: np.ndarray, classes: np.ndarray, tables: SymbolTables, lanes: int
) -> bytes:
    encoder = kernel.Encoder(tables, lanes)
    half = len(symbols) // 2
    encoder.put(symbols[:half], classes[:half])
    encoder.put(symbols[half:], classes[half:])
    return encoder.finish()


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("count", [0, 1, 7, 3000])
def test_kernel_and_reference_give_the_same_bytes(
    tables: SymbolTables, lanes: int, count: int
) -> None:
    symbols, classes = random_symbols(np.random.default_rng(count + lanes), count)
    data = kernel_bytes(symbols, classes, tables, lanes)
    assert data == reference.encode(symbols.tolist(), classes.tolist(), tables, lanes)
    plain = reference.Decoder(data, tables, lanes)
    assert plain.symbols(classes.tolist()) == symbols.tolist()
    plain.finish()
    fast = kernel.Decoder(data, tables, lanes)
    cut = count // 3
    parts = [fast.get(classes[:cut]), fast.get(classes[cut:])]
    fast.finish()
    np.testing.assert_array_equal(np.concatenate(parts), symbols)


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("sizes", [[0, 1], [3, 5, 1, 2], [7, 0, 40, 33, 1, 600, 90, 1100]])
def test_dependent_arrays_among_independent_ones(
    tables: SymbolTables, lanes: int, sizes: list[int]
) -> None:
    """Lanes go on from array to array, the quantisers' states begin anew."""
    arrays = random_arrays(np.random.default_rng(lanes + len(sizes)), sizes, lanes)
    check_both_decoders(arrays, tables, lanes, encoded(arrays, tables, lanes))


def test_dependent_alone_is_what_encode_gives(tables: SymbolTables) -> None:
    ((levels, classes, dependent),) = random_arrays(np.random.default_rng(3), [0, 500], 4)[1:]
    encoder = kernel.Encoder(tables, 4)
    encoder.put(levels, classes, dependent=dependent)
    plain = reference.encode(levels.tolist(), classes.tolist(), tables, 4, dependent=True)
    assert encoder.finish() == plain


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("size", [2047, 2048, 2049, 4096, 6145])
def test_arrays_around_the_kernels_blocks(tables: SymbolTables, size: int, share: float) -> None:
    """Coded symbols are gathered 2048 positions at a time: many, few and none in a block."""
    rng = np.random.default_rng(size)
    arrays = []
    for values, classes, dependent in random_arrays(rng, [size, size], 4):
        gone = rng.random(size) >= share
        gone[: 2048 if size > 4096 else 0] = True
        few = np.where(gone, 0, classes).astype(np.uint8)
        few[[0, -1]] = 90 if share else 0
        symbols = np.where(few == 0, 0, np.clip(values, -70_000, 70_000))
        arrays.append((levels_of(symbols, few, 4) if dependent else symbols, few, dependent))
    check_both_decoders(arrays, tables, 4, encoded(arrays, tables, 4))


def test_arrays_keep_their_shape(tables: SymbolTables) -> None:
    levels, classes, _ = random_arrays(np.random.default_rng(8), [0, 3 * 40], 4)[1]
    encoder = kernel.Encoder(tables, 4)
    encoder.put(levels.reshape(3, 40), classes.reshape(3, 40), dependent=True)
    found = kernel.Decoder(encoder.finish(), tables, 4).get(classes.reshape(3, 40), dependent=True)
    np.testing.assert_array_equal(found, levels.reshape(3, 40))


@settings(max_examples=60)
@given(
    pairs=st.lists(
        st.tuples(st.integers(1, CLASSES - 1), st.integers(-(2**20), 2**20)), max_size=40
    ),
    lanes=st.sampled_from([1, 4, 16]),
    dependent=st.booleans(),
)
def test_any_symbol_under_any_class(
    tables: SymbolTables, pairs: list[tuple[int, int]], lanes: int, dependent: bool
) -> None:
    classes = np.array([c for c, _ in pairs], np.uint8)
    symbols = np.array([q for _, q in pairs], np.int32)
    if dependent:
        symbols = levels_of(symbols, classes, lanes)
    arrays = [(symbols, classes, dependent)]
    check_both_decoders(arrays, tables, lanes, encoded(arrays, tables, lanes))


@pytest.mark.parametrize("symbol_class", [1, 30, 55, 56, 100, 127])
@pytest.mark.parametrize("peak", [2**20, -(2**20), 2**20 - 1, 1 - 2**20])
def test_levels_up_to_the_peak(tables: SymbolTables, symbol_class: int, peak: int) -> None:
    """Of both quantisers: an odd index leads to quantiser 1 in two steps, 0 in one."""
    indices = np.array([peak, 1, 1, peak, peak, 0, peak, -peak, peak], np.int32)
    classes = np.full(len(indices), symbol_class, np.uint8)
    levels = levels_of(indices, classes, 1)
    assert {int(n) & 1 for n in levels} == {0, 1} and abs(levels).max() >= 2**21 - 3
    arrays = [(levels, classes, True)]
    check_both_decoders(arrays, tables, 1, encoded(arrays, tables, 1))


@pytest.mark.parametrize("beyond", [2**21 + 2, -(2**21) - 2, 2**31 - 2, -(2**31)])
def test_levels_beyond_the_peak_are_not_written(tables: SymbolTables, beyond: int) -> None:
    classes = np.full(1, 60, np.uint8)
    with pytest.raises(ValueError, match="outside"):
        kernel.Encoder(tables, 4).put(np.array([beyond], np.int32), classes, dependent=True)
    with pytest.raises(ValueError, match="range"):
        reference.encode([beyond], [60], tables, 4, dependent=True)


@pytest.mark.parametrize("level", [1, -1, 7])
def test_levels_of_the_other_quantiser_are_not_written(tables: SymbolTables, level: int) -> None:
    """Every lane begins on quantiser 0."""
    classes = np.full(4, 20, np.uint8)
    levels = np.array([0, 0, 2, level], np.int32)
    with pytest.raises(ValueError, match="quantiser"):
        kernel.Encoder(tables, 4).put(levels, classes, dependent=True)
    with pytest.raises(ValueError, match="quantiser"):
        reference.encode(levels.tolist(), classes.tolist(), tables, 4, dependent=True)


def test_a_symbols_steps_share_its_lane(tables: SymbolTables) -> None:
    """An escape of many steps moves no other symbol to another lane."""
    encoder = reference.Encoder(tables, 2)
    encoder.put([2**19, 0, 5, -1], [5, 5, 120, 5])
    lanes = [lane for lane, _ in encoder.steps]
    runs = [lane for n, lane in enumerate(lanes) if n == 0 or lanes[n - 1] != lane]
    assert runs == [0, 1, 0, 1] and len(lanes) > 8


def test_class_zero_costs_nothing(tables: SymbolTables) -> None:
    zeros = np.zeros(10_000, np.int32)
    assert len(kernel_bytes(zeros, zeros.astype(np.uint8), tables, 4)) == 16


@pytest.mark.parametrize("value", [1, 2, -2])
@pytest.mark.parametrize("dependent", [False, True])
def test_class_zero_refuses_a_symbol(tables: SymbolTables, dependent: bool, value: int) -> None:
    encoder = kernel.Encoder(tables, 4)
    with pytest.raises(ValueError, match=r"outside|quantiser"):
        encoder.put(np.full(1, value, np.int32), np.zeros(1, np.uint8), dependent=dependent)
    with pytest.raises(ValueError, match="class 0"):
        reference.encode([value], [0], tables, 4, dependent)


def test_quantiser_1_has_tables_of_its_own(tables: SymbolTables) -> None:
    """Another set for quantiser 1 changes dependent symbols alone."""
    other = [laplace_weights(scale_of(c) * 1.5**u, u) for u in (0, 1) for c in range(1, 56)]
    changed = tables_from_weights(other)
    rng = np.random.default_rng(11)
    plain, dependent = random_arrays(rng, [400, 400], 4)
    assert encoded([plain], tables, 4) == encoded([plain], changed, 4)
    assert encoded([dependent], tables, 4) != encoded([dependent], changed, 4)
    check_both_decoders([dependent], changed, 4, encoded([dependent], changed, 4))


def test_entries_say_what_the_tables_say(tables: SymbolTables) -> None:
    """What the kernel looks up: intervals, levels and their indices' parities."""
    for t, radius in enumerate(tables.radii):
        begin = int(tables.offsets[t])
        edges = tables.cdf[t].astype(int)
        for i in range(2 * int(radius) + 2):
            entry = int(tables.entries[begin + i])
            assert entry & 0x3FFF == edges[i] and entry >> 16 & 0xFFFF == edges[i + 1] - edges[i]
            assert entry >> 15 & 1 == (i == 2 * radius + 1)
            if i <= 2 * radius:
                k = i - int(radius)
                level = (entry >> 48) - (entry >> 63 << 16)
                assert level == reference.level_of(k, int(t >= 55)) and entry >> 14 & 1 == k & 1
        for slot in range(0, TOTAL, 32):
            assert edges[tables.first[t, slot // 32]] <= slot
            assert slot < edges[int(tables.first[t, slot // 32]) + 1]


def test_rate_is_within_one_percent_of_entropy_and_of_constriction(tables: SymbolTables) -> None:
    constriction = pytest.importorskip("constriction")
    rng = np.random.default_rng(5)
    count = 200_000
    classes = rng.integers(1, 56, count).astype(np.uint8)
    symbols = np.empty(count, np.int32)
    ideal = 0.0
    coder = constriction.stream.stack.AnsCoder()
    for c in range(1, 56):
        at = np.flatnonzero(classes == c)
        t, _ = tables.place(c)
        radius = int(tables.radii[t])
        counts = np.diff(tables.cdf[t, : 2 * radius + 3].astype(float))
        p = counts[:-1] / counts[:-1].sum()  # escapes are tested elsewhere
        symbols[at] = rng.choice(2 * radius + 1, len(at), p=p) - radius
        ideal += -np.log2(counts[symbols[at] + radius] / TOTAL).sum()
        model = constriction.stream.model.Categorical(counts / TOTAL, perfect=False)
        coder.encode_reverse((symbols[at] + radius).astype(np.int32), model)
    ours = 8 * len(kernel_bytes(symbols, classes, tables, 4))
    assert ours <= 1.01 * ideal
    assert ours <= 1.01 * coder.num_bits()


def outcomes(data: bytes, arrays: list[Array], tables: SymbolTables, lanes: int) -> list[Any]:
    """What each decoder makes of bytes: all values, or the kind of error."""
    found: list[Any] = []
    for decoder in (kernel.Decoder, reference.Decoder):
        try:
            d = decoder(data, tables, lanes)
            values: list[int] = []
            for _, classes, dependent in arrays:
                if isinstance(d, kernel.Decoder):
                    values += d.get(classes, dependent=dependent).tolist()
                else:
                    values += d.symbols(classes.tolist(), dependent)
            d.finish()
            found.append(values)
        except WsicodecError as error:
            found.append(type(error))
    return found


@pytest.mark.parametrize("sizes", [[300], [0, 300], [60, 120, 50, 70]])
def test_every_truncation_is_named(tables: SymbolTables, sizes: list[int]) -> None:
    arrays = random_arrays(np.random.default_rng(1), sizes, 4)
    data = encoded(arrays, tables, 4)
    for size in range(len(data)):
        fast, plain = outcomes(data[:size], arrays, tables, 4)
        assert fast == plain and fast in (TruncatedError, FormatError)


@pytest.mark.parametrize("lanes", [1, 4, 32])
@pytest.mark.parametrize("sizes", [[120], [0, 120], [40, 60, 20, 30]])
def test_damage_never_crashes_and_both_decoders_agree(
    tables: SymbolTables, sizes: list[int], lanes: int
) -> None:
    rng = np.random.default_rng(2)
    arrays = random_arrays(rng, sizes, lanes)
    data = bytearray(encoded(arrays, tables, lanes))
    for _ in range(150):
        bad = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            bad[rng.integers(len(bad))] = rng.integers(256)
        fast, plain = outcomes(bytes(bad), arrays, tables, lanes)
        assert fast == plain


@pytest.mark.parametrize("dependent", [False, True])
def test_noise_gives_both_decoders_the_same(dependent: bool) -> None:
    """Under tables of many escapes: values of all sizes, and escapes that must be refused."""
    escaping = tables_from_weights(
        [np.array([1.0, 4, 1, 2])] * 15 + [np.array([1.0, 1, 3, 1, 1, 2])] * 15
    )
    rng = np.random.default_rng(4)
    errors = 0
    for _ in range(300):
        classes = rng.integers(0, CLASSES, rng.integers(1, 20)).astype(np.uint8)
        states = rng.integers(2**16, 2**32, 4).astype("<u4").tobytes()
        data = states + rng.bytes(2 * int(rng.integers(4, 60)))
        plain, fast = reference.Decoder(data, escaping, 4), kernel.Decoder(data, escaping, 4)
        try:
            expected = plain.symbols(classes.tolist(), dependent)
        except FormatError as error:
            errors += 1
            with pytest.raises(type(error)):
                fast.get(classes, dependent=dependent)
        else:
            assert fast.get(classes, dependent=dependent).tolist() == expected
    assert 50 < errors < 250


def test_frequencies_sum_and_never_vanish() -> None:
    rng = np.random.default_rng(0)
    for n in (3, 40, 254):
        counts = quantised_frequencies(rng.random(n) ** 8 + 1e-12)
        assert counts.sum() == TOTAL and counts.min() >= 1


@pytest.mark.parametrize("fault", ["start", "end", "zero", "second", "radius", "count", "odd"])
def test_bad_tables_are_refused(tables: SymbolTables, fault: str) -> None:
    radii, cdf = tables.radii.copy(), tables.cdf.copy()
    if fault == "start":
        cdf[3, 0] = 1
    elif fault == "end":
        cdf[3, -1] = TOTAL - 1
    elif fault == "zero":
        cdf[3, 2] = cdf[3, 1]
    elif fault == "second":
        cdf[70, 2] = cdf[70, 1]
    elif fault == "radius":
        radii[3] += 1
    elif fault == "count":
        radii, cdf = radii[-28:], cdf[-28:]
    else:
        radii, cdf = radii[1:], cdf[1:]
    with pytest.raises(ModelError):
        SymbolTables(radii, cdf)


def test_caches_follow_the_sources(tmp_path: Path) -> None:
    """Code compiled from other sources must not be taken from the cache, even when numba's own
    stamp (time and size of one file) is the same."""
    script = (
        "from wsicodec.entropy import kernel, tables; import numpy as np;"
        "t = tables.tables_from_weights([np.ones(4)] * 110); e = kernel.Encoder(t, 4);"
        "c = np.full(500, 50, np.uint8); s = np.arange(-250, 250, dtype=np.int32);"
        "e.put(s, c); d = kernel.Decoder(e.finish(), t, 4); assert (d.get(c) == s).all()"
    )
    root = Path(__file__).parents[1]
    copy = tmp_path / "wsicodec"
    shutil.copytree(root / "wsicodec", copy, ignore=shutil.ignore_patterns("__pycache__", "*.svs"))
    stamps = {}
    for bits in ("4", "2"):
        source = copy / "entropy" / "tables.py"
        text = re.sub(r"COARSE_BITS = \d", f"COARSE_BITS = {bits}", source.read_text())
        source.write_text(text)
        for file in copy.rglob("*.py"):
            os.utime(file, (1_580_601_600, 1_580_601_600))
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
        stamps[bits] = {p.name for p in (copy / "entropy" / "__pycache__").glob("*.nbi")}
    assert stamps["4"] < stamps["2"]


def test_kernels_do_without_linear_algebra() -> None:
    """SciPy's takes as long to import as numba; other compiled code of the process still has it."""
    script = (
        "import sys; import scipy, wsicodec; import numpy as np;"
        "image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8);"
        "wsicodec.decode(wsicodec.encode(image, modes='learned'));"
        "assert 'numba' in sys.modules and 'scipy.linalg' not in sys.modules, 'loaded';"
        "import numba; two = np.eye(2) * 2;"
        "assert (numba.njit(lambda a, b: np.dot(a, b))(two, two) == 2 * two).all();"
        "assert numba.njit(lambda a: np.linalg.det(a))(two) == 4;"
        "import numba.np.linalg, numba.np.arraymath; assert numba.np.arraymath._HAVE_BLAS;"
        "assert numba.np.linalg.ensure_blas.__module__ == 'numba.np.linalg'"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_module_of_compiled_code_is_in_the_fingerprint() -> None:
    """What is not would go on answering from the cache of an older release."""
    from wsicodec.entropy.compiled import _SOURCES

    package = Path(wsicodec.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"^(@compiled|\w+ = intrinsic_of\()", path.read_text("utf-8"), re.MULTILINE)
    }
    assert found and found <= set(_SOURCES)
