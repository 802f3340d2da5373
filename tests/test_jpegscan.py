"""Damage within JPEG streams: what is sound passes, what is not is named, and nothing runs away."""

from __future__ import annotations

import io
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from slides import CMU, DATA, data_slide, tissue, write_jpeg_tiff

from wsicodec.errors import FormatError, SlideError
from wsicodec.slide import jpegscan
from wsicodec.slide.jpegscan import check_scans
from wsicodec.slide.jpegstream import segments, with_tables
from wsicodec.slide.opening import open_slide
from wsicodec.slide.tiff import TiffReader

_SLIDES = (
    "cmu-1-small-region.svs",
    "tcga-cr-7395-01a-01-ts1.svs",
    "os-1-detail.ome.tif",
    "olympus-vsi/vsi-ets-test-jpg2k.vsi",
)


def _jpeg(image: np.ndarray, mode: str | None = None, **settings: Any) -> bytes:
    file = io.BytesIO()
    picture = Image.fromarray(image)
    (picture if mode is None else picture.convert(mode)).save(file, "jpeg", **settings)
    return file.getvalue()


def _streams(path: Path) -> Iterator[tuple[bytes, bytes | None]]:
    """All JPEG tiles and strips of a TIFF, with the tables of their directory."""
    with tifffile.TiffFile(path) as tiff:
        for page in (frame.aspage() for frame in tiff.pages):
            if page.compression != 7:
                continue
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
                tiff.filehandle.seek(offset)
                if count:
                    yield tiff.filehandle.read(count), page.jpegtables


def _scan(stream: bytes, number: int = 0) -> tuple[int, int]:
    """Where the entropy-coded data of a scan start and end."""
    places = [(start, end) for marker, start, end in segments(stream) if marker == 0xDA]
    start, end = places[number]
    return start + 2 + int.from_bytes(stream[start + 2 : start + 4]), end


@pytest.fixture(scope="module")
def tiles() -> list[tuple[bytes, bytes | None]]:
    return list(_streams(CMU))


