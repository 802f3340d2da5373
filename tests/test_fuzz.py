"""Mutated tiles: whatever the bytes, ``decode`` gives an image of the size they say or one named
error, in bounded memory and time. Mutations are seeded, so a failure names what repeats it.
"""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import wsicodec
from wsicodec.bitstream import LearnedHeader, Mode, Tile
from wsicodec.entropy import kernel, reference
from wsicodec.entropy.tables import SymbolTables, tables_from_weights
from wsicodec.errors import FormatError, WsicodecError

FOLDER = Path(__file__).parent / "conformance"
MEMORY = 64 * 2**20  # beyond the output, docs/format.md, "Limits"
SECONDS = 20.0  # of one decode, on a busy machine

INTERESTING = (0, 1, 2, 3, 15, 16, 17, 127, 128, 254, 255)


def seeds() -> list[bytes]:
    """Valid tiles of all modes, and every tile that must be refused."""
    paths = [*sorted(FOLDER.glob("decode/*.tile")), *sorted(FOLDER.glob("refuse/*.tile"))]
    assert len(paths) > 80
    return [path.read_bytes() for path in paths]


def repaired(data: bytes) -> bytes:
    """Length and checksum made to fit, so that the damage reaches what lies behind them."""
    if len(data) < 18:
        return data
    head = data[:10] + struct.pack("<I", len(data) - 18)
    return head + struct.pack("<I", zlib.crc32(data[18:], zlib.crc32(head))) + data[18:]


def mutated(rng: np.random.Generator, tiles: list[bytes]) -> bytes:
    data = bytearray(tiles[rng.integers(len(tiles))])
    for _ in range(int(rng.choice([1, 1, 2, 3, 8]))):
        size = len(data)
        # the header and what follows it decide most; half of all damage goes there
        at = int(rng.integers(1 + (min(size, 48) if rng.random() < 0.5 else size)))
        kind = rng.integers(8)
        if at == size or kind == 0:
            data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 1:
            data[at] ^= 1 << rng.integers(8)
        elif kind == 2:
            data[at] = rng.integers(256)
        elif kind == 3:
            data[at] = rng.choice(INTERESTING)
        elif kind == 4:
            del data[at : at + int(rng.integers(1, 9))]
        elif kind == 5:
            del data[at:]
        elif kind == 6:
            end = at + int(rng.integers(1, 17))
            data[at:end] = data[at:end] * 2
        else:
            other = tiles[rng.integers(len(tiles))]
            data[at:] = other[at:]
    return bytes(data)


def outcome(data: bytes) -> str:
    """Name of the error, or "image"; anything that is neither fails the test."""
    height, width = struct.unpack("<HH", data[6:10]) if len(data) >= 10 else (0, 0)
    promised = 3 * height * width if height <= 4096 and width <= 4096 else 0
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    start = time.monotonic()
    try:
        image = wsicodec.decode(data)
    except WsicodecError as error:
        assert str(error)
        result = type(error).__name__
    else:
        if data[:4] == b"WSC\x1a":
            assert image.shape == (height, width, 3)
        assert image.dtype == np.uint8
        promised = image.nbytes
        result = "image"
        del image
    assert time.monotonic() - start < SECONDS
    _, peak = tracemalloc.get_traced_memory()
    assert peak - before < promised + MEMORY
    return result


def run(count: int, seed: int) -> Counter[str]:
    tiles = seeds()
    rng = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    tracemalloc.start()
    try:
        for i in range(count):
            data = mutated(rng, tiles)
            if i % 4:
                data = repaired(data)
            try:
                counts[outcome(data)] += 1
            except BaseException:
                print(f"mutation {i} of seed {seed}: {data.hex()}")
                raise
    finally:
        tracemalloc.stop()
    return counts


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_tiles(seed: int) -> None:
    counts = run(1000, seed)
    # the fuzzer reaches the depths: each of these comes only after deeper checks
    assert counts["image"] and counts["FormatError"] and counts["TruncatedError"]
    assert counts["UnknownModelError"] and counts["ChecksumError"] and counts["LimitError"]


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("seed", range(100, 110))
def test_mutated_tiles_soak(seed: int) -> None:
    """100,000 mutations in all."""
    run(10_000, seed)


def hostile(digest: bytes) -> Iterator[tuple[str, bytes]]:
    """Small tiles that promise the largest image."""
    for mode in (Mode.JPEGXL, Mode.JPEG, Mode.JPEG2000, Mode.LOSSLESS, Mode.TRANSCODED):
        name = "lossless" if mode is Mode.LOSSLESS else mode.name.lower()
        payload = (FOLDER / "decode" / f"{name}-17x31.tile").read_bytes()[18:]
        yield f"{name} of another size", Tile(mode, 4096, 4096, payload).pack()
    jpeg = bytearray((FOLDER / "decode" / "jpeg-17x31.tile").read_bytes()[18:])
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = struct.pack(">HH", 4096, 4096)
    yield "jpeg that says 4096 x 4096", Tile(Mode.JPEG, 4096, 4096, bytes(jpeg)).pack()
    j2k = bytearray((FOLDER / "decode" / "jpeg2000-17x31.tile").read_bytes()[18:])
    j2k[8:16] = struct.pack(">II", 4096, 4096)
    yield "jpeg2000 that says 4096 x 4096", Tile(Mode.JPEG2000, 4096, 4096, bytes(j2k)).pack()
    j2k[24:32] = struct.pack(">II", 1, 1)
    yield "jpeg2000 of tiles of one pixel", Tile(Mode.JPEG2000, 4096, 4096, bytes(j2k)).pack()
    for stages in (1, 4, 8, 15):
        for gain in (0, 128, 255):
            header = LearnedHeader(digest[:4], gain, stages, 0)
            for stream in (b"\0\0\1\0", b"\xff" * 4, b"\x9c\x27\x11\x5a" * 5000):
                for turns in (0, 3, 3 * 63, 3 * 64):  # bytes; the tile has 64 cells
                    payload = b"\x81" * turns + stream
                    tile = Tile(Mode.LEARNED, 4096, 4096, payload, header)
                    yield f"learned {gain} {stages} {turns} {stream[:4].hex()}", tile.pack()


