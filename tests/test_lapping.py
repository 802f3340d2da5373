"""The filter across block borders: encoders and decoders against docs/format.md, and what pictures
show.

``lapped`` below is the document's formulas, sample by sample in float64. What an encoder's filter
makes of planes is read from the frequencies that it finds. Pictures go through a model of all 768
channels, so that what is lost is lost by rounding alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import pytest
import second_decoder
from hypothesis import example, given, settings
from hypothesis import strategies as st

import wsicodec
from tools import make_conformance
from tools.export.builder import FLOAT, INT8, UINT8, GraphBuilder, grid
from wsicodec.codec.analysis import bands_of
from wsicodec.codec.cell import CellShape
from wsicodec.codec.lapping import border_matrix
from wsicodec.codec.network import Search, TileEncoder, decode_tile, decode_tiles
from wsicodec.models import container
from wsicodec.models.decoder import DecoderModel, load_decoder
from wsicodec.models.encoder import EncoderModel, load_encoder
from wsicodec.models.store import allow_model

FINEST = 255
NEAREST = Search(strength=0.0, lagrange=np.inf)
"""Nearest levels everywhere."""

seeds = st.integers(0, 2**32 - 1)


def lapped_start() -> np.ndarray:
    """(8, 8): the decoder's matrix of the lapped orthogonal transform, Malvar 1989."""
    n = np.arange(8)
    second = np.cos(np.pi * np.outer(n, n + 0.5) / 8) / 2
    second[0] /= np.sqrt(2)
    fourth = np.cos(np.pi * np.outer(n + 0.5, n + 0.5) / 8) / 2
    encoder = (second.T @ fourth)[::-1, ::-1]
    return np.ascontiguousarray(encoder.T, np.float32)


def lapped(image: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """docs/format.md, "Pixels": ``lap`` of (16 R, 16 C, 3), one sample after the other."""

    def along(samples: np.ndarray) -> np.ndarray:
        """The first axis alone."""
        result = samples.copy()
        for border in range(16, len(samples), 16):
            o = [samples[border - 1 - i] - samples[border + i] for i in range(8)]
            for i in range(8):
                t = 0.5 * sum(turn[i, j] * o[j] for j in range(8)) - 0.5 * o[i]
                result[border - 1 - i] = samples[border - 1 - i] + t
                result[border + i] = samples[border + i] - t
        return result

    image, turn = image.astype(np.float64), turn.astype(np.float64)
    return along(along(image.transpose(1, 0, 2)).transpose(1, 0, 2))


@dataclass(frozen=True, eq=False)
class Transform:
    """What an encoder's linear transform reads of a model."""

    lapping: np.ndarray
    colours: np.ndarray
    mean: np.ndarray
    order: np.ndarray


def filtered(image: np.ndarray, lapping: np.ndarray) -> np.ndarray:
    """What an encoder's filter makes of planes (height, width, 3) of integers 0 ... 255: this
    matrix, not its transpose. (16 R, 16 C, 3), whole blocks."""
    height, width, _ = image.shape
    plain = np.eye(3, dtype=np.float32), np.full(3, -128, np.float32), np.arange(768)
    transform = Transform(np.ascontiguousarray(lapping.T, np.float32), *plain)
    return planes_of(image.astype(np.uint8), cast(DecoderModel, transform), height, width)


def planes_of(image: np.ndarray, model: DecoderModel, height: int, width: int) -> np.ndarray:
    """Filtered planes of a cell, (16 R, 16 C, 3), from the frequencies that an encoder finds."""
    shape = CellShape(height, width)
    values = bands_of(image, shape, model).values.astype(np.float64)
    frequencies = values.reshape(3, 16, 16, *shape.latents)
    d = second_decoder.cosines()
    blocks = np.einsum("ui,puwrc,wj->ricjp", d, frequencies, d, optimize=True)
    rows, columns = shape.latents
    return blocks.reshape(16 * rows, 16 * columns, 3)


def drawn(seed: int, rows: int, columns: int) -> np.ndarray:
    """Samples of blocks."""
    return np.random.default_rng(seed).integers(0, 256, (16 * rows, 16 * columns, 3)).astype(float)


# -- the filter --


@settings(max_examples=40)
@given(rows=st.integers(1, 5), columns=st.integers(1, 19), seed=seeds, turn=seeds)
@example(rows=1, columns=1, seed=0, turn=0)
@example(rows=1, columns=9, seed=0, turn=0)
@example(rows=5, columns=1, seed=0, turn=0)
@example(rows=32, columns=32, seed=0, turn=0)
def test_images_are_filtered_as_the_document_says(
    rows: int, columns: int, seed: int, turn: int
) -> None:
    image, matrix = drawn(seed, rows, columns), make_conformance.random_lapping(turn)
    expected = lapped(image, matrix)
    np.testing.assert_allclose(filtered(image, matrix), expected, rtol=0, atol=1e-3)
    whole = second_decoder.lap(image, matrix.astype(np.float64))
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-9)