class TestSound:
    def test_bundled_slide(self, tiles: list[tuple[bytes, bytes | None]]) -> None:
        assert len(tiles) == 205
        for stream, tables in tiles:
            check_scans(stream, tables)

    @pytest.mark.parametrize("name", _SLIDES)
    def test_slides(self, name: str) -> None:
        streams = list(_streams(data_slide(name)))
        assert streams
        for stream, tables in streams:
            check_scans(stream, tables)

    def test_ndpi(self) -> None:
        """One stream a level, of hundreds of restart intervals."""
        with tifffile.TiffFile(data_slide("hamamatsu-test3-tritc.ndpi")) as tiff:
            for page in tiff.pages[:5]:
                tags = page.tags
                place, count = tags.valueof(273)[0], tags.valueof(279)[0]
                tiff.filehandle.seek(place)
                check_scans(tiff.filehandle.read(count))

    def test_images(self) -> None:
        paths = [
            path for name in ("val", "train", "overviews") for path in (DATA / name).rglob("*")
        ]
        paths = [path for path in paths if path.suffix == ".jpg"]
        if not paths:
            pytest.skip(f"no images in {DATA}; set WSICODEC_DATA")
        for path in paths:
            check_scans(path.read_bytes())

    @pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
    @pytest.mark.parametrize("size", [(1, 1), (8, 8), (17, 33), (240, 240), (100, 7)])
    @pytest.mark.parametrize(
        "options",
        [
            {"subsampling": 0},
            {"subsampling": 1},
            {"subsampling": 2, "optimize": True},
            {"subsampling": "4:1:1", "quality": 100},
            {"restart_marker_blocks": 1},
            {"restart_marker_rows": 1, "quality": 10},
            {"progressive": True},
        ],
        ids=str,
    )
    def test_made(self, mode: str, size: tuple[int, int], options: dict[str, Any]) -> None:
        check_scans(_jpeg(tissue(*size), mode, **options))

    @pytest.mark.parametrize("level", [1, 30, 75, 100])
    def test_noise_and_hard_edges(self, level: int) -> None:
        """The largest coefficients that pixels can have."""
        y, x = np.mgrid[:64, :64]
        for image in (
            np.random.default_rng(level).integers(0, 2, (64, 64, 3), np.uint8) * np.uint8(255),
            np.repeat(((x + y) % 2 * 255).astype(np.uint8)[..., None], 3, 2),
            np.full((64, 64, 3), 255, np.uint8),
            np.zeros((64, 64, 3), np.uint8),
        ):
            check_scans(imagecodecs.jpeg8_encode(image, level=level, subsampling="444"))

    def test_twelve_bits(self) -> None:
        image = np.random.default_rng(5).integers(0, 4096, (64, 48, 3), np.uint16)
        check_scans(imagecodecs.jpeg_encode(image, level=95, bitspersample=12))

    def test_lossless_is_walked_by_its_markers(self) -> None:
        stream = imagecodecs.ljpeg_encode(np.ascontiguousarray(tissue(64, 64)[..., 0]))
        check_scans(stream)
        with pytest.raises(FormatError, match="no end marker"):
            check_scans(stream[:-2])

    def test_a_scan_for_each_component(self) -> None:
        apart = _apart()
        np.testing.assert_array_equal(  # decoders take it for what it is
            np.asarray(Image.open(io.BytesIO(apart)).convert("RGB")).shape, (40, 56, 3)
        )
        check_scans(apart)

    def test_fill_bytes_and_what_stands_behind_the_end(self) -> None:
        stream = _jpeg(tissue(40, 40))
        start = stream.find(b"\xff\xda")
        check_scans(
            stream[:start] + b"\xff" * 9 + stream[start:-2] + b"\xff" * 5 + b"\xff\xd9" + b"any"
        )

    @pytest.mark.parametrize("padding", [b"\0" * 3, b"\0" * 64, b"\xff\0" * 3, b"\xff\0\0\0"])
    @pytest.mark.parametrize("restarts", [0, 2])
    def test_padding_behind_the_last_block(self, padding: bytes, restarts: int) -> None:
        """Some encoders fill up to whole words; decoders see all blocks."""
        options = {"restart_marker_blocks": restarts} if restarts else {}
        for size in ((40, 40), (16, 16), (64, 72)):
            stream = _jpeg(tissue(*size), **options)
            padded = stream[:-2] + padding + b"\xff\xff\xff\xd9"
            np.testing.assert_array_equal(
                imagecodecs.jpeg8_decode(padded), imagecodecs.jpeg8_decode(stream)
            )
            check_scans(padded)
            for more in (b"\0" * 66, b"\0\1", b"\xff\0" * 33, b"\xff\xd0\0"):
                with pytest.raises(FormatError, match=r"left over|no marker"):
                    check_scans(stream[:-2] + more + b"\xff\xd9")

    def test_tables_without_an_end(self, tiles: list[tuple[bytes, bytes | None]]) -> None:
        stream, tables = tiles[0]
        assert tables is not None and tables.endswith(b"\xff\xd9")
        check_scans(stream, tables[:-2])
        for wrong, word in (
            (tables[:-3], "no end marker"),
            (tables[:-4] + b"\xff\xd9", "no end marker"),
            (tables[:-9], "cut short"),
            (tables[2:], "ff d8"),
            (tables[:2] + b"\0" + tables[2:], "no marker at byte 2"),
            (b"", "ff d8"),
        ):
            with pytest.raises(FormatError, match=rf"^JPEG tables of the directory .*{word}"):
                check_scans(stream, wrong)

    def test_restart_interval_of_the_tables(self, tiles: list[tuple[bytes, bytes | None]]) -> None:
        """Ends with the start of the image, for libjpeg too."""
        stream, tables = tiles[0]
        assert tables is not None
        more = tables[:-2] + b"\xff\xdd\0\4\0\1\xff\xd9"
        np.testing.assert_array_equal(
            imagecodecs.jpeg8_decode(stream, tables=more),
            imagecodecs.jpeg8_decode(stream, tables=tables),
        )
        check_scans(stream, more)


def _apart() -> bytes:
    """Three grey images as the components of one, each in a scan of its own."""
    grey = [_jpeg(np.ascontiguousarray(tissue(40, 56)[..., c]), quality=80) for c in range(3)]
    parts = [b"\xff\xd8"]
    for marker, start, end in segments(grey[0]):
        if marker in (0xDB, 0xC4):
            parts.append(grey[0][start:end])
    frame = struct.pack(">BHHB", 8, 40, 56, 3) + b"".join(bytes([c, 0x11, 0]) for c in (1, 2, 3))
    parts.insert(-1, b"\xff\xc0" + struct.pack(">H", 2 + len(frame)) + frame)
    for number, stream in enumerate(grey, 1):
        start, end = _scan(stream)
        parts.append(b"\xff\xda\x00\x08\x01" + bytes([number, 0, 0, 63, 0]) + stream[start:end])
    return b"".join(parts) + b"\xff\xd9"


