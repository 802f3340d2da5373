"""JPEG images beside a pyramid as transcoded tiles: the same pixels, the same JPEG, fewer bytes."""

from __future__ import annotations

import dataclasses
import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slides import CMU, tissue

import wsicodec
from wsicodec.bitstream import MAX_SIDE, Mode, Tile, parse
from wsicodec.codec.transcoded import jpeg_of, transcode
from wsicodec.convert import ConvertSettings, convert
from wsicodec.errors import FormatError, LimitError, UnsupportedError
from wsicodec.slide.opening import open_slide
from wsicodec.slide.protocol import StoredImage
from wsicodec.slide.repacking import join_strips, repack, unpack

imagecodecs = pytest.importorskip("imagecodecs")


def striped(
    image: Any, rows: int, *, subsampling: str = "444", ycbcr: bool = True, short_last: bool = True
) -> tuple[StoredImage, Any]:
    """An image in JPEG strips, and what tifffile reads of them."""
    import tifffile

    height, width = image.shape[:2]
    strips = []
    for top in range(0, height, rows):
        strip = image[top : top + rows]
        if not short_last and strip.shape[0] < rows:
            strip = np.pad(strip, ((0, rows - strip.shape[0]), (0, 0), (0, 0)), mode="edge")
        colours = {} if ycbcr else {"colorspace": "RGB", "outcolorspace": "RGB"}
        strips.append(
            bytes(
                imagecodecs.jpeg8_encode(
                    np.ascontiguousarray(strip), level=85, subsampling=subsampling, **colours
                )
            )
        )
    chroma = {"444": (1, 1), "422": (2, 1), "420": (2, 2)}[subsampling]
    arguments = {} if ycbcr else {"compressionargs": {"outcolorspace": "rgb"}}
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(
            iter(strips), shape=image.shape, dtype="uint8", compression="jpeg", photometric="rgb",
            rowsperstrip=rows, subsampling=chroma, metadata=None, **arguments,
        )  # fmt: skip
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        pixels = tiff.pages[0].asarray()
        photometric = int(tiff.pages[0].photometric)
    stored = StoredImage(
        height=height, width=width, compression=7, photometric=photometric, planarconfig=1,
        predictor=1, tile=None, rows_per_strip=rows, subsampling=chroma, jpegtables=None,
        segments=tuple(strips),
    )  # fmt: skip
    return stored, pixels


def shown(tile: tuple[int, int], tiles: tuple[bytes, ...], shape: tuple[int, ...]) -> Any:
    """Strips put together."""
    rows = np.concatenate([wsicodec.decode(data) for data in tiles])
    return rows[: shape[0]]


