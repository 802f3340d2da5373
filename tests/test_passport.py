"""The quality passport and the record: what is written is read, what is hostile is refused."""

from __future__ import annotations

import contextlib
import json
import math
import struct
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from slides import CMU

from wsicodec.bitstream import Mode
from wsicodec.errors import (
    ChecksumError,
    FormatError,
    LimitError,
    SlideError,
    TruncatedError,
    UnsupportedError,
    WsicodecError,
)
from wsicodec.metrics import TileQuality, summarise
from wsicodec.slide.passport import (
    FIELDS,
    MAX_LEVELS,
    MAX_MASK_BYTES,
    MAX_PACKED,
    MAX_TILES,
    PLAIN_STREAM,
    TAG_PASSPORT,
    LevelMap,
    Passport,
    mode_counts,
    mode_name,
    parse_passport,
    read_passport,
    summarise_level,
)
from wsicodec.slide.record import (
    FileRecord,
    FloorRecord,
    GlassRecord,
    LevelQuality,
    ModelId,
    SourceIdentity,
    parse_record,
)
from wsicodec.tissue.mask import TissueMask

MODES = [*map(int, Mode), PLAIN_STREAM]
_HEAD = struct.Struct("<4sB3xII")


def level_map(rows: int, columns: int, **changes: Any) -> LevelMap:
    """A level that looks like one; ``changes`` replace arrays."""
    rng = np.random.default_rng(rows * 1000 + columns)
    arrays: dict[str, Any] = {
        "bytes": rng.integers(1, 30000, (rows, columns), np.uint32),
        "psnr": rng.uniform(28, 45, (rows, columns)).astype(np.float32),
        "ssim": rng.uniform(0.9, 1, (rows, columns)).astype(np.float32),
        "quality": np.full((rows, columns), 70, np.uint8),
        "mode": np.full((rows, columns), Mode.LEARNED, np.uint8),
    }
    return LevelMap(rows, columns, **{**arrays, **changes})


def mask(rows: int = 7, columns: int = 9) -> TissueMask:
    tissue = np.random.default_rng(0).random((rows, columns)) < 0.5
    return TissueMask(tissue, 32, "otsu", (241, 238, 240))


@st.composite
def level_maps(draw: st.DrawFn) -> LevelMap:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    shape = (rows, columns)
    psnr = st.floats(0, width=32) | st.just(math.nan) | st.just(math.inf)
    ssim = st.floats(-1, 1, width=32) | st.just(math.nan)
    return LevelMap(
        rows,
        columns,
        bytes=draw(hnp.arrays(np.uint32, shape)),
        psnr=draw(hnp.arrays(np.float32, shape, elements=psnr)),
        ssim=draw(hnp.arrays(np.float32, shape, elements=ssim)),
        quality=draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 100))),
        mode=draw(hnp.arrays(np.uint8, shape, elements=st.sampled_from(MODES))),
    )


masks = st.none() | st.builds(
    TissueMask,
    hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)),
    st.sampled_from([1, 16, 64]),
    st.sampled_from(["otsu", "network"]),
    st.tuples(*[st.integers(0, 255)] * 3),
)
passports = st.builds(Passport, st.lists(level_maps(), min_size=1, max_size=4).map(tuple), masks)


def equal(a: Passport, b: Passport) -> bool:
    same_maps = len(a.levels) == len(b.levels) and all(
        getattr(one, name).tobytes() == getattr(other, name).tobytes()
        and (one.rows, one.columns) == (other.rows, other.columns)
        for one, other in zip(a.levels, b.levels, strict=True)
        for name, _ in FIELDS
    )
    packs = [None if p.mask is None else p.mask.pack() for p in (a, b)]
    return same_maps and packs[0] == packs[1]