class TestDamage:
    def test_cut_anywhere(self, tiles: list[tuple[bytes, bytes | None]]) -> None:
        """Whether or not somebody put an end behind what is left."""
        stream, tables = tiles[40]
        start, end = _scan(stream)
        for length in (*range(2, start, 7), *range(start, end - 1, 97)):
            with pytest.raises(FormatError, match="JPEG"):
                check_scans(stream[:length], tables)
            with pytest.raises(FormatError, match="JPEG"):
                check_scans(stream[:length] + b"\xff\xd9", tables)

    def test_single_bits(self, tiles: list[tuple[bytes, bytes | None]]) -> None:
        """Of single bits flipped in the tiles of this slide, 66 % were found, and 91 % of those
        that changed more than four blocks. Of images with Huffman tables of their own
        20 ... 34 % and 61 ... 87 %. Measured with 71 ... 400 flips each.

        It cannot be all of them: a bit within a coefficient is another coefficient, and codes may
        find back before a block is counted wrong.
        """
        generator = np.random.default_rng(1)
        found = 0
        for _ in range(600):
            stream, tables = tiles[generator.integers(130)]
            place = generator.integers(*_scan(stream))
            damaged = bytearray(stream)
            damaged[place] ^= 1 << generator.integers(8)
            found += not _passes(bytes(damaged), tables)
        assert found >= 0.58 * 600

    @pytest.mark.parametrize("fill", [b"\0", b"\x5a", None], ids=["zeros", "pattern", "noise"])
    def test_runs_of_bytes(
        self, tiles: list[tuple[bytes, bytes | None]], fill: bytes | None
    ) -> None:
        """What disks and networks do: a lost sector. All were found; of 64 bytes of zeros, all, of
        noise, 95 %."""
        generator = np.random.default_rng(2)
        tried = found = 0
        for _ in range(200):
            stream, tables = tiles[generator.integers(130)]
            start, end = _scan(stream)
            if end - start < 600:
                continue
            tried += 1
            place = generator.integers(start, end - 512)
            lost = generator.bytes(512) if fill is None else fill * 512
            found += not _passes(stream[:place] + lost + stream[place + 512 :], tables)
        assert tried > 150
        assert found >= 0.99 * tried

    def test_restart_markers(self) -> None:
        stream = _jpeg(tissue(64, 64), restart_marker_blocks=2, subsampling=0)
        check_scans(stream)
        first = stream.find(b"\xff\xd0")
        for changed in (
            stream[: first + 1] + b"\xd1" + stream[first + 2 :],
            stream[:first] + stream[first + 2 :],
            stream[:first] + b"\x12\x34" + stream[first:],
            stream[:first] + b"\xff\xd0" + stream[first:],
            stream.replace(b"\xff\xd3", b"\xff\xd4", 1),
        ):
            with pytest.raises(FormatError, match="JPEG scan is damaged"):
                check_scans(changed)

    def test_problems_have_names(self) -> None:
        white = _jpeg(np.full((16, 16), 255, np.uint8))  # four blocks
        start, end = _scan(white)
        head = white[:start]
        # standard tables: DC size 0 is 00, its size 11 is 111111110; AC: EOB 1010, ZRL 11111111001
        cases = {
            "data end within": "001010",
            "are left over behind": "001010" * 4 + "0" * 20,
            "code that does not exist": "1" * 24,
            "more than 64": "00" + "11111111001" * 4 + "001010" * 3,
            "the same byte": "0" * 800,
            "no pixels have": "111111110" + "1" * 11 + "1010" + "001010" * 3,
        }
        for word, codes in cases.items():
            bits = codes + "1" * (-len(codes) % 8)
            data = int(bits, 2).to_bytes(len(bits) // 8).replace(b"\xff", b"\xff\x00")
            with pytest.raises(FormatError, match=word):
                check_scans(head + data + white[end:])
        assert len(jpegscan._PROBLEMS) == len(cases) + 1

    def test_a_scan_that_is_missing(self) -> None:
        apart = _apart()
        last = apart.rfind(b"\xff\xda")
        with pytest.raises(FormatError, match="scans of 2 of 3 components"):
            check_scans(apart[:last] + b"\xff\xd9")
        with pytest.raises(FormatError, match="two scans of one component"):
            check_scans(apart[:-2] + apart[last:])


def _passes(stream: bytes, tables: bytes | None = None) -> bool:
    try:
        check_scans(stream, tables)
    except FormatError as error:
        assert str(error).startswith("JPEG")
        assert len(str(error)) < 200
        return False
    return True


class TestHostile:
    @given(st.binary(max_size=300), st.binary(max_size=80))
    @settings(max_examples=300, deadline=None)
    def test_any_bytes(self, stream: bytes, tables: bytes) -> None:
        _passes(b"\xff\xd8" + stream)
        _passes(b"\xff\xd8" + stream, b"\xff\xd8" + tables + b"\xff\xd9")
        _passes(stream, tables)

    @given(st.data())
    @settings(max_examples=400, deadline=None)
    def test_changed_headers(self, data: st.DataObject) -> None:
        """Any bytes of the headers may be any others, and the scan too."""
        stream = bytearray(_HOSTILE[data.draw(st.integers(0, len(_HOSTILE) - 1))])
        for _ in range(data.draw(st.integers(1, 6))):
            stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
        _passes(bytes(stream))

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            (lambda s: s[:2] + b"\xff\xc0\x00\x02" + s[2:], "second frame"),
            (
                lambda s: s[: _at(s)] + b"\xff\xc0\x00\x02" + s[s.find(b"\xff\xc4") :],
                "0 components",
            ),
            (lambda s: _frame(s, 4, b"\0\0"), "0 x "),
            (lambda s: _frame(s, 3, b"\x10"), "of 16 bits"),
            (lambda s: _frame(s, 8, b"\xff"), "components in"),
            (lambda s: _frame(s, 10, b"\x00"), "sampling factors"),
            (lambda s: _frame(s, 10, b"\x51"), "sampling factors"),
            (lambda s: _frame(s, 12, s[_at(s) + 11 : _at(s) + 12]), "lacks|component twice|names"),
            (lambda s: _frame(s, 10, b"\x44\x01\x02\x44"), "blocks in a unit|twice"),
            (lambda s: s.replace(b"\xff\xdb", b"\xff\xfe"), "lacks quantiser"),
            (lambda s: s.replace(b"\xff\xc4", b"\xff\xfe"), "lacks Huffman table"),
            (lambda s: s.replace(b"\xff\xc0", b"\xff\xfe"), "without a frame"),
            (lambda s: s.replace(b"\xff\xda", b"\xff\xfe"), "JPEG"),
            (lambda s: s[:2] + b"\xff\xdd\x00\x03\x01" + s[2:], "restart interval"),
            (lambda s: s[:2] + b"\xff\xc4\x00\x15\x00\xff" + bytes(17) + s[2:], "cut short"),
            (lambda s: s[:2] + b"\xff\xdb\x00\x03\x00" + s[2:], "cut short"),
            (lambda s: s[:2] + b"\xff\xe0\xff\xff" + s[2:], "cut short"),
            (lambda s: b"\xff\xd8\xff\xd9", "no scan"),
            (lambda s: b"BM" + s, "ff d8"),
        ],
    )
    def test_headers(self, change: Callable[[bytes], bytes], word: str) -> None:
        with pytest.raises(FormatError, match=word):
            check_scans(change(_jpeg(tissue(32, 32), subsampling=0)))

    def test_tables_with_a_scan(self) -> None:
        stream = _jpeg(tissue(32, 32))
        with pytest.raises(FormatError, match="tables of the directory"):
            check_scans(stream, stream)

    def test_time_goes_with_the_bytes(self) -> None:
        """65500 x 65500 pixels announced over few bytes, and long rows of what means nothing."""
        huge = bytearray(_jpeg(tissue(32, 32), subsampling=0))
        at = huge.find(b"\xff\xc0")
        huge[at + 5 : at + 9] = struct.pack(">HH", 65500, 65500)
        start = bytes(huge).find(b"\xff\xda")
        check = [
            bytes(huge),
            bytes(huge[:start]) + b"\xff" * 2_000_000 + bytes(huge[start:]),
            b"\xff\xd8" + b"\xff\xd0" * 1_000_000,
            b"\xff\xd8" + b"\xff\xc4\x00\x02" * 500_000,
            b"\xff\xd8" + b"\xff\xc4\x40\x02" + bytes(2**14) + b"\xff\xc4\x40\x02" * 100_000,
            _jpeg(tissue(32, 32), progressive=True)[:-2] + b"\xff\x00" * 1_000_000,
        ]
        check_scans(_jpeg(tissue(32, 32)))  # compiled
        started = time.perf_counter()
        assert not any(_passes(stream) for stream in check)
        assert time.perf_counter() - started < 5

    def test_long_headers_are_not_kept(self) -> None:
        stream = _jpeg(tissue(32, 32))
        before = jpegscan._plan_kept.cache_info().misses
        tables = stream[stream.find(b"\xff\xdb") :][:69]
        check_scans(stream[:2] + tables * 200 + stream[2:])
        assert jpegscan._plan_kept.cache_info().misses == before