@settings(max_examples=20)
@given(rows=st.integers(1, 4), columns=st.integers(1, 10), seed=seeds, turn=seeds)
def test_the_transpose_is_the_way_back(rows: int, columns: int, seed: int, turn: int) -> None:
    image = drawn(seed, rows, columns)
    matrix = make_conformance.random_lapping(turn).astype(np.float64)
    there = filtered(image, matrix)
    back = second_decoder.lap(there, matrix.T)
    np.testing.assert_allclose(back, image, rtol=0, atol=1e-3)
    back = second_decoder.lap(filtered(image, matrix.T), matrix)
    np.testing.assert_allclose(back, image, rtol=0, atol=1e-3)
    if rows * columns > 1:
        assert np.abs(there - image).max() > 10
        # nor is it its own way back
        assert np.abs(second_decoder.lap(there, matrix) - image).max() > 10
        # orthogonal: no error grows on its way
        assert (there**2).sum() == pytest.approx((image**2).sum(), rel=1e-4)


def test_what_is_the_same_on_both_sides_of_borders_passes_unchanged() -> None:
    """Constants, and whatever borders mirror: no difference there, none to turn."""
    image = np.broadcast_to([0.0, 127, 255], (48, 80, 3))
    matrix = make_conformance.random_lapping(1)
    np.testing.assert_allclose(filtered(image, matrix), image, rtol=0, atol=1e-3)
    block = drawn(2, 1, 1)
    block = np.concatenate([block, block[::-1], block])
    image = np.concatenate([block, block[:, ::-1], block, block[:, ::-1]], axis=1)
    np.testing.assert_allclose(filtered(image, matrix), image, rtol=0, atol=1e-3)


def test_one_row_or_column_of_blocks_has_borders_one_way() -> None:
    """Lines along a border that is none are filtered each by itself."""
    matrix = make_conformance.random_lapping(5)
    for shape in ((1, 6), (6, 1)):
        image = drawn(4, *shape)
        found = filtered(image, matrix)
        for i in range(16):
            line = np.s_[i : i + 1] if shape[0] == 1 else np.s_[:, i : i + 1]
            alone = np.zeros_like(image)
            alone[line] = image[line]
            np.testing.assert_allclose(filtered(alone, matrix)[line], found[line], atol=1e-3)
    image = drawn(6, 1, 1)
    np.testing.assert_allclose(filtered(image, matrix), image, rtol=0, atol=1e-3)


def test_eight_samples_to_either_side_of_a_border_change_and_no_others() -> None:
    image = np.zeros((16, 48, 3))
    image[3, 13, 1] = 100  # two away from the first border
    found = filtered(image, make_conformance.random_lapping(7))
    changed = np.argwhere(np.abs(found - image) > 1e-3)
    assert set(changed[:, 0]) == {3} and set(changed[:, 2]) == {1}
    assert set(changed[:, 1]) == set(range(8, 24))


def test_the_matrix_of_a_line_is_the_filter() -> None:
    """(16, 16): left of a border the farthest sample comes first."""
    matrix = make_conformance.random_lapping(8)
    line = border_matrix(matrix)
    assert line.shape == (16, 16) and line.dtype == np.float32
    assert line.flags.c_contiguous
    image = drawn(9, 1, 2)
    expected = lapped(image, matrix)[:, 8:24]
    found = np.einsum("rkp,kn->rnp", image[:, 8:24], line.astype(float))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(border_matrix(np.eye(8)), np.eye(16))


# -- encoders: pixels to planes --


@pytest.fixture(scope="module")
def file(vector: Callable[[str], bytes]) -> bytes:
    """The lapped model of the conformance vectors; this process decodes its tiles from now on."""
    data = vector("lapped.wscm")
    allow_model(data)
    return data