CHILD = """
import json, resource, sys, time
import wsicodec
from wsicodec.models.store import allow_model
tiles = json.load(sys.stdin)
allow_model(open(sys.argv[1], "rb").read())
for tile in tiles["warm"]:
    wsicodec.decode(bytes.fromhex(tile))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
result = {"before": peak()}
for name, tile in tiles["hostile"]:
    start = time.monotonic()
    try:
        wsicodec.decode(bytes.fromhex(tile))
        outcome = "image"
    except wsicodec.WsicodecError as error:
        outcome = type(error).__name__
    result[name] = [outcome, time.monotonic() - start, peak()]
print(json.dumps(result))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in other units")
def test_large_tiles_stay_within_the_documents_memory(
    tiny_file: bytes, tiny_installed: str, tissue: Callable[..., np.ndarray]
) -> None:
    """Resident memory of a whole process, libraries included, which tracemalloc does not see.

    Small tiles that promise 4096 x 4096 pixels, and one that holds them.
    """
    tiles = list(hostile(hashlib.sha256(tiny_file).digest()))
    picture = np.tile(tissue(256, 256), (16, 16, 1))
    tiles.append(("valid", wsicodec.encode(picture, model=tiny_installed, quality=30)))
    warm = [p.read_bytes().hex() for p in sorted(FOLDER.glob("decode/*.tile"))]
    given = json.dumps({"warm": warm, "hostile": [(name, data.hex()) for name, data in tiles]})
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(FOLDER / "tiny.wscm")],
        input=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    result = json.loads(child.stdout)
    before = result.pop("before")
    for name, (outcome_name, seconds, peak) in result.items():
        # libjpeg fills up what a scan leaves out
        image = name in ("valid", "jpeg that says 4096 x 4096")
        assert outcome_name == "image" if image else outcome_name.endswith("Error"), name
        assert seconds < SECONDS, name
        assert peak - before < 3 * 4096 * 4096 + MEMORY, f"{name}: {(peak - before) >> 20} MiB"


def small_tables() -> SymbolTables:
    """15 tables for either quantiser, so that class 127 has 14 raw bits."""
    return tables_from_weights([np.array([1.0, 6, 1, 1])] * 30)


@pytest.mark.parametrize("dependent", [False, True])
def test_symbols_that_wrap_32_bits_are_refused(dependent: bool) -> None:
    """Once a symbol of 2^35 under 14 raw bits passed for another: 32-bit arithmetic cut it."""
    tables = small_tables()
    raw_bits, n = 14, 19
    assert tables.place(127) == (14, raw_bits)
    cdf = tables.cdf[14].tolist()
    steps = [(cdf[3], cdf[4] - cdf[3])]
    steps += reference.raw_steps(n, 5) + reference.raw_steps(0, n) + reference.raw_steps(0, 1)
    steps += reference.raw_steps(0, raw_bits)  # (1 + 2^19) 2^14 - 2^13
    states = [2**16]
    words: list[int] = []
    for start, frequency in reversed(steps):
        x = states[0]
        if x >= frequency << 18:
            words.insert(0, x & 0xFFFF)
            x >>= 16
        states[0] = (x // frequency << 14) + x % frequency + start
    data = struct.pack(f"<I{len(words)}H", states[0], *words)
    with pytest.raises(FormatError, match="range"):
        reference.Decoder(data, tables, 1).symbols([127], dependent)
    with pytest.raises(FormatError, match="range"):
        kernel.Decoder(data, tables, 1).get(np.array([127], np.uint8), dependent=dependent)


@pytest.mark.parametrize("symbol", [2**20 + 1, -(2**20) - 1, 2**31 - 1, -(2**31)])
def test_symbols_beyond_the_format_are_not_written(symbol: int) -> None:
    tables = small_tables()
    for symbol_class in (1, 15, 127):
        with pytest.raises(ValueError, match=r"range|outside"):
            reference.encode([symbol], [symbol_class], tables, 1)
        encoder = kernel.Encoder(tables, 1)
        with pytest.raises(ValueError, match="outside"):
            encoder.put(np.array([symbol], np.int32), np.array([symbol_class], np.uint8))


@pytest.mark.parametrize("level", [2**21 + 1, 2**21 + 2, -(2**21) - 1, 2**31 - 1, -(2**31)])
def test_levels_beyond_the_format_are_not_written(level: int) -> None:
    """On either quantiser: two symbols lead to quantiser 1, or none."""
    tables = small_tables()
    levels = np.array([2, 4, level] if level % 2 else [level], np.int32)
    for symbol_class in (1, 15, 127):
        classes = np.full(len(levels), symbol_class, np.uint8)
        with pytest.raises(ValueError, match=r"range|outside"):
            reference.encode(levels.tolist(), classes.tolist(), tables, 1, dependent=True)
        with pytest.raises(ValueError, match="outside"):
            kernel.Encoder(tables, 1).put(levels, classes, dependent=True)
