"""Speed of the entropy coder alone: million coded symbols a second on one core.

    python benchmarks/entropy_speed.py --json OUT

Two mixes of symbol classes: ``tissue``, as the shipped model picks them for a real tile at the
default quality (class 0 left out: it costs no time), and ``even``, every table alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import numba
import numpy as np

from wsicodec.entropy.kernel import Decoder, Encoder
from wsicodec.entropy.tables import SymbolTables
from wsicodec.entropy.trellis import NEXT_STATE
from wsicodec.models.store import decoder_of_prefix, find_model


def draw(
    classes: np.ndarray, tables: SymbolTables, rng: np.random.Generator, lanes: int
) -> np.ndarray:
    """Levels whose indices are as their tables have them, escapes left out."""
    indices = np.zeros((2, len(classes)), np.int64)
    for c in np.unique(classes):
        first, raw = tables.place(int(c))
        at = np.flatnonzero(classes == c)
        for quantiser in (0, 1):
            t = first + quantiser * (len(tables.radii) // 2)
            radius = int(tables.radii[t])
            p = np.diff(tables.cdf[t, : 2 * radius + 3].astype(float))[:-1]
            top = rng.choice(2 * radius + 1, len(at), p=p / p.sum()) - radius
            low = rng.integers(0, 1 << raw, len(at)) - (1 << raw >> 1)
            indices[quantiser, at] = (top << raw) + low
    levels = np.empty(len(classes), np.int32)
    states = [0] * lanes
    for i, (even, odd) in enumerate(indices.T.tolist()):
        state = states[i % lanes]
        k = odd if state & 1 else even
        levels[i] = 2 * k - (state & 1) * ((k > 0) - (k < 0))
        states[i % lanes] = NEXT_STATE[state][k & 1]
    return levels


def tissue_classes(count: int, rng: np.random.Generator) -> np.ndarray:
    """Classes of coded symbols of a textured tile at the default quality."""
    from wsicodec.codec.cell import CellShape
    from wsicodec.codec.network import quantise_cell, usual_search
    from wsicodec.models.store import encoder_of

    decoder, encoder = encoder_of(find_model("he-fast"))
    coarse = rng.normal(0, 40, (32, 32, 3)).repeat(8, 0).repeat(8, 1)
    image = np.clip(170 + coarse + rng.normal(0, 6, (256, 256, 3)), 0, 255).astype(np.uint8)
    search = usual_search(encoder)
    gain = int(encoder.quality_gain[69])
    stages = len(decoder.architecture.stages) - 1
    coded = quantise_cell(image, CellShape(256, 256), decoder, encoder, gain, stages, search)
    classes = np.concatenate([c.reshape(-1) for _, c in coded[1:]])
    return np.resize(classes[classes > 0], count)


def measure(classes: np.ndarray, tables: SymbolTables, lanes: int, passes: int) -> dict[str, float]:
    symbols = draw(classes, tables, np.random.default_rng(0), lanes)
    decode, encode = [], []
    for _ in range(passes + 1):
        start = time.perf_counter()
        encoder = Encoder(tables, lanes)
        encoder.put(symbols, classes, dependent=True)
        data = encoder.finish()
        middle = time.perf_counter()
        got = Decoder(data, tables, lanes).get(classes, dependent=True)
        end = time.perf_counter()
        encode.append(len(classes) / (middle - start) / 1e6)
        decode.append(len(classes) / (end - middle) / 1e6)
        if (got != symbols).any():
            raise SystemExit("decoded symbols differ")
    return {
        "bits_per_symbol": round(8 * len(data) / len(classes), 3),
        "decode": round(statistics.median(decode[1:]), 1),
        "encode": round(statistics.median(encode[1:]), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--symbols", type=int, default=2_000_000)
    parser.add_argument("--passes", type=int, default=9)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rng = np.random.default_rng(1)
    tables = decoder_of_prefix(bytes.fromhex(find_model("he-fast").digest[:8])).tables
    mixes = {
        "tissue": tissue_classes(arguments.symbols, rng),
        "even": rng.integers(1, len(tables.radii) // 2 + 1, arguments.symbols).astype(np.uint8),
    }
    result = {
        "million_symbols_per_second": {
            f"{name}, {lanes} lanes": measure(classes, tables, lanes, arguments.passes)
            for name, classes in mixes.items()
            for lanes in (1, 4, 8)
        },
        "machine": platform.processor() or platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "numba": numba.__version__,
            "numpy": np.__version__,
        },
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