@settings(max_examples=30)
@given(height=st.integers(1, 70), width=st.integers(1, 150), seed=seeds)
@example(height=1, width=1, seed=0)
@example(height=16, width=33, seed=0)
@example(height=17, width=16, seed=0)
def test_planes_of_encoders_are_filtered_by_the_transpose(
    file: bytes, height: int, width: int, seed: int
) -> None:
    """The last row and column repeat where blocks reach past the cell, before the filter."""
    model = load_decoder(file, fused=False)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    whole = np.pad(pixels, ((0, -height % 16), (0, -width % 16), (0, 0)), mode="edge")
    planes = (whole - 128.0 - model.mean) @ np.linalg.inv(model.colours.astype(float)).T
    expected = lapped(planes, model.lapping.T)
    larger = np.pad(pixels, ((0, 1), (2, 3), (0, 0)))
    for view in (pixels, np.asfortranarray(pixels), larger[:height, 2 : 2 + width]):
        found = planes_of(view, model, height, width)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)


# -- decoders: tiles to pixels --


@settings(max_examples=25)
@given(
    height=st.integers(1, 70), width=st.integers(1, 180), gain=st.integers(0, 255),
    seed=st.integers(0, 999), turn=st.tuples(*[st.integers(-128, 127)] * 3),
)  # fmt: skip
@example(height=16, width=16 * 9, gain=150, seed=0, turn=(0, 0, 0))
@example(height=16 * 9, width=16, gain=150, seed=0, turn=(-128, 127, -128))
@example(height=33, width=129, gain=255, seed=0, turn=(1, 2, 3))
def test_both_decoders_agree_on_any_size_and_turn(
    file: bytes, height: int, width: int, gain: int, seed: int, turn: Any
) -> None:
    case = make_conformance.Learned(height, width, gain, 2, picture=seed, turns=(turn,))
    data = case.tile(file)
    second = second_decoder.decode(data, [file])
    assert second.free is not None and not second.free.any()
    error = np.abs(wsicodec.decode(data) - second.pixels.astype(int))
    assert error.max() <= 2 and (error > 1).mean() <= 0.001


def test_a_batch_of_lapped_tiles_decodes_like_single_ones(file: bytes) -> None:
    cases = [
        make_conformance.Learned(40, 56, 150, 2, picture=k, turns=((k, -7 * k, 30 * k),))
        for k in range(5)
    ]
    tiles = [case.tile(file) for case in cases]
    batch = wsicodec.decode_batch(tiles, threads=2)
    for one, tile in zip(batch, tiles, strict=True):
        np.testing.assert_array_equal(one, wsicodec.decode(tile))


# -- encoders and decoders: a model of all channels --


