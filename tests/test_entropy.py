"""The compiled entropy coder against its plain-Python specification, constriction and theory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def laplace_weights(scale: float) -> np.ndarray:
    radius = int(np.clip(np.ceil(5 * scale), 1, 64))
    values = np.arange(-radius, radius + 1)
    weights = np.exp(-np.abs(values) * np.sqrt(2) / scale)
    return np.append(weights, max(1e-6, weights[-1]))


@pytest.fixture(scope="module")
def tables() -> SymbolTables:
    return tables_from_weights([laplace_weights(scale_of(c)) for c in range(1, 56)])


def random_symbols(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    classes = rng.integers(0, CLASSES, count).astype(np.uint8)
    scales = np.array([0.0] + [scale_of(c) for c in range(1, CLASSES)])[classes]
    symbols = np.round(rng.laplace(0, scales / np.sqrt(2) + 1e-12)).astype(np.int32)
    symbols[classes == 0] = 0
    return symbols, classes


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


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(st.integers(1, CLASSES - 1), st.integers(-(2**20), 2**20)), max_size=40
    ),
    lanes=st.sampled_from([1, 4, 16]),
)
def test_any_symbol_under_any_class(
    tables: SymbolTables, pairs: list[tuple[int, int]], lanes: int
) -> None:
    classes = np.array([c for c, _ in pairs], np.uint8)
    symbols = np.array([q for _, q in pairs], np.int32)
    data = kernel_bytes(symbols, classes, tables, lanes)
    assert data == reference.encode(symbols.tolist(), classes.tolist(), tables, lanes)
    decoder = kernel.Decoder(data, tables, lanes)
    np.testing.assert_array_equal(decoder.get(classes), symbols)
    decoder.finish()


def test_class_zero_costs_nothing(tables: SymbolTables) -> None:
    zeros = np.zeros(10_000, np.int32)
    assert len(kernel_bytes(zeros, zeros.astype(np.uint8), tables, 4)) == 16


def test_class_zero_refuses_a_symbol(tables: SymbolTables) -> None:
    encoder = kernel.Encoder(tables, 4)
    with pytest.raises(ValueError, match="outside"):
        encoder.put(np.ones(1, np.int32), np.zeros(1, np.uint8))


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


def test_every_truncation_is_named(tables: SymbolTables) -> None:
    symbols, classes = random_symbols(np.random.default_rng(1), 300)
    data = kernel_bytes(symbols, classes, tables, 4)
    for size in range(len(data)):
        for decoder in (kernel.Decoder, reference.Decoder):
            with pytest.raises((TruncatedError, FormatError)):
                d = decoder(data[:size], tables, 4)
                d.get(classes) if isinstance(d, kernel.Decoder) else d.symbols(classes.tolist())
                d.finish()


def test_damage_never_crashes_and_both_decoders_agree(tables: SymbolTables) -> None:
    rng = np.random.default_rng(2)
    symbols, classes = random_symbols(rng, 120)
    data = bytearray(kernel_bytes(symbols, classes, tables, 4))
    for _ in range(300):
        bad = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            bad[rng.integers(len(bad))] = rng.integers(256)
        outcomes = []
        for decoder in (kernel.Decoder, reference.Decoder):
            try:
                d = decoder(bytes(bad), tables, 4)
                got = (
                    d.get(classes).tolist()
                    if isinstance(d, kernel.Decoder)
                    else d.symbols(classes.tolist())
                )
                d.finish()
                outcomes.append(got)
            except WsicodecError as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1]


def test_frequencies_sum_and_never_vanish() -> None:
    rng = np.random.default_rng(0)
    for n in (3, 40, 254):
        counts = quantised_frequencies(rng.random(n) ** 8 + 1e-12)
        assert counts.sum() == TOTAL and counts.min() >= 1


@pytest.mark.parametrize("fault", ["start", "end", "zero", "radius", "count"])
def test_bad_tables_are_refused(tables: SymbolTables, fault: str) -> None:
    radii, cdf = tables.radii.copy(), tables.cdf.copy()
    if fault == "start":
        cdf[3, 0] = 1
    elif fault == "end":
        cdf[3, -1] = TOTAL - 1
    elif fault == "zero":
        cdf[3, 2] = cdf[3, 1]
    elif fault == "radius":
        radii[3] += 1
    else:
        radii, cdf = radii[:4], cdf[:4]
    with pytest.raises(ModelError):
        SymbolTables(radii, cdf)


def test_caches_follow_the_sources(tmp_path: Path) -> None:
    """Code compiled from other sources must not be taken from the cache, even when numba's own
    stamp (time and size of one file) is the same."""
    script = (
        "from wsicodec.entropy import kernel, tables; import numpy as np;"
        "t = tables.tables_from_weights([np.ones(4)] * 55); e = kernel.Encoder(t, 4);"
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