class TestRoundTrip:
    @given(passports)
    def test_every_bit(self, passport: Passport) -> None:
        assert equal(parse_passport(passport.pack()), passport)

    def test_from_views_and_foreign_byte_order(self) -> None:
        """Arrays of the caller may be strided; the file's order does not depend on them."""
        whole = level_map(6, 8)
        part = LevelMap(3, 4, **{name: getattr(whole, name)[::2, ::2] for name, _ in FIELDS})
        copied = LevelMap(3, 4, **{name: getattr(part, name).copy() for name, _ in FIELDS})
        assert Passport((part,)).pack() == Passport((copied,)).pack()
        swapped = whole.bytes.astype(">u4")
        with pytest.raises(FormatError, match="bytes is"):
            level_map(6, 8, bytes=swapped)

    def test_layout_by_hand(self) -> None:
        """The bytes as docs/format.md says them, read without the parser."""
        level = level_map(2, 3)
        data = Passport((level,), mask()).pack()
        magic, version, length, crc = _HEAD.unpack_from(data)
        assert (magic, version, crc) == (b"WSCP", 1, zlib.crc32(data[16:]))
        header = json.loads(data[16 : 16 + length])
        assert header["levels"] == [{"rows": 2, "columns": 3}]
        body = zlib.decompress(data[16 + length :])
        lows, mids, highs, tops = (body[n * 6 : n * 6 + 6] for n in range(4))
        numbers = [
            a | b << 8 | c << 16 | d << 24
            for a, b, c, d in zip(lows, mids, highs, tops, strict=True)
        ]
        assert numbers == level.bytes.ravel().tolist()
        assert body[6 * 14 :] == mask().pack()
        assert len(body) == 6 * 14 + header["mask_bytes"]

    def test_size_of_a_large_slide(self) -> None:
        """100 000 x 100 000 px: a passport of 10 bytes a tile or less, in bounded memory."""
        rows = columns = 391
        data = Passport((level_map(rows, columns),)).pack()
        assert len(data) < 10 * rows * columns
        tracemalloc.start()
        parse_passport(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100 * rows * columns


class TestRefusal:
    @pytest.mark.parametrize(
        "changes",
        [
            {"bytes": np.ones((2, 2), np.uint32)},
            {"psnr": np.ones((2, 3), np.float64)},
            {"psnr": np.full((2, 3), -1, np.float32)},
            {"psnr": np.full((2, 3), -np.inf, np.float32)},
            {"ssim": np.full((2, 3), 1.1, np.float32)},
            {"ssim": np.full((2, 3), np.inf, np.float32)},
            {"quality": np.full((2, 3), 101, np.uint8)},
            {"mode": np.full((2, 3), 200, np.uint8)},
        ],
        ids="-".join,
    )
    def test_values(self, changes: dict[str, Any]) -> None:
        with pytest.raises(FormatError):
            level_map(2, 3, **changes)

    def test_hostile_values_in_bytes(self) -> None:
        """What the constructor refuses, the parser refuses too."""
        body = np.full(14, 0xFF, np.uint8).tobytes()  # NaNs, quality 255
        with pytest.raises(FormatError, match="quality of 255"):
            parse_passport(
                forged({"levels": [{"rows": 1, "columns": 1}], "mask_bytes": None}, body)
            )

    @pytest.mark.parametrize(
        ("header", "error"),
        [
            ({"levels": [{"rows": 1, "columns": 2**40}], "mask_bytes": None}, LimitError),
            ({"levels": [{"rows": 2**12, "columns": 2**12 + 1}], "mask_bytes": None}, LimitError),
            (
                {"levels": [{"rows": 2**12, "columns": 2**11}] * 3, "mask_bytes": None},
                LimitError,
            ),
            ({"levels": [{"rows": 1, "columns": 1}] * 33, "mask_bytes": None}, LimitError),
            ({"levels": [{"rows": 1, "columns": 1}], "mask_bytes": 2**26}, LimitError),
            ({"levels": [], "mask_bytes": None}, LimitError),
            ({"levels": [{"rows": 0, "columns": 1}], "mask_bytes": None}, FormatError),
            ({"levels": [{"rows": -1, "columns": -1}], "mask_bytes": None}, FormatError),
            ({"levels": [{"rows": True, "columns": 1}], "mask_bytes": None}, FormatError),
            ({"levels": [{"rows": 1.0, "columns": 1}], "mask_bytes": None}, FormatError),
            ({"levels": [{"rows": "1", "columns": 1}], "mask_bytes": None}, FormatError),
            ({"levels": [{"rows": 1}], "mask_bytes": None}, FormatError),
            ({"levels": 1, "mask_bytes": None}, FormatError),
            ({"levels": [[1, 1]], "mask_bytes": None}, FormatError),
            ({"levels": [{"rows": 1, "columns": 1}]}, FormatError),
            ([], FormatError),
            (None, FormatError),
        ],
        ids=str,
    )
    def test_headers(self, header: Any, error: type[WsicodecError]) -> None:
        tracemalloc.start()
        with pytest.raises(error):
            parse_passport(forged(header, bytes(14)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20, "allocated before the sizes were checked"

    @pytest.mark.parametrize("text", [b"", b"{", b"[" * 60000, b"\xff", b"1" * 5000])
    def test_header_that_is_no_json(self, text: bytes) -> None:
        packed = text + zlib.compress(b"")
        with pytest.raises(FormatError):
            parse_passport(_HEAD.pack(b"WSCP", 1, len(text), zlib.crc32(packed)) + packed)

    def test_bomb(self) -> None:
        """A quarter of a megabyte that inflates to 256: no more of it is inflated than promised."""
        one = {"levels": [{"rows": 1, "columns": 1}], "mask_bytes": None}
        packer = zlib.compressobj(9)
        bomb = b"".join(packer.compress(bytes(2**22)) for _ in range(64)) + packer.flush()
        data = with_stream(one, bomb)
        tracemalloc.start()
        with pytest.raises(FormatError, match="holds more"):
            parse_passport(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * len(data)

    def test_promise_without_content(self) -> None:
        """The most tiles that a header may promise, and nothing behind it."""
        header = {"levels": [{"rows": 2**12, "columns": 2**12}], "mask_bytes": None}
        tracemalloc.start()
        with pytest.raises(TruncatedError):
            parse_passport(forged(header, bytes(100)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20

    def test_streams(self) -> None:
        header = {"levels": [{"rows": 1, "columns": 1}], "mask_bytes": None}
        stream = zlib.compress(bytes(14))
        parse_passport(with_stream(header, stream))
        for wrong in (
            stream + b"\0",
            stream[:-1],
            stream[:-4] + b"\0\0\0\0",
            zlib.compress(bytes(13)),
            zlib.compress(bytes(15)),
            b"",
            b"no zlib stream",
        ):
            with pytest.raises(FormatError):
                parse_passport(with_stream(header, wrong))

    def test_damaged_mask(self) -> None:
        header = {"levels": [{"rows": 1, "columns": 1}], "mask_bytes": 20}
        with pytest.raises(FormatError):
            parse_passport(forged(header, bytes(14) + b"WTM\1" + bytes(16)))

    def test_head(self) -> None:
        data = Passport((level_map(1, 1),)).pack()
        with pytest.raises(FormatError, match="not a wsicodec passport"):
            parse_passport(b"WSCM" + data[4:])
        with pytest.raises(UnsupportedError, match="version 2"):
            parse_passport(data[:4] + b"\2" + data[5:])
        with pytest.raises(FormatError, match="reserved"):
            parse_passport(data[:6] + b"\1" + data[7:])
        with pytest.raises(ChecksumError):
            parse_passport(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(LimitError):
            parse_passport(data[:8] + struct.pack("<I", 2**31) + data[12:])
        with pytest.raises(LimitError):
            parse_passport(bytes(MAX_PACKED + 1))
        for end in range(len(data)):
            with pytest.raises(FormatError):
                parse_passport(data[:end])

    @given(passports, st.data())
    def test_mutations(self, passport: Passport, draw: st.DataObject) -> None:
        """One named error, or a passport, whatever the bytes: with and without a good checksum."""
        data = bytearray(passport.pack())
        for _ in range(draw.draw(st.integers(1, 4))):
            at = draw.draw(st.integers(0, len(data) - 1))
            if draw.draw(st.booleans()):
                data[at] = draw.draw(st.integers(0, 255))
            else:
                data[at : at + draw.draw(st.integers(0, 8))] = draw.draw(st.binary(max_size=8))
            data = data or bytearray(1)
        if draw.draw(st.booleans()):
            data[12:16] = struct.pack("<I", zlib.crc32(data[16:]))
        started = time.perf_counter()
        with contextlib.suppress(FormatError, LimitError, UnsupportedError):
            parse_passport(bytes(data))
        assert time.perf_counter() - started < 10

    def test_more_than_the_format_holds(self) -> None:
        with pytest.raises(LimitError):
            Passport(()).pack()
        with pytest.raises(LimitError):
            Passport((level_map(1, 1),) * (MAX_LEVELS + 1)).pack()
        big = level_map(1, 1)
        object.__setattr__(big, "rows", MAX_TILES)
        with pytest.raises(LimitError):
            Passport((big, level_map(1, 1))).pack()

        class Bulky:
            def pack(self) -> bytes:
                return bytes(MAX_MASK_BYTES + 1)

        with pytest.raises(LimitError, match="tissue mask"):
            Passport((level_map(1, 1),), Bulky()).pack()  # type: ignore[arg-type]

    def test_grids_of_another_file(self) -> None:
        passport = Passport((level_map(2, 3), level_map(1, 2)))
        passport.check_grids([(2, 3), (1, 2)])
        for other in ([(2, 3)], [(3, 2), (1, 2)], [(2, 3), (1, 2), (1, 1)]):
            with pytest.raises(FormatError, match="2 x 3, 1 x 2 tiles"):
                passport.check_grids(other)


class TestFile:
    def write(self, path: Path, value: bytes) -> Path:
        tag = (TAG_PASSPORT, 7, len(value), value, True)
        image = np.zeros((16, 16, 3), np.uint8)
        tifffile.imwrite(path, image, photometric="rgb", extratags=[tag], metadata=None)
        return path

    def test_reads_its_tag(self, tmp_path: Path) -> None:
        passport = Passport((level_map(40, 30), level_map(20, 15)), mask())
        read = read_passport(self.write(tmp_path / "a.tif", passport.pack()))
        assert read is not None
        assert equal(read, passport)

    def test_without(self) -> None:
        assert read_passport(CMU) is None

    def test_names_the_file(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.tif", b"WSCQ" + bytes(100))
        with pytest.raises(FormatError, match=r"a\.tif: not a wsicodec passport"):
            read_passport(path)
        (tmp_path / "b.tif").write_bytes(b"II*\0 no TIFF")
        with pytest.raises(SlideError, match=r"b\.tif"):
            read_passport(tmp_path / "b.tif")
        with pytest.raises(SlideError, match=r"c\.tif"):
            read_passport(tmp_path / "c.tif")

    def test_tag_of_another_type(self, tmp_path: Path) -> None:
        tag = (TAG_PASSPORT, 4, 1, 5, True)
        image = np.zeros((16, 16, 3), np.uint8)
        tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", extratags=[tag])
        with pytest.raises(FormatError, match="does not hold bytes"):
            read_passport(tmp_path / "a.tif")


class TestSummary:
    def test_as_metrics_have_it(self) -> None:
        """The same figures as ``metrics.summarise``, which converts use for their reports."""
        level = level_map(6, 7)
        level.psnr[2, 3] = np.inf
        level.psnr[0, 1] = level.ssim[0, 1] = np.nan
        tiles = [
            TileQuality(
                0, row, column, float(level.psnr[row, column]), float(level.ssim[row, column])
            )
            for row in range(6)
            for column in range(7)
            if (row, column) != (0, 1)
        ]
        expected = summarise(tiles)
        summary = summarise_level(level)
        assert expected is not None and summary is not None
        assert (summary.tiles, summary.measured, summary.below_floor) == (42, 41, 0)
        for name in ("psnr_mean", "psnr_p01", "ssim_mean", "ssim_p01"):
            assert getattr(summary, name) == pytest.approx(getattr(expected, name), rel=1e-12)
        assert summary.psnr_worst == expected.psnr_worst.psnr
        assert summary.ssim_worst_at == (expected.ssim_worst.y, expected.ssim_worst.x)
        assert summary.psnr_worst_at == (expected.psnr_worst.y, expected.psnr_worst.x)

    def test_nothing_measured(self) -> None:
        nothing = np.full((2, 2), np.nan, np.float32)
        assert summarise_level(level_map(2, 2, psnr=nothing, ssim=nothing)) is None

    def test_floor(self) -> None:
        level = level_map(1, 4, ssim=np.array([[0.94, 0.95, np.nan, 1]], np.float32))
        level.psnr[:] = [[40, 29, 10, np.inf]]
        below = level.below(FloorRecord(ssim=0.95))
        assert below.tolist() == [[True, False, False, False]]
        # a tile that was not measured has no SSIM; its PSNR still counts where it is known
        assert level.below(FloorRecord(psnr=30.0)).tolist() == [[False, True, True, False]]
        assert not level.below(FloorRecord()).any()
        assert not level.below(None).any()
        summary = summarise_level(level, FloorRecord(0.95, 30.0))
        assert summary is not None
        assert summary.below_floor == 3

    def test_modes(self) -> None:
        mode = np.array([[1, 1, 255, 0]], np.uint8)
        level = level_map(1, 4, mode=mode, bytes=np.array([[5, 5, 5, 0]], np.uint32))
        assert mode_counts([level, level]) == {"learned": 4, "plain": 2, "shared glass": 2}
        names = [mode_name(value) for value in MODES]
        assert names[-1] == "plain"
        assert names[:6] == [
            "constant",
            "learned",
            "jpegxl",
            "jpeg",
            "jpeg2000",
            "lossless",
        ]


def forged(header: Any, body: bytes) -> bytes:
    """A passport with any header and body, its checksums good."""
    return with_stream(header, zlib.compress(body))


def with_stream(header: Any, stream: bytes) -> bytes:
    text = json.dumps(header).encode()
    packed = text + stream
    return _HEAD.pack(b"WSCP", 1, len(text), zlib.crc32(packed)) + packed


QUALITY = LevelQuality(12, 10, 1, 36.5, 31.0, 30.0, (2, 1), 0.97, 0.95, 0.949, (0, 3))
FULL = FileRecord(
    wsicodec="0.1.0",
    codec="learned",
    quality=70,
    models=(ModelId("he-fast", "ab" * 32),),
    history=("JPEG Q=30", "learned quality 70"),
    levels=("source", "area average"),
    options={"effort": 5},
    metrics={"psnr": {"channels": "RGB"}},
    settings={"tile_size": 256, "glass": "fill", "preset": None},
    source=SourceIdentity("cd" * 32, 1_938_955, "svs", "jpeg"),
    deidentified=False,
    glass=GlassRecord("fill", "otsu", (241, 238, 240), 0.43),
    floor=FloorRecord(ssim=0.95),
    level_bytes=(400_000, 60_000),
    level_quality=(QUALITY, None),
    fallbacks={"lossless": 2},
)
OLD = (
    '{"format": "wsicodec-file", "version": 1, "wsicodec": "0.1.0", "codec": "jpeg", "quality": 70,'
    ' "models": [], "history": ["JPEG"], "levels": ["source"], "options": {}, "metrics": {}}'
)


def changed(**values: Any) -> str:
    return json.dumps({**FULL.as_dict(), **values})


class TestRecord:
    def test_round_trip(self) -> None:
        assert parse_record(FULL.to_json()) == FULL
        assert FULL.to_json().isascii()

    def test_old_record(self) -> None:
        record = parse_record(OLD)
        assert (record.source, record.glass, record.floor) == (None, None, None)
        assert (record.level_bytes, record.level_quality, record.fallbacks) == ((), (), {})
        assert record.settings == {}
        assert not record.deidentified

    def test_keys_are_for_ever(self) -> None:
        """What is stored once is read for ever: this list only grows."""
        assert sorted(FULL.as_dict()) == [
            "codec",
            "deidentified",
            "fallbacks",
            "floor",
            "format",
            "glass",
            "history",
            "level_bytes",
            "level_quality",
            "levels",
            "metrics",
            "models",
            "options",
            "quality",
            "settings",
            "source",
            "version",
            "wsicodec",
        ]

    @pytest.mark.parametrize(
        "values",
        [
            {"source": {"sha256": "ab"}},
            {"source": "ab"},
            {"source": {"sha256": 1, "bytes": 1, "format": "svs", "compression": "jpeg"}},
            {"glass": {"mode": "fill", "method": "otsu", "background": [1, 2], "tissue_share": 1}},
            {"glass": {"mode": "x", "method": "y", "background": [1, 2, 256], "tissue_share": 1}},
            {"glass": []},
            {"floor": {"ssim": "0.95", "psnr": None}},
            {"floor": {"ssim": 10**400, "psnr": None}},
            {"floor": 0.95},
            {"level_bytes": [None]},
            {"level_bytes": [2**63]},
            {"level_bytes": 5},
            {"level_quality": [{"tiles": 1}]},
            {"level_quality": [5]},
            {"fallbacks": [1]},
            {"fallbacks": {"lossless": "2"}},
            {"settings": None},
            {"options": [["effort", 1]]},
            {"quality": "70"},
            {"quality": {}},
            {"codec": None},
        ],
        ids=str,
    )
    def test_refuses(self, values: dict[str, Any]) -> None:
        with pytest.raises(FormatError, match="incomplete"):
            parse_record(changed(**values))

    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
    def test_refuses_what_json_has_no_number_for(self, number: str) -> None:
        with pytest.raises(FormatError, match="not JSON"):
            parse_record(OLD.replace('"options": {}', f'"options": {{"a": {number}}}'))
        with pytest.raises(FormatError, match="not JSON"):
            parse_record(OLD.replace('"quality": 70', f'"quality": {number}'))

    def test_never_writes_what_it_would_not_read(self) -> None:
        with pytest.raises(ValueError, match="JSON"):
            FileRecord("0.1.0", "jpeg", 70, options={"a": math.nan}).to_json()

    def test_version_and_format(self) -> None:
        with pytest.raises(UnsupportedError, match="version 2"):
            parse_record(changed(version=2))
        with pytest.raises(FormatError):
            parse_record(changed(format="other"))
        with pytest.raises(FormatError):
            parse_record("[" * 100_000)

    @pytest.mark.parametrize("number", [2.0**63, -(2.0**64), 2**63, 1.5])
    def test_numbers_beyond_64_bits(self, number: float) -> None:
        value = json.loads(FULL.to_json())
        value["level_bytes"] = [number]
        with pytest.raises(FormatError, match="not a whole number of 64 bits"):
            parse_record(json.dumps(value))

    @given(st.data())
    def test_mutations(self, draw: st.DataObject) -> None:
        """Any JSON in the place of any value: a record or a named error."""
        leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
        anything = st.recursive(
            leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner)
        )
        value = json.loads(FULL.to_json())
        place: Any = value
        while True:
            key = draw.draw(
                st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))
            )
            below = place[key]
            if not below or not isinstance(below, dict | list) or draw.draw(st.booleans()):
                break
            place = below
        place[key] = draw.draw(anything)
        try:
            record = parse_record(json.dumps(value))
        except (FormatError, UnsupportedError):
            return
        assert parse_record(record.to_json()) == record
