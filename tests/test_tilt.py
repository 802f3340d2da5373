"""Tilts: steps of channels that move against one another, tile by tile."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import wsicodec
from wsicodec.bitstream import MAX_TILT, parse
from wsicodec.codec.network import Search, TileEncoder, decode_tile, usual_search
from wsicodec.codec.options import TUNES
from wsicodec.errors import ModelError
from wsicodec.metrics import psnr
from wsicodec.models import container
from wsicodec.models.decoder import DecoderModel, load_decoder
from wsicodec.models.encoder import EncoderModel, gain_beside, load_encoder
from wsicodec.models.factors import MAX_FACTOR, TILT_PEAK, Factors, gain_of_level, tilted
from wsicodec.models.store import encoder_of, find_model

SHARES = (0, 1, 7, 8, 16)


def shipped() -> tuple[container.ModelFile, container.ModelFile]:
    record = find_model("he-fast")
    assert record.encoder_path is not None
    return (
        container.parse(record.path.read_bytes()),
        container.parse(record.encoder_path.read_bytes()),
    )


def rewritten(file: container.ModelFile, head: dict[str, Any], tensors: dict[str, Any]) -> bytes:
    header = {k: v for k, v in file.header.items() if k != "sections"} | head
    return container.pack(header, dict(file.graphs), {**file.tensors, **tensors})


def with_tilt(tilt: np.ndarray, **arguments: Any) -> DecoderModel:
    return load_decoder(rewritten(shipped()[0], {}, {"tilt": tilt.astype(np.int8)}), **arguments)


def tilt_of(seed: int) -> np.ndarray:
    """Finer and coarser, as far as a tilt goes."""
    tilt = np.random.default_rng(seed).integers(-TILT_PEAK, TILT_PEAK + 1, 768)
    tilt[:2] = TILT_PEAK, -TILT_PEAK
    return tilt


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    return with_tilt(tilt_of(1))


@pytest.fixture(scope="module")
def plain_program(model: DecoderModel) -> DecoderModel:
    """The same, without compiled programs."""
    return with_tilt(tilt_of(1), fused=False)


@pytest.fixture(scope="module")
def encoder() -> EncoderModel:
    return encoder_of(find_model("he-fast"))[1]


@pytest.mark.parametrize("share", SHARES)
def test_both_ways_to_run_networks_agree(
    model: DecoderModel, plain_program: DecoderModel, encoder: EncoderModel, tissue: Any, share: int
) -> None:
    image = tissue(90, 75, seed=share)
    search = Search(0.4, 10.0, tilt=share)
    coded = TileEncoder(image, model, encoder).encode(100, search)
    again = TileEncoder(image, plain_program, encoder).encode(100, search)
    assert coded.data == again.data
    assert parse(coded.data).learned == coded.tile.learned
    assert coded.tile.learned is not None and coded.tile.learned.tilt == share
    for decoder in (model, plain_program):
        np.testing.assert_array_equal(decode_tile(coded.tile, decoder), coded.pixels)
    assert psnr(image, coded.pixels) > 25


def test_without_a_tilt_all_is_as_before(model: DecoderModel, tissue: Any) -> None:
    image = tissue(64, 64)
    record = find_model("he-fast")
    assert record.encoder_path is not None
    decoder, encoder = encoder_of(record)[0], load_encoder(record.encoder_path.read_bytes())
    encoder.stage_gain[:] = 0
    search = Search(0.4, 10.0, tilt=0)
    ours = TileEncoder(image, model, encoder).encode(60, search)
    # gains are compared at the encoder's own tilt, which differs between the models
    base = gain_beside(decoder, encoder, 0) - gain_beside(model, encoder, 0)
    theirs = TileEncoder(image, decoder, encoder).encode(60 - base, search)
    assert ours.tile.payload == theirs.tile.payload


@given(st.integers(1, MAX_FACTOR - 1), st.integers(-TILT_PEAK, TILT_PEAK), st.integers(0, MAX_TILT))
def test_factors_are_rounded_products(factor: int, tilt: int, share: int) -> None:
    ones = np.array([factor], np.int64)
    plain = Factors(ones, ones, np.ones(1, np.float32), np.zeros(1, np.int64))
    found = tilted(plain, np.array([tilt], np.int8), share)
    shift = (share * tilt + 8) // 16
    assert int(found.shift[0]) == shift
    assert found.inverse_gain[0] == pytest.approx(2 ** (-shift / 8), rel=1e-6)
    for value, exponent in ((found.mean, shift), (found.context, -shift)):
        wanted = min(max(Fraction(factor) * Fraction(2 ** (exponent / 8)), 1), MAX_FACTOR - 1)
        # the table of octaves is rounded to 2^-16 of itself
        assert abs(int(value[0]) - wanted) <= Fraction(1, 2) + wanted / 2**15
    if share == 0:
        assert found.plain and int(found.mean[0]) == factor


def test_what_is_not_coded_stays_so(model: DecoderModel) -> None:
    from wsicodec.codec.cell import _shift_classes

    classes = np.tile(np.arange(128, dtype=np.uint8), (5, 1))
    shift = np.array([0, 1, -1, TILT_PEAK, -TILT_PEAK])
    _shift_classes(classes, shift)
    for row, by in zip(classes, shift, strict=True):
        assert row[0] == 0
        assert row[1:].tolist() == [min(max(c + int(by), 0), 127) for c in range(1, 128)]


def test_a_tilt_moves_errors_between_channels(encoder: EncoderModel, tissue: Any) -> None:
    """Luma coarser by an octave: fewer bytes, and more of them for colour."""
    order = load_decoder(find_model("he-fast").path.read_bytes()).order
    model = with_tilt(np.where(order // 256 == 0, -8, 0))
    assert gain_of_level(model.factors[MAX_TILT]) > 0
    image = tissue(96, 96)
    tile = TileEncoder(image, model, encoder)

    def colour_error(coded: Any) -> float:
        apart = coded.pixels.astype(float) - image
        return float(((apart - apart.mean(2, keepdims=True)) ** 2).mean() / (apart**2).mean())

    even, full = (tile.encode(60, Search(0.0, 10.0, tilt=t)) for t in (0, MAX_TILT))
    assert colour_error(full) < colour_error(even)


def test_batches_of_several_tilts_decode_like_single_tiles(pixels: np.ndarray) -> None:
    crops = [np.ascontiguousarray(pixels[y : y + 64, :96]) for y in range(0, 640, 64)]
    tiles = [
        wsicodec.encode(crop, tune=TUNES[i % len(TUNES)], modes="learned")
        for i, crop in enumerate(crops)
    ]
    for threads in (1, 2):
        batch = wsicodec.decode_batch(tiles, threads=threads)
        for image, tile in zip(batch, tiles, strict=True):
            np.testing.assert_array_equal(image, wsicodec.decode(tile))


@pytest.mark.parametrize("value", [TILT_PEAK + 1, -TILT_PEAK - 1, -128])
def test_tilts_beyond_the_range_are_refused(value: int) -> None:
    tilt = np.zeros(768)
    tilt[300] = value
    with pytest.raises(ModelError, match="tilt"):
        with_tilt(tilt)


@pytest.mark.parametrize("value", [-1, 17, 3.0, "8", True, None])
def test_encoders_with_no_proper_tilt_are_refused(value: object) -> None:
    with pytest.raises(ModelError, match="tilt"):
        load_encoder(rewritten(shipped()[1], {"tilt": value}, {}))


def test_an_encoder_brings_its_tilt() -> None:
    encoder = load_encoder(rewritten(shipped()[1], {"tilt": 5}, {}))
    assert usual_search(encoder).tilt == 5
    without = {k: v for k, v in shipped()[1].header.items() if k not in ("sections", "tilt")}
    data = container.pack(without, dict(shipped()[1].graphs), dict(shipped()[1].tensors))
    assert usual_search(load_encoder(data)).tilt == 0


def test_quality_is_told_whatever_the_tilt(pixels: np.ndarray) -> None:
    image = np.ascontiguousarray(pixels[:64, :64])
    for tune in TUNES:
        data = wsicodec.encode(image, quality=70, tune=tune, modes="learned")
        assert wsicodec.probe(data).quality == 70
