"""The reference codecs: round trips, quality, options, headers, and bytes from strangers."""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest

import wsicodec
from wsicodec.bitstream import MAX_SIDE
from wsicodec.codec import reference
from wsicodec.codec.protocol import TileInfo
from wsicodec.codec.reference import REFERENCE_CODECS, decode_payload
from wsicodec.errors import (
    FormatError,
    LimitError,
    RuntimeMissingError,
    SettingsError,
    TruncatedError,
    UnsupportedError,
    WsicodecError,
)
from wsicodec.metrics import Image, psnr, ssim

NAMES = ("jpeg", "jpeg2000", "jpegxl", "avif", "webp", "lossless")
LOSSY = ("jpeg", "jpeg2000", "jpegxl", "avif", "webp")
WITHOUT_LOSS = ("jpeg2000", "jpegxl", "avif", "webp", "lossless")
FAST: dict[str, dict[str, Any]] = {
    "jpegxl": {"effort": 3},
    "lossless": {"effort": 3},
    "avif": {"speed": 10},
    "webp": {"method": 0},
}


@pytest.fixture(scope="module")
def tissue() -> Image:
    """A tile of the IHC image that scikit-image carries (CC0)."""
    from skimage.data import immunohistochemistry

    return np.ascontiguousarray(immunohistochemistry()[128:384, 128:384])