@pytest.mark.parametrize("ycbcr", [True, False])
@pytest.mark.parametrize("short_last", [True, False])
@pytest.mark.parametrize(("height", "rows"), [(96, 16), (90, 16), (200, 64), (57, 8)])
def test_strips_become_one_tile(height: int, rows: int, ycbcr: bool, short_last: bool) -> None:
    image = tissue(height, 131)
    stored, pixels = striped(image, rows, ycbcr=ycbcr, short_last=short_last)
    found = repack(stored, pixels)
    assert found is not None
    np.testing.assert_array_equal(shown(found.tile, found.tiles, pixels.shape), pixels)
    assert found.size < sum(map(len, stored.segments))
    whole_units = short_last or -(-height // 8) * 8 % rows == 0
    assert (found.tile == (height, 131)) == whole_units  # else rows would have to be cut off
    assert {parse(tile).mode for tile in found.tiles} == {Mode.TRANSCODED}


def test_strips_whose_colours_reach_into_one_another_stay_apart() -> None:
    """libjpeg smooths colours of 4:2:0 across rows, but not across strips."""
    stored, pixels = striped(tissue(384, 512), 128, subsampling="420")
    found = repack(stored, pixels)
    assert found is not None and found.tile == (128, 512) and len(found.tiles) == 3
    np.testing.assert_array_equal(shown(found.tile, found.tiles, pixels.shape), pixels)


def test_the_joined_stream_holds_the_strips_bytes() -> None:
    stored, pixels = striped(tissue(100, 64), 16)
    joined = join_strips(list(stored.segments), 16, 100)
    np.testing.assert_array_equal(imagecodecs.jpeg8_decode(joined), pixels)
    found = repack(stored, pixels)
    assert found is not None
    assert jpeg_of(parse(found.tiles[0])) == joined


def test_more_than_eight_strips_count_their_restarts_round() -> None:
    stored, pixels = striped(tissue(8 * 19, 40), 8)
    joined = join_strips(list(stored.segments), 8, 8 * 19)
    np.testing.assert_array_equal(imagecodecs.jpeg8_decode(joined), pixels)


def test_other_pixels_are_never_repacked() -> None:
    stored, pixels = striped(tissue(64, 64), 16)
    other = pixels.copy()
    other[3, 3, 1] ^= 1
    assert repack(stored, other) is None
    assert repack(stored, pixels[:60]) is None


@pytest.mark.parametrize(
    "change",
    [
        {"compression": 5},
        {"planarconfig": 2},
        {"segments": (b"",)},
        {"segments": (b"\xff\xd8\xff",)},
        {"segments": (b"no JPEG",)},
        {"rows_per_strip": 24},
        {"height": 640},
        {"height": MAX_SIDE + 1},
    ],
)
def test_what_cannot_be_repacked_is_left(change: dict[str, Any]) -> None:
    stored, pixels = striped(tissue(64, 64), 16)
    assert repack(dataclasses.replace(stored, **change), pixels) is None


def _with_restarts(stream: bytes) -> bytes:
    return stream.replace(b"\xff\xda", b"\xff\xdd\x00\x04\x00\x01\xff\xda", 1)


def _with_other_table(stream: bytes) -> bytes:
    at = stream.index(b"\xff\xdb") + 6
    return stream[:at] + bytes([stream[at] ^ 1]) + stream[at + 1 :]


def _progressive(stream: bytes) -> bytes:
    return stream.replace(b"\xff\xc0", b"\xff\xc2", 1)


def _cut(stream: bytes) -> bytes:
    return stream[:-2]


@pytest.mark.parametrize("change", [_with_restarts, _with_other_table, _progressive, _cut])
def test_strips_of_another_kind_are_not_joined(change: Callable[[bytes], bytes]) -> None:
    stored, _ = striped(tissue(64, 64), 16)
    strips = list(stored.segments)
    strips[2] = change(strips[2])
    with pytest.raises(FormatError):
        join_strips(strips, 16, 64)


def test_the_bundled_slides_images_shrink_by_a_third() -> None:
    with open_slide(CMU) as slide:
        for name in ("thumbnail", "macro"):
            image = slide.read_associated(name)
            assert image.stored is not None
            found = repack(image.stored, image.pixels)
            assert found is not None and found.tile == image.pixels.shape[:2]
            assert found.size < 0.66 * sum(map(len, image.stored.segments))


# -- the mode itself --


def jpeg(image: Any, **options: Any) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(image, level=85, **options))


@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
@pytest.mark.parametrize("size", [(1, 1), (17, 31), (256, 256)])
def test_a_transcoded_tile_is_the_jpeg(size: tuple[int, int], subsampling: str) -> None:
    stream = jpeg(tissue(*size), subsampling=subsampling)
    tile = transcode(stream)
    assert tile is not None and jpeg_of(tile) == stream
    data = tile.pack()
    np.testing.assert_array_equal(wsicodec.decode(data), imagecodecs.jpeg8_decode(stream))
    info = wsicodec.probe(data)
    assert (info.mode, info.height, info.width) == ("transcoded", *size)


def test_what_jpeg_xl_cannot_give_back_is_no_tile() -> None:
    image = tissue(32, 32)
    assert transcode(jpeg(image)[:-9]) is None
    assert transcode(jpeg(np.ascontiguousarray(image[..., 0]))) is None  # grey
    assert transcode(b"") is None


def test_comments_that_unfold_are_refused() -> None:
    """A thousand comments of 64 KiB fit into a hundred bytes each."""
    stream = jpeg(tissue(32, 32))
    comment = b"\xff\xfe\xff\xff" + bytes(65533)
    bomb = bytes(imagecodecs.jpegxl_encode_jpeg(stream[:2] + 200 * comment + stream[2:]))
    assert len(bomb) < 100_000
    with pytest.raises(LimitError, match="201 segments"):
        jpeg_of(Tile(Mode.TRANSCODED, 32, 32, bomb))
    few = bytes(imagecodecs.jpegxl_encode_jpeg(stream[:2] + 2 * comment + stream[2:]))
    with pytest.raises(FormatError, match="does not turn back"):
        jpeg_of(Tile(Mode.TRANSCODED, 32, 32, few))  # longer than its pixels allow


def test_boxes_beside_the_stream_are_refused() -> None:
    packed = bytes(imagecodecs.jpegxl_encode_jpeg(jpeg(tissue(32, 32))))
    for kind in (b"Exif", b"xml ", b"brob"):
        with pytest.raises(FormatError, match="holds a box"):
            jpeg_of(
                Tile(Mode.TRANSCODED, 32, 32, packed + struct.pack(">I4s", 16, kind) + bytes(8))
            )
    at = packed.index(b"jbrd") - 4
    size = int.from_bytes(packed[at : at + 4], "big")
    box = packed[at : at + size]
    for changed, count in (
        (packed[:at] + packed[at + size :], 0),
        (packed[:at] + box + packed[at:], 2),
    ):
        with pytest.raises(FormatError, match=f"holds {count} boxes"):
            jpeg_of(Tile(Mode.TRANSCODED, 32, 32, changed))


