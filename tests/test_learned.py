"""The learned codec through its public functions, with the model that ships."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wsicodec
from wsicodec.bitstream import HEADER_BYTES, LEARNED_BYTES, parse
from wsicodec.codec.adaptive import adaptive_steps
from wsicodec.codec.options import TUNES
from wsicodec.metrics import psnr, ssim

QUALITIES = (1, 10, 30, 50, 70, 85, 95, 100)


def test_roundtrip_looks_like_the_image(pixels: np.ndarray) -> None:
    image = pixels[:256, :256]
    data = wsicodec.encode(image)
    decoded = wsicodec.decode(data)
    assert decoded.shape == image.shape and decoded.dtype == np.uint8
    assert len(data) < image.size / 8
    assert ssim(image, decoded) > 0.9


def test_quality_is_monotone_in_bytes_and_psnr(pixels: np.ndarray) -> None:
    image = pixels[:256, :256]
    for modes in ("auto", "learned"):
        tiles = [wsicodec.encode(image, quality=q, modes=modes) for q in QUALITIES]
        sizes = [len(t) for t in tiles]
        values = [psnr(image, wsicodec.decode(t)) for t in tiles]
        assert sizes == sorted(sizes) and values == sorted(values)
    assert len(set(sizes)) == len(sizes)
    assert values[-1] > 46  # archive rates have no ceiling


@pytest.mark.parametrize(
    "size",
    [
        (1, 1), (1, 37), (16, 16), (17, 31), (33, 64), (255, 257), (512, 512), (513, 530),
        (16, 80), (96, 16), (32, 16), (16, 32),  # one row or column of positions
    ],
)  # fmt: skip
def test_any_size(pixels: np.ndarray, size: tuple[int, int]) -> None:
    image = pixels[: size[0], : size[1]]
    decoded = wsicodec.decode(wsicodec.encode(image, quality=90))
    assert decoded.shape == image.shape
    assert psnr(image, decoded) > 30


@settings(max_examples=25)
@given(rows=st.integers(1, 48), columns=st.integers(1, 48), seed=st.integers(0, 2**32 - 1),
       quality=st.integers(1, 100))  # fmt: skip
def test_noise_of_any_size_decodes_to_its_size(
    rows: int, columns: int, seed: int, quality: int
) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), np.uint8)
    assert wsicodec.decode(wsicodec.encode(image, quality=quality)).shape == image.shape


def test_encoding_and_decoding_are_deterministic(pixels: np.ndarray) -> None:
    image = pixels[:100, :200]
    tiles = {wsicodec.encode(image) for _ in range(3)}
    assert len(tiles) == 1
    tile = tiles.pop()
    first = wsicodec.decode(tile)
    assert all((wsicodec.decode(tile) == first).all() for _ in range(3))


def test_strided_input_is_coded_like_its_copy(pixels: np.ndarray) -> None:
    view = pixels[:128:2, 200:72:-1]
    assert wsicodec.encode(view) == wsicodec.encode(view.copy())


def test_constant_tiles_take_21_bytes() -> None:
    image = np.full((256, 256, 3), (243, 238, 245), np.uint8)
    data = wsicodec.encode(image)
    assert len(data) == 21
    np.testing.assert_array_equal(wsicodec.decode(data), image)


def test_lossless_is_exact(pixels: np.ndarray) -> None:
    image = pixels[:64, :80]
    np.testing.assert_array_equal(wsicodec.decode(wsicodec.encode(image, lossless=True)), image)


def test_probe_tells_what_was_asked(pixels: np.ndarray) -> None:
    for quality in (1, 70, 100):
        info = wsicodec.probe(wsicodec.encode(pixels[:40, :50], quality=quality))
        assert (info.codec, info.mode, info.height, info.width) == ("learned", "learned", 40, 50)
        assert info.quality == quality and info.model_name == "he-fast"


def test_overhead_is_24_bytes_and_one_for_a_tilt(pixels: np.ndarray) -> None:
    assert HEADER_BYTES + LEARNED_BYTES == 24
    for tune in TUNES:
        data = wsicodec.encode(pixels[:64, :64], tune=tune)
        tile = parse(data)
        assert tile.learned is not None
        assert len(data) - len(tile.payload) == 24 + (tile.learned.tilt > 0)


def test_batches_decode_like_single_tiles(pixels: np.ndarray) -> None:
    same = [wsicodec.encode(pixels[i : i + 64, :64]) for i in range(0, 320, 64)]
    batch = wsicodec.decode_batch(same, threads=3)
    assert isinstance(batch, np.ndarray) and batch.shape == (5, 64, 64, 3)
    for one, tile in zip(batch, same, strict=True):
        np.testing.assert_array_equal(one, wsicodec.decode(tile))
    out = np.empty_like(batch)
    assert wsicodec.decode_batch(same, out=out) is out
    mixed = wsicodec.decode_batch([*same, wsicodec.encode(pixels[:10, :20])])
    assert isinstance(mixed, list) and mixed[-1].shape == (10, 20, 3)
    assert len(wsicodec.decode_batch([])) == 0


def test_out_must_fit(pixels: np.ndarray) -> None:
    tile = wsicodec.encode(pixels[:32, :32])
    out = np.empty((32, 32, 3), np.uint8)
    assert wsicodec.decode(tile, out=out) is out
    for bad in (np.empty((32, 31, 3), np.uint8), np.empty((32, 32, 3), np.int16)):
        with pytest.raises(wsicodec.SettingsError):
            wsicodec.decode(tile, out=bad)


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (np.zeros((8, 8, 3), np.uint16), wsicodec.UnsupportedError),
        (np.zeros((8, 8, 4), np.uint8), wsicodec.UnsupportedError),
        (np.zeros((8, 8), np.uint8), wsicodec.UnsupportedError),
        (np.zeros((8, 8, 1), np.uint8), wsicodec.UnsupportedError),
        (np.zeros((0, 8, 3), np.uint8), wsicodec.LimitError),
        (np.zeros((4097, 1, 3), np.uint8), wsicodec.LimitError),
    ],
)
def test_images_that_are_not_rgb_are_refused_by_name(image: np.ndarray, error: type) -> None:
    with pytest.raises(error):
        wsicodec.encode(image)


@pytest.mark.parametrize(
    "arguments",
    [{"quality": 0}, {"quality": 101}, {"quality": 7.5}, {"quality": True}, {"codec": "gif"},
     {"tune": "speed"}, {"nonsense": 1}],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(pixels: np.ndarray, arguments: dict) -> None:
    with pytest.raises(wsicodec.SettingsError):
        wsicodec.encode(pixels[:16, :16], **arguments)


def test_unknown_model_is_refused_by_name(pixels: np.ndarray) -> None:
    with pytest.raises(wsicodec.UnknownModelError):
        wsicodec.encode(pixels[:16, :16], model="he-none")


def test_uniform_steps_win_psnr_and_adaptive_steps_win_ssim(pixels: np.ndarray) -> None:
    image = pixels[:256, :256]

    def curve(tune: str) -> list[tuple[float, float, float]]:
        points = []
        for q in (40, 50, 60, 70, 80):
            tile = wsicodec.encode(image, quality=q, tune=tune)
            decoded = wsicodec.decode(tile)
            points.append(
                (np.log(len(tile)), psnr(image, decoded), -np.log(1 - ssim(image, decoded)))
            )
        return points

    a, b = curve("ssim"), curve("psnr")
    at = np.mean([[p[0] for p in a], [p[0] for p in b]])
    value = lambda c, k: np.interp(at, [p[0] for p in c], [p[k] for p in c])  # noqa: E731
    assert value(b, 1) > value(a, 1)
    assert value(a, 2) > value(b, 2)


def test_steps_are_finer_in_flat_areas() -> None:
    rng = np.random.default_rng(0)
    image = np.full((32, 64, 3), 200, np.float32)
    image[:, 32:] += rng.normal(0, 40, (32, 32, 1))
    steps = adaptive_steps(image, 0.7)
    assert steps.shape == (1, 2)
    assert steps[0, 0] > 0 > steps[0, 1]
    assert not adaptive_steps(image, 0).any()


def test_default_quality_keeps_ssim_on_tissue() -> None:
    """The promise of quality 70, on images of sources that the model never saw."""
    import os
    from pathlib import Path

    import imagecodecs

    folder = Path(os.environ.get("WSICODEC_DATA", "../shared/data")) / "val"
    files = sorted(folder.glob("*"))
    if not files:
        pytest.skip(f"no validation images in {folder}")
    values = []
    for file in files:
        image = imagecodecs.imread(file)[..., :3]
        for y in range(0, image.shape[0] - 255, 256):
            for x in range(0, image.shape[1] - 255, 256):
                tile = np.ascontiguousarray(image[y : y + 256, x : x + 256])
                values.append(ssim(tile, wsicodec.decode(wsicodec.encode(tile))))
    assert np.mean(values) >= 0.95