_HOSTILE = (
    _jpeg(np.arange(24 * 24 * 3, dtype=np.uint32).astype(np.uint8).reshape(24, 24, 3), quality=20),
    _jpeg(np.arange(48 * 48, dtype=np.uint32).astype(np.uint8).reshape(48, 48), optimize=True),
    _jpeg(np.full((40, 40, 3), 99, np.uint8), restart_marker_blocks=1),
)


def _at(stream: bytes) -> int:
    return stream.find(b"\xff\xc0")


def _frame(stream: bytes, offset: int, new: bytes) -> bytes:
    """Bytes of the frame header, counted from its marker, become others."""
    place = _at(stream) + 1 + offset
    return stream[:place] + new + stream[place + len(new) :]


class TestReader:
    @pytest.fixture
    def damaged(self, tmp_path: Path) -> Path:
        """A slide of 3 x 3 tiles: 64 bytes in the middle of tile (1, 2) are lost."""
        path = write_jpeg_tiff(tmp_path / "a.tif", tissue(300, 300))
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            place = page.dataoffsets[5] + page.databytecounts[5] // 2
        content = bytearray(path.read_bytes())
        content[place : place + 64] = bytes(64)
        path.write_bytes(content)
        return path

    def test_names_the_tile(self, damaged: Path) -> None:
        with open_slide(damaged, strict=True) as slide:
            slide.read_region(0, 0, 0, 300, 128)
            with pytest.raises(SlideError, match="level 0: tile at row 1, column 2: JPEG scan is"):
                slide.read_region(0, 0, 0, 300, 300)
            assert isinstance(slide, TiffReader)
            with pytest.raises(SlideError, match="tile at row 1, column 2: JPEG scan is"):
                slide.decode_tile(0, 1, 2)
            assert slide.tile_bytes(0, 1, 2)  # as it is, for those who copy

    def test_others_see_what_there_is(self, damaged: Path) -> None:
        with open_slide(damaged) as slide:
            assert slide.read_region(0, 0, 0, 300, 300).shape == (300, 300, 3)

    def test_sound_slide(self) -> None:
        with open_slide(CMU, strict=True) as strict, open_slide(CMU) as slide:
            for level in slide.levels:
                place = level.index, 0, 0, level.height, level.width
                np.testing.assert_array_equal(strict.read_region(*place), slide.read_region(*place))
            for name in slide.info.associated:
                assert strict.read_associated(name).pixels.size

    @pytest.mark.parametrize("grey", [False, True], ids=["RGB", "grey"])
    @pytest.mark.parametrize("cut", [False, True], ids=["flipped", "cut"])
    def test_images_beside(self, tmp_path: Path, grey: bool, cut: bool) -> None:
        """A grey label that breaks off used to pass: it is not copied, only decoded."""
        label = np.ascontiguousarray(tissue(200, 180)[..., 0] if grey else tissue(200, 180))
        stream = _jpeg(label, subsampling=0) if not grey else _jpeg(label)
        middle = len(stream) // 2
        changed = stream[:middle] if cut else stream[:middle] + bytes(64) + stream[middle + 64 :]
        path = tmp_path / "a.tif"
        with tifffile.TiffWriter(path) as writer:
            writer.write(tissue(300, 300), photometric="rgb", tile=(128, 128), metadata=None)
            writer.write(
                iter([changed]),
                shape=label.shape,
                dtype=np.uint8,
                photometric="minisblack" if grey else "ycbcr",
                compression="jpeg",
                rowsperstrip=200,
                description="label",
                metadata=None,
            )
        with open_slide(path, strict=not cut) as slide:
            word = "breaks off" if cut else "JPEG scan is damaged"
            with pytest.raises(SlideError, match=f"image 'label'.*{word}"):
                slide.read_associated("label")

    def test_tables_of_the_directory(self, tiles: list[tuple[bytes, bytes | None]]) -> None:
        stream, tables = tiles[0]
        with pytest.raises(FormatError, match="lacks quantiser"):
            check_scans(stream)
        check_scans(with_tables(tables, stream))