def picture(rows: int, columns: int, seed: int = 0) -> Image:
    """Smooth colours with noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:rows, :columns] / 9
    base = np.stack([np.sin(y + x), np.cos(y - x), np.sin(x)], -1) * 70 + 128
    return np.clip(base + rng.normal(0, 6, base.shape), 0, 255).astype(np.uint8)


def encode(name: str, image: Image, quality: int = 70, **options: Any) -> bytes:
    lossless = options.pop("lossless", False)
    return REFERENCE_CODECS[name].encode(image, quality=quality, lossless=lossless, **options)


def decode(name: str, data: bytes) -> Image:
    return REFERENCE_CODECS[name].decode(data)


# -- round trips --

SIZES = [
    *((1, 1), (1, 2), (3, 1), (5, 7), (17, 31), (1, 300), (300, 1), (255, 257), (264, 520)),
    # JPEG XL writes multiples of eight and some ratios of the sides in short
    *((8, 8), (256, 256), (100, 120), (90, 120), (100, 150), (90, 160), (80, 100), (64, 128)),
    *((1, MAX_SIDE), (MAX_SIDE, 3)),
]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_and_probe(name: str, size: tuple[int, int]) -> None:
    image = picture(*size)
    stream = encode(name, image, 90, **FAST.get(name, {}))
    info = REFERENCE_CODECS[name].probe(stream)
    assert info == TileInfo(name, name, *size, len(stream))
    decoded = decode(name, stream)
    assert decoded.shape == image.shape
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable
    if name == "lossless":
        np.testing.assert_array_equal(decoded, image)
    elif min(size) >= 8:
        assert psnr(image, decoded) > 25


@pytest.mark.parametrize("name", WITHOUT_LOSS)
@pytest.mark.parametrize("quality", [1, 100])
def test_lossless_is_exact(name: str, quality: int, tissue: Image) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (37, 61, 3), dtype=np.uint8)
    for image in (tissue, noise, np.zeros_like(noise), np.full_like(noise, 255)):
        stream = encode(name, image, quality, lossless=True, **FAST.get(name, {}))
        np.testing.assert_array_equal(decode(name, stream), image)


def test_jpeg_has_no_lossless_mode() -> None:
    with pytest.raises(SettingsError, match="always loses"):
        encode("jpeg", picture(8, 8), lossless=True)


@pytest.mark.parametrize("name", NAMES)
def test_one_image_gives_one_stream(name: str) -> None:
    image = picture(64, 80)
    assert encode(name, image) == encode(name, image)


@pytest.mark.parametrize("name", NAMES)
def test_package_functions_find_the_codec_by_its_magic(name: str) -> None:
    image = picture(24, 33)
    stream = wsicodec.encode(image, codec=name, quality=60)
    assert stream == encode(name, image, 60)
    np.testing.assert_array_equal(wsicodec.decode(stream), decode(name, stream))
    # a JPEG XL stream does not tell which of our two names wrote it
    expected = "jpegxl" if name == "lossless" else name
    assert wsicodec.probe(stream).codec == expected
    assert [n for n in NAMES if REFERENCE_CODECS[n].check(stream)] == (
        ["jpegxl", "lossless"] if expected == "jpegxl" else [name]
    )


def test_streams_are_the_codecs_own() -> None:
    image = picture(40, 40)
    assert imagecodecs.jpeg8_decode(encode("jpeg", image)).shape == image.shape
    assert encode("jpeg2000", image).startswith(b"\xff\x4f\xff\x51")  # codestream, no JP2 boxes
    assert encode("jpegxl", image).startswith(b"\xff\x0a")
    assert encode("lossless", image).startswith(b"\xff\x0a")
    assert imagecodecs.avif_decode(encode("avif", image)).shape == image.shape
    assert imagecodecs.webp_decode(encode("webp", image)).shape == image.shape


# -- quality and options --


@pytest.mark.parametrize("name", LOSSY)
def test_quality_is_monotone(name: str, tissue: Image) -> None:
    streams = [encode(name, tissue, q) for q in (1, *range(10, 101, 10))]
    levels = [psnr(tissue, decode(name, s)) for s in streams]
    sizes = [len(s) for s in streams]
    assert all(a < b for a, b in pairwise(sizes)), sizes
    assert all(a < b for a, b in pairwise(levels)), levels


@pytest.mark.parametrize("name", LOSSY)
def test_quality_1_and_100_are_far_apart(name: str, tissue: Image) -> None:
    coarse, fine = encode(name, tissue, 1), encode(name, tissue, 100)
    assert len(fine) > 10 * len(coarse)
    assert psnr(tissue, decode(name, coarse)) < 28
    assert ssim(tissue, decode(name, fine)) > 0.995


def test_quality_100_is_not_lossless_by_accident(tissue: Image) -> None:
    for name in LOSSY:
        assert len(encode(name, tissue, 100)) < 1.1 * len(encode("lossless", tissue, 100)), name


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSY)
def test_default_quality_keeps_ssim_on_tissue(name: str) -> None:
    """The contract of quality 70, for every codec: mean SSIM of at least 0.95 on val tissue."""
    root = Path(os.environ.get("WSICODEC_DATA", Path(__file__).parents[2] / "shared/data"))
    files = sorted(p for p in (root / "val").glob("*") if p.suffix in (".jpg", ".jxl"))
    if not files:
        pytest.skip("no val images")
    found = []
    for file in files:
        image = wsicodec.decode(file.read_bytes())
        height, width = image.shape[:2]
        tiles = [
            np.ascontiguousarray(image[y : y + 256, x : x + 256])
            for y in range(0, height - 255, 256)
            for x in range(0, width - 255, 256)
        ]
        found.append(np.mean([ssim(t, decode(name, encode(name, t, 70))) for t in tiles]))
    assert 0.95 <= np.mean(found) < 0.975


@pytest.mark.parametrize(
    ("name", "small", "large"),
    [
        ("jpeg", {"subsampling": "420"}, {"subsampling": "422"}),
        ("jpeg", {"subsampling": "422"}, {"subsampling": "444"}),
        ("jpeg", {"optimize": True}, {"optimize": False}),
        ("jpeg", {"level": 40}, {"level": 60}),
        ("jpeg2000", {"psnr": 30}, {"psnr": 36.5}),
        ("jpegxl", {"distance": 3}, {"distance": 1.5}),
        ("jpegxl", {"effort": 7}, {"effort": 3}),
        ("lossless", {"effort": 7}, {"effort": 1}),
        ("avif", {"level": 40}, {"level": 60}),
        ("avif", {"subsampling": "420"}, {"subsampling": "444"}),
        ("webp", {"level": 40}, {"level": 60.5}),
        ("webp", {"method": 6}, {"method": 0}),
    ],
    ids=repr,
)
def test_options_take_effect(
    name: str, small: dict[str, Any], large: dict[str, Any], tissue: Image
) -> None:
    assert len(encode(name, tissue, **small)) < len(encode(name, tissue, **large))


def test_defaults_of_options(tissue: Image) -> None:
    for name, options in {
        "jpeg": {"subsampling": "420", "optimize": True},
        "jpegxl": {"effort": 7},
        "avif": {"speed": 6, "subsampling": "444"},
        "webp": {"method": 4},
        "lossless": {"effort": 7},
    }.items():
        assert encode(name, tissue) == encode(name, tissue, **options), name


@pytest.mark.parametrize("number", [35.5, np.float32(35.5), np.float64(35.5)], ids=repr)
def test_native_parameter_overrides_quality(number: Any) -> None:
    image = picture(64, 64)
    assert encode("jpeg2000", image, 5, psnr=number) == encode("jpeg2000", image, 95, psnr=35.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("jpeg", {"effort": 7}, "no option 'effort'; it has level, optimize, subsampling"),
        ("jpeg", {"subsampling": "411"}, "subsampling='411' is none of '420', '422', '444'"),
        ("jpeg", {"subsampling": 420}, "subsampling=420 is none of"),
        ("jpeg", {"optimize": 1}, "neither True nor False"),
        ("jpeg", {"level": 0}, "not within 1 ... 100"),
        ("jpeg", {"level": 75.5}, "not an integer"),
        ("jpeg", {"level": True}, "not an integer"),
        ("jpeg2000", {"psnr": 9}, "not within 10 ... 100"),
        ("jpeg2000", {"psnr": "40"}, "not a number"),
        ("jpeg2000", {"psnr": float("nan")}, "not within"),
        ("jpeg2000", {"psnr": 40, "lossless": True}, "means nothing"),
        ("jpegxl", {"distance": 0}, "not within 0.01 ... 25"),
        ("jpegxl", {"distance": 1.0, "lossless": True}, "means nothing"),
        ("jpegxl", {"effort": 11}, "not within 1 ... 10"),
        ("jpegxl", {"subsampling": "444"}, "it has distance, effort"),
        ("lossless", {"distance": 1.0}, "it has effort"),
        ("avif", {"speed": 11}, "not within 0 ... 10"),
        ("avif", {"level": 100}, "not within 0 ... 99"),
        ("avif", {"subsampling": "420", "lossless": True}, "means nothing"),
        ("webp", {"method": 7}, "not within 0 ... 6"),
        ("webp", {"level": -1}, "not within 0 ... 100"),
        ("webp", {"level": 50, "lossless": True}, "means nothing"),
    ],
    ids=repr,
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        encode(name, picture(8, 8), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_missing_library_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = encode(name, picture(8, 8))
    codec: Any = REFERENCE_CODECS[name]
    missing = type("Missing", (), {"available": False})
    with monkeypatch.context() as patch:
        patch.setattr(imagecodecs, codec.library, missing)
        for action in (lambda: decode(name, stream), lambda: encode(name, picture(8, 8))):
            with pytest.raises(RuntimeMissingError, match="pip install") as caught:
                action()
            assert name in str(caught.value)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "imagecodecs", None)
        with pytest.raises(RuntimeMissingError, match="pip install"):
            decode(name, stream)
        assert codec.probe(stream).width == 8  # needs no library


# -- streams of other kinds --


def foreign() -> dict[str, tuple[str, bytes, str]]:
    """Valid streams that are not 8-bit RGB stills: codec, bytes, part of the message."""
    ic = imagecodecs
    rgb = picture(20, 30)
    grey, rgba = rgb[..., 0].copy(), np.dstack([rgb, rgb[..., :1]])
    deep, frames = rgb.astype(np.uint16) << 8, np.stack([rgb, rgb])
    jpeg = encode("jpeg", rgb)
    arithmetic = jpeg.replace(b"\xff\xc0", b"\xff\xc9", 1)
    j2k: dict[str, Any] = {"codecformat": "j2k"}
    return {
        "jpeg grey": ("jpeg", ic.jpeg8_encode(grey), "grey"),
        "jpeg 12 bits": ("jpeg", ic.jpeg8_encode(deep >> 4, bitspersample=12), "12 bits"),
        "jpeg lossless": ("jpeg", ic.jpeg8_encode(rgb, lossless=True), "SOF3"),
        "jpeg arithmetic": ("jpeg", arithmetic, "SOF9"),
        "jpeg2000 grey": ("jpeg2000", ic.jpeg2k_encode(grey, **j2k), "grey"),
        "jpeg2000 rgba": ("jpeg2000", ic.jpeg2k_encode(rgba, **j2k), "RGBA"),
        "jpeg2000 16 bits": ("jpeg2000", ic.jpeg2k_encode(deep, **j2k), "16 bits"),
        "jpeg2000 signed": ("jpeg2000", ic.jpeg2k_encode(rgb.view("i1"), **j2k), "signed"),
        "jp2 file": ("jpeg2000", ic.jpeg2k_encode(rgb), "JP2"),
        "jpegxl grey": ("jpegxl", ic.jpegxl_encode(grey), "grey"),
        "jpegxl rgba": ("jpegxl", ic.jpegxl_encode(rgba), "RGBA"),
        "jpegxl 16 bits": ("jpegxl", ic.jpegxl_encode(deep), "16 bits"),
        "jpegxl float": ("jpegxl", ic.jpegxl_encode(rgb / np.float32(255)), "float"),
        "jpegxl animation": ("jpegxl", ic.jpegxl_encode(frames), "animation"),
        "avif grey": ("avif", ic.avif_encode(grey), "grey"),
        "avif rgba": ("avif", ic.avif_encode(rgba), "alpha"),
        "avif 10 bits": ("avif", ic.avif_encode(deep >> 6, bitspersample=10), "10 bits"),
        "avif sequence": ("avif", ic.avif_encode(frames), "sequence"),
        "webp rgba lossless": ("webp", ic.webp_encode(rgba), "RGBA"),
        "webp rgba lossy": ("webp", ic.webp_encode(rgba, level=50, lossless=False), "RGBA"),
        "webp animation": ("webp", webp_extended(encode("webp", rgb), flags=2), "animation"),
    }


def webp_extended(simple: bytes, flags: int, height: int = 20, width: int = 30) -> bytes:
    """A WebP with a VP8X chunk before the frame of a simple one."""
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<II", 10, flags) + canvas + simple[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


FOREIGN = foreign()


@pytest.mark.parametrize("case", FOREIGN)
def test_other_kinds_are_refused_by_name(case: str) -> None:
    name, stream, message = FOREIGN[case]
    for action in (REFERENCE_CODECS[name].probe, REFERENCE_CODECS[name].decode):
        with pytest.raises(UnsupportedError, match=message):
            action(stream)


def test_jpegxl_containers_are_read() -> None:
    image = picture(21, 40)
    stream = imagecodecs.jpegxl_encode(image, lossless=True, usecontainer=True)
    assert stream[4:8] == b"JXL "
    np.testing.assert_array_equal(decode("jpegxl", stream), image)
    transcoded = imagecodecs.jpegxl_encode_jpeg(encode("jpeg", image, subsampling="444"))
    info = REFERENCE_CODECS["jpegxl"].probe(transcoded)
    assert (info.height, info.width) == (21, 40)
    assert decode("jpegxl", transcoded).shape == image.shape


def test_jpegxl_partial_codestream_boxes() -> None:
    image = picture(21, 40)
    bare = imagecodecs.jpegxl_encode(image, lossless=True)
    head = imagecodecs.jpegxl_encode(image, lossless=True, usecontainer=True)
    start = head[: 12 + int.from_bytes(head[12:16], "big")]  # signature and file type
    parts = [struct.pack(">I", 0) + bare[:1], struct.pack(">I", 0x80000001) + bare[1:]]
    stream = start + b"".join(struct.pack(">I", 8 + len(p)) + b"jxlp" + p for p in parts)
    np.testing.assert_array_equal(decode("jpegxl", stream), image)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_jpegxl_probe_and_decode_agree_on_turned_images(orientation: int) -> None:
    jpeg = encode("jpeg", picture(24, 40))
    entry = struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    exif = b"\xff\xe1" + struct.pack(">H", 8 + len(entry)) + b"Exif\0\0" + entry
    stream = imagecodecs.jpegxl_encode_jpeg(jpeg[:2] + exif + jpeg[2:])
    info = REFERENCE_CODECS["jpegxl"].probe(stream)
    assert (info.height, info.width) == ((40, 24) if orientation >= 5 else (24, 40))
    assert decode("jpegxl", stream).shape == (info.height, info.width, 3)


def test_bytes_after_a_jpeg_are_ignored() -> None:
    """TIFF tiles are padded to an even length."""
    stream = encode("jpeg", picture(24, 24))
    np.testing.assert_array_equal(decode("jpeg", stream + b"\0\0"), decode("jpeg", stream))


def test_extended_webp_is_read() -> None:
    simple = encode("webp", picture(20, 30))
    np.testing.assert_array_equal(decode("webp", webp_extended(simple, 0)), decode("webp", simple))
    with pytest.raises(FormatError, match="canvas"):
        decode("webp", webp_extended(simple, 0, height=21))


# -- bytes from strangers --


@pytest.mark.parametrize("lossless", [False, True], ids=["lossy", "lossless"])
@pytest.mark.parametrize("name", NAMES)
def test_every_truncation_is_named(name: str, lossless: bool) -> None:
    if name == "jpeg" and lossless:
        pytest.skip("jpeg has no lossless mode")
    stream = encode(name, picture(23, 37), lossless=lossless, **FAST.get(name, {}))
    for length in range(len(stream)):
        with pytest.raises(FormatError) as caught:
            decode(name, stream[:length])
        # the first bytes of a header may look like no stream at all
        if length >= 16:
            assert isinstance(caught.value, TruncatedError), (length, caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_large_streams_cut_anywhere(name: str, tissue: Image) -> None:
    stream = encode(name, tissue, **FAST.get(name, {}))
    for length in {*range(0, len(stream), 997), len(stream) - 3, len(stream) - 1}:
        with pytest.raises(FormatError):
            wsicodec.decode(stream[:length])


@pytest.mark.parametrize("name", NAMES)
def test_garbage_is_refused(name: str) -> None:
    codec = REFERENCE_CODECS[name]
    rng = np.random.default_rng(3)
    head = encode(name, picture(8, 8))
    for count in (0, 1, 3, 12, 100, 5000):
        noise = rng.bytes(count)
        assert not codec.check(b"\x00" + noise)
        for data in (noise, head[:2] + noise):
            with pytest.raises(WsicodecError):
                codec.decode(data)
            with contextlib.suppress(WsicodecError):  # two bytes and noise are a JPEG XL header
                assert codec.probe(data).height <= MAX_SIDE
        # a whole header before noise may decode to some image
        for length in (12, 40):
            with contextlib.suppress(WsicodecError):
                assert decode(name, head[:length] + noise).shape == (8, 8, 3)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_streams_never_crash(name: str) -> None:
    """Bytes changed at random: an image of the announced size, or a named error."""
    rng = np.random.default_rng(11)
    codec = REFERENCE_CODECS[name]
    stream = encode(name, picture(23, 37), **FAST.get(name, {}))
    outcomes = set()
    for _ in range(400):
        damaged = bytearray(stream)
        for _ in range(rng.integers(1, 5)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        try:
            info = codec.probe(bytes(damaged))
            image = codec.decode(bytes(damaged))
        except WsicodecError:
            outcomes.add("error")
        else:
            assert image.shape == (info.height, info.width, 3)
            outcomes.add("image")
    assert "error" in outcomes


def bits_of(*fields: tuple[int, int]) -> bytes:
    """Little-endian bits of (value, count) fields, as in JPEG XL headers."""
    number = position = 0
    for value, count in fields:
        number |= value << position
        position += count
    return number.to_bytes(position // 8 + 1, "little")


def replaced(stream: bytes, offset: int, new: bytes) -> bytes:
    return stream[:offset] + new + stream[offset + len(new) :]


def oversize() -> dict[str, tuple[str, bytes]]:
    """Headers that announce more than MAX_SIDE; nothing else of the streams is wrong."""
    image = picture(16, 24)
    jpeg, j2k, avif = (encode(name, image) for name in ("jpeg", "jpeg2000", "avif"))
    webp, webp_lossless = encode("webp", image), encode("webp", image, lossless=True)
    sof, ispe, vp8 = jpeg.index(b"\xff\xc0"), avif.index(b"ispe"), webp.index(b"\x9d\x01\x2a")
    one = b"\x00\x00\x00\x01"
    return {
        "jpeg": ("jpeg", replaced(jpeg, sof + 5, b"\xff\xff\xff\xff")),
        "jpeg just above": ("jpeg", replaced(jpeg, sof + 5, struct.pack(">H", MAX_SIDE + 1))),
        "jpeg2000": ("jpeg2000", replaced(j2k, 8, b"\xff\xff\xff\xff" * 2)),
        "jpeg2000 tiles of one pixel": (
            "jpeg2000",
            replaced(j2k, 8, struct.pack(">IIIIII", MAX_SIDE, MAX_SIDE, 0, 0, 1, 1)),
        ),
        "jpeg2000 far from its grid": (
            "jpeg2000",
            replaced(j2k, 8, b"\xff\xff\xff\xff" * 2 + b"\xff\xff\xff\xf0" * 2 + one * 2),
        ),
        "jpegxl": ("jpegxl", b"\xff\x0a" + bits_of((0, 1), (3, 2), (2**30 - 1, 30), (7, 3))),
        "jpegxl wide": ("jpegxl", b"\xff\x0a" + bits_of((0, 1), (1, 2), (4095, 13), (7, 3))),
        "avif": ("avif", replaced(avif, ispe + 8, b"\x00\xff\xff\xff" * 2)),
        "webp": ("webp", replaced(webp, vp8 + 3, b"\xff\x3f\xff\x3f")),
        "webp lossless": ("webp", replaced(webp_lossless, 21, b"\xff\xff\xff\x0f")),
        "webp canvas": ("webp", webp_extended(webp, 0, 2**24, 2**24)),
    }


OVERSIZE = oversize()


@pytest.mark.parametrize("case", OVERSIZE)
def test_oversize_headers_allocate_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, stream = OVERSIZE[case]

    def unreachable(codec: object) -> None:
        raise AssertionError("the library must not see this stream")

    monkeypatch.setattr(reference, "_imagecodecs", unreachable)
    for action in (REFERENCE_CODECS[name].probe, REFERENCE_CODECS[name].decode):
        tracemalloc.start()
        try:
            with pytest.raises(LimitError):
                action(stream)
            assert tracemalloc.get_traced_memory()[1] < 100_000
        finally:
            tracemalloc.stop()


def test_jpeg2000_in_too_many_pieces_is_refused() -> None:
    stream = encode("jpeg2000", picture(64, 64))
    cod = stream.index(b"\xff\x52")
    layers = replaced(stream, cod + 6, b"\xff\xff")
    with pytest.raises(LimitError, match="packets"):
        decode("jpeg2000", replaced(layers, cod + 14, b"\x00" * 4))


def test_jpeg_with_endless_scans_is_refused() -> None:
    stream = encode("jpeg", picture(16, 16))
    sos = stream.index(b"\xff\xda")
    with pytest.raises(LimitError, match="scans"):
        decode("jpeg", stream[:sos] + stream[sos:-2] * 200 + b"\xff\xd9")


def test_avif_frame_must_have_the_announced_size() -> None:
    """A small size in the container, a large frame in the data: the decoder would allocate it."""
    stream = encode("avif", picture(64, 64))
    ispe = stream.index(b"ispe")
    small = replaced(stream, ispe + 8, struct.pack(">II", 8, 8))
    assert REFERENCE_CODECS["avif"].probe(small).height == 8
    with pytest.raises(FormatError, match="holds a frame of 64 x 64"):
        decode("avif", small)


def test_payload_of_another_size_is_refused() -> None:
    image = picture(16, 24)
    stream = encode("jpegxl", image)
    np.testing.assert_array_equal(
        decode_payload("jpegxl", stream, 16, 24), decode("jpegxl", stream)
    )
    with pytest.raises(FormatError, match="holds a jpegxl stream of 24 x 16"):
        decode_payload("jpegxl", stream, 24, 16)


def test_threads_share_a_codec() -> None:
    from concurrent.futures import ThreadPoolExecutor

    images = [picture(40, 56, seed) for seed in range(8)]
    for name in NAMES:
        alone = [encode(name, image, **FAST.get(name, {})) for image in images]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda i, n=name: encode(n, i, **FAST.get(n, {})), images))
            decoded = list(pool.map(lambda s, n=name: decode(n, s), alone))
        assert together == alone
        for stream, image in zip(alone, decoded, strict=True):
            np.testing.assert_array_equal(decode(name, stream), image)