def test_nothing_hides_in_the_boxes_of_the_start() -> None:
    packed = bytes(imagecodecs.jpegxl_encode_jpeg(jpeg(tissue(32, 32))))
    start, rest = packed[:32], packed[32:]
    longer = start[:12] + struct.pack(">I", 24) + start[16:] + b"name" + rest
    levels = start + 2 * struct.pack(">I4sB", 9, b"jxll", 5) + rest
    level = start + struct.pack(">I4sB", 12, b"jxll", 5) + b"abc" + rest
    for changed in (longer, levels, level, start + start + rest):
        with pytest.raises(FormatError):
            jpeg_of(Tile(Mode.TRANSCODED, 32, 32, changed))


def test_strips_with_fill_bytes_come_back() -> None:
    """T.81 allows any number of ff before a marker."""
    stored, pixels = striped(tissue(128, 256), 128)
    filled = stored.segments[0].replace(b"\xff\xc0", b"\xff\xff\xff\xc0", 1)
    found = repack(dataclasses.replace(stored, segments=(filled,)), pixels)
    assert found is not None
    packed = dataclasses.replace(stored, compression=60642, segments=found.tiles)
    back = unpack(packed)
    assert back is not None and back.segments == (filled,)


def test_cmyk_is_refused() -> None:
    image = np.dstack([tissue(32, 32), tissue(32, 32)[..., 0]])
    stream = bytes(imagecodecs.jpeg8_encode(image, colorspace="CMYK", outcolorspace="CMYK"))
    assert transcode(stream) is None
    with pytest.raises((UnsupportedError, FormatError)):
        wsicodec.decode(Tile(Mode.TRANSCODED, 32, 32, b"\x00\x00\x00\x0cJXL \r\n\x87\n").pack())


# -- in files --


def test_slides_keep_their_images_through_codecs(tmp_path: Path) -> None:
    """SVS -> learned -> JPEG: strips, one transcoded tile, and JPEG again; the same pixels."""
    import tifffile

    learned, again = tmp_path / "learned.ome.tiff", tmp_path / "jpeg.ome.tiff"
    settings = ConvertSettings(levels=1, measure="none", jobs=1)
    convert(CMU, learned, settings)
    convert(learned, again, dataclasses.replace(settings, codec="jpeg"))
    with open_slide(CMU) as source, open_slide(learned) as first, open_slide(again) as second:
        assert first.info.associated == second.info.associated == source.info.associated
        for name in ("thumbnail", "macro"):
            there, back = source.read_associated(name), second.read_associated(name)
            packed = first.read_associated(name)
            np.testing.assert_array_equal(packed.pixels, there.pixels)
            np.testing.assert_array_equal(back.pixels, there.pixels)
            assert there.stored is not None and packed.stored is not None
            assert packed.stored.compression == 60642 and len(packed.stored.segments) == 1
            assert back.stored is not None and back.stored.compression == 7
            assert sum(map(len, back.stored.segments)) < sum(map(len, there.stored.segments))
    with tifffile.TiffFile(learned) as tiff:
        pages = [page for page in tiff.pages if page.compression == 60642][1:]
        assert sorted(page.shape for page in pages) == [(431, 1280, 3), (768, 574, 3)]


def test_zarr_keeps_them_too(tmp_path: Path) -> None:
    target = tmp_path / "a.ome.zarr"
    convert(CMU, target, ConvertSettings(levels=1, measure="none", jobs=1))
    with open_slide(CMU) as source, open_slide(target) as slide:
        for name in source.info.associated:
            np.testing.assert_array_equal(
                slide.read_associated(name).pixels, source.read_associated(name).pixels
            )
    files = (target / "associated" / "thumbnail").rglob("*")
    size = sum(path.stat().st_size for path in files if path.is_file())
    assert size < 135_000


def test_only_transcoded_tiles_are_unpacked() -> None:
    stored, pixels = striped(tissue(64, 64), 16)
    found = repack(stored, pixels)
    assert found is not None
    packed = dataclasses.replace(
        stored, compression=60642, rows_per_strip=64, segments=found.tiles, jpegtables=None
    )
    jpeg_again = unpack(packed)
    assert jpeg_again is not None and jpeg_again.compression == 7
    assert imagecodecs.jpeg8_decode(jpeg_again.segments[0]).tobytes() == pixels.tobytes()
    assert unpack(stored) is None
    constant = Tile(Mode.CONSTANT, 64, 64, b"abc").pack()
    assert unpack(dataclasses.replace(packed, segments=(constant,))) is None
    with pytest.raises(FormatError):
        unpack(dataclasses.replace(packed, segments=(found.tiles[0][:-1],)))