def no_layer(outputs: int, inputs: int, value: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weight = np.zeros((outputs, inputs, 1, 1), int)
    return weight, np.full(outputs, value), np.zeros(outputs, int)


def whole_colours() -> np.ndarray:
    """(3, 3): an orthonormal colour space, brightness last."""
    axes = np.array([[1, -1, 0], [1, 1, -2], [1, 1, 1]]) / np.sqrt([[2], [6], [3]])
    return axes.T


def whole_order() -> np.ndarray:
    """(768,): all places, those of low frequencies first, planes mixed."""
    place = np.arange(768)
    return np.argsort(place // 16 % 16 + place % 16 + (place // 256) / 2, kind="stable")


def whole_decoder(lapping: np.ndarray) -> bytes:
    """A decoder model of 768 channels whose networks say the same everywhere."""
    h = GraphBuilder("hyper")
    x = h.integer_conv("z", no_layer(4, 2, 100), (0, 255))
    h.add("DepthToSpace", x, blocksize=2, mode="CRD", output="h")
    x = h.integer_conv("z", no_layer(4, 2, 0), (-48, 48))
    h.add("Cast", h.add("DepthToSpace", x, blocksize=2, mode="CRD"), to=INT8, output="step")
    z = {"z": (FLOAT, grid(2, "z_rows", "z_columns")), "plane": (FLOAT, grid(1))}
    graphs = {"hyper": h.finish(z, {"h": (FLOAT, grid(1)), "step": (INT8, grid(1))})}
    inputs = {"h": (FLOAT, grid(1)), "plane": (FLOAT, grid(1)), "context": (FLOAT, grid(4))}
    for k, count in enumerate((4, 764)):
        seen = dict(list(inputs.items())[: 2 + k])
        s = GraphBuilder(f"stage{k}")
        x = s.add("Concat", *seen, axis=1)
        s.integer_conv(x, no_layer(count, 2 + 4 * k, 40), (0, 127), cast=UINT8, output="class")
        graphs[f"stage{k}"] = s.finish(seen, {"class": (UINT8, grid(count))})
    c = GraphBuilder("chain")
    centre = np.uint8(128)
    x = c.quantised_conv("context", no_layer(4, 5, 0), (-3, centre), (-2, centre))
    c.add("Transpose", x, perm=[0, 2, 3, 1], output="correction")
    graphs["chain"] = c.finish(
        {"context": (UINT8, grid(5))}, {"correction": (UINT8, ["batch", "rows", "columns", 4])}
    )
    architecture = {
        "block": 16, "stages": [[0, 4, 0], [4, 764, 0]], "mean_stages": 0, "context_channels": 4,
        "z_channels": 2, "hyper": 1,
    }  # fmt: skip
    tensors = {
        **container.parse(make_conformance.smallest_decoder()).tensors,
        "z_classes": np.full((256, 2), 16, np.uint8),
        "context_factor": np.full(4, 2**10, np.int32),
        "inverse_gain": np.ones(768, np.float32),
        "order": whole_order().astype(np.uint16),
        "colours": whole_colours().astype(np.float32),
        "mean": np.array([3, -5, 7], np.float32),
        "lapping": np.asarray(lapping, np.float32),
    }
    header = {"kind": "decoder", "name": "whole", "architecture": architecture}
    return container.pack(header, graphs, tensors)


def whole_encoder(decoder: bytes) -> bytes:
    """The plain transform, and hyper-latents of 0."""
    h = GraphBuilder("hyper_analysis")
    x = h.add("Concat", "y", "plane", axis=1)
    weight = h.constant(np.zeros((1, 5, 2, 2), np.float32), "w")
    bias = h.constant(np.zeros(1, np.float32), "b")
    h.add("Conv", x, weight, bias, kernel_shape=[2, 2], strides=[2, 2], output="z")
    y = {"y": (FLOAT, grid(4)), "plane": (FLOAT, grid(1))}
    return container.pack(
        {
            "kind": "encoder", "decoder": hashlib.sha256(decoder).hexdigest(),
            "step_strength": 0.0, "lagrange": 6.0,
        },
        {"hyper_analysis": h.finish(y, {"z": (FLOAT, grid(1, "z_rows", "z_columns"))})},
        {
            "quality_gain": np.linspace(8, 255, 100).astype(np.uint8),
            "stage_gain": np.zeros(2, np.uint8),
        },
    )  # fmt: skip


@cache
def whole(lapping: str) -> tuple[DecoderModel, EncoderModel, bytes]:
    """lapping: none, start, its transpose, or random."""
    turn = {
        "none": np.eye(8), "start": lapped_start(), "transpose": lapped_start().T,
        "random": make_conformance.random_lapping(10),
    }[lapping]  # fmt: skip
    decoder = whole_decoder(turn)
    return load_decoder(decoder), load_encoder(whole_encoder(decoder)), decoder


def coded(image: np.ndarray, lapping: str, gain: int) -> np.ndarray:
    """The image as an encoder and a decoder leave it, int."""
    decoder, encoder, _ = whole(lapping)
    tile = TileEncoder(image, decoder, encoder).encode(gain, NEAREST).tile
    return decode_tile(tile, decoder).astype(int)


def ramp(height: int, width: int) -> np.ndarray:
    """Colours that rise and fall slowly, not in step with blocks."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([40 + 0.9 * x + 0.5 * y, 60 + 1.1 * y, 200 - 0.7 * x], axis=-1)
    assert image.min() >= 0 and image.max() <= 255
    return np.rint(image).astype(np.uint8)


@pytest.mark.parametrize("lapping", ["none", "start", "random"])
@pytest.mark.parametrize(
    "size", [(1, 1), (16, 16), (17, 33), (40, 72), (100, 16), (16, 100), (129, 255)]
)
def test_the_finest_gain_gives_the_image_back(
    tissue: Callable[..., np.ndarray], lapping: str, size: tuple[int, int]
) -> None:
    image = tissue(*size, seed=1)
    assert np.abs(coded(image, lapping, FINEST) - image).max() <= 1


@pytest.mark.parametrize("size", [(530, 20), (24, 545)])
def test_cells_of_a_larger_tile_are_filtered_each_by_itself(
    tissue: Callable[..., np.ndarray], size: tuple[int, int]
) -> None:
    image = tissue(*size, seed=2)
    assert np.abs(coded(image, "random", FINEST) - image).max() <= 1


def test_noise_is_given_back_too_and_by_the_second_decoder() -> None:
    image = np.random.default_rng(11).integers(0, 256, (37, 50, 3), np.uint8)
    decoder, encoder, file = whole("random")
    data = TileEncoder(image, decoder, encoder).encode(FINEST, NEAREST).tile.pack()
    assert np.abs(second_decoder.decode(data, [file]).pixels.astype(int) - image).max() <= 1


def test_an_encoder_without_the_filter_misses() -> None:
    """What the tests above would see of a filter that one side forgot."""
    image = ramp(48, 80)
    plain, encoder, _ = whole("none")
    tile = TileEncoder(image, plain, encoder).encode(FINEST, NEAREST).tile
    decoder, _, file = whole("random")
    learned = tile.learned
    assert learned is not None
    digest = hashlib.sha256(file).digest()[:4]
    wrong = type(tile)(
        tile.mode, tile.height, tile.width, tile.payload,
        dataclasses.replace(learned, model=digest),
    )  # fmt: skip
    outs = [np.empty(image.shape, np.uint8)]
    decode_tiles([wrong], decoder, outs)
    error = np.abs(outs[0].astype(int) - image)
    assert error[8:40, 8:72].max() > 8
    assert error[:8, :8].max() <= 1  # no border is near


def steps_of_error(decoded: np.ndarray, image: np.ndarray) -> tuple[float, float]:
    """Mean step of the error between neighbours: across block borders, and within blocks."""
    error = decoded - image.astype(int)
    found = []
    for axis in (0, 1):
        step = np.abs(np.diff(error, axis=axis)).mean(axis=(1 - axis, 2))
        at_border = np.arange(len(step)) % 16 == 15
        found.append((step[at_border].mean(), step[~at_border].mean()))
    border, within = np.mean(found, axis=0)
    return float(border), float(within)


def test_a_ramp_shows_no_borders_of_blocks() -> None:
    """Plain blocks show theirs at this gain, and so does the filter the wrong way round."""
    image = ramp(96, 112)
    border, within = steps_of_error(coded(image, "start", 64), image)
    assert border < 1.1 * within
    for wrong in ("none", "transpose"):
        border, within = steps_of_error(coded(image, wrong, 64), image)
        assert border > 2 * within


@pytest.mark.parametrize("lapping", ["start", "random"])
@pytest.mark.parametrize("colour", [(128, 128, 128), (0, 0, 0), (243, 238, 245)])
def test_a_flat_tile_stays_flat(lapping: str, colour: tuple[int, int, int]) -> None:
    image = np.full((70, 90, 3), colour, np.uint8)
    for gain in (64, 96, FINEST):
        decoded = coded(image, lapping, gain)
        # a filter that is made for nothing adds up the errors of neighbours
        assert np.abs(decoded - image).max() <= (2 if lapping == "random" else 1)
        border, within = steps_of_error(decoded, image)
        assert border < 0.5 and within < 0.1


def test_tiles_meet_without_a_seam() -> None:
    """Tiles are filtered each by itself: the edge of one is no border, and its error no larger."""
    image = ramp(64, 128)
    halves = [coded(image[:, side], "start", 128) for side in (np.s_[:64], np.s_[64:])]
    error = np.concatenate(halves, axis=1) - image
    assert np.abs(error).max() <= 2
    step = np.abs(np.diff(error, axis=1)).mean(axis=(0, 2))
    assert step[63] < 0.5
    flat = np.full((64, 64, 3), (117, 90, 201), np.uint8)
    assert (coded(flat, "start", 96) == coded(flat[:, :40], "start", 96)[0, 0]).all()


# -- models --


def test_training_and_kernels_filter_alike() -> None:
    """tools.train.lapping's filter, exported as tools.export.model writes it."""
    torch = pytest.importorskip("torch", reason="the train extra is not installed")
    from tools.train.lapping import border_filter, lap, lapped_transform_start, odd_part

    odd = torch.from_numpy(make_conformance.random_lapping(12).astype(np.float64))
    border = border_filter(odd)
    turn = odd_part(border).T.float().numpy()  # tools.export.model.decoder_file
    np.testing.assert_allclose(turn, make_conformance.random_lapping(12).T, atol=1e-6)
    image = drawn(13, 3, 4)
    x = torch.from_numpy(image.transpose(2, 0, 1)).double()
    for matrix, filter_ in ((turn.T, border), (turn, border.T)):  # encoder, decoder
        expected = lap(x, filter_).numpy().transpose(1, 2, 0)
        np.testing.assert_allclose(filtered(image, matrix), expected, rtol=0, atol=1e-3)
    start = odd_part(border_filter(lapped_transform_start())).T.numpy()
    np.testing.assert_allclose(start, lapped_start(), atol=1e-6)
