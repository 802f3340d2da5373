"""The linear transform: turned colours, lapped blocks, cosines, and the way back."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsicodec.codec.analysis import bands_of
from wsicodec.codec.cell import STEPS, CellShape
from wsicodec.codec.colours import best_turn, rotation
from wsicodec.codec.cosine import cosines
from wsicodec.codec.lapping import border_matrix
from wsicodec.codec.pixels import brush_of, colours_of, paint
from wsicodec.models.decoder import DecoderModel
from wsicodec.models.store import decoder_of_prefix, find_model

turns = st.tuples(*[st.integers(-128, 127)] * 3)


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    record = find_model("he-fast")
    return decoder_of_prefix(bytes.fromhex(record.digest)[:4])


@given(turns)
def test_a_rotation_is_one(turn: tuple[int, int, int]) -> None:
    matrix = rotation(turn)
    assert np.allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(matrix) == pytest.approx(1)


def test_angles_are_those_of_the_format() -> None:
    c, s = np.cos(np.pi / 256 * 10), np.sin(np.pi / 256 * 10)
    assert np.allclose(rotation((10, 0, 0)), [[c, s, 0], [-s, c, 0], [0, 0, 1]])
    assert np.allclose(rotation((0, 10, 0)), [[c, 0, s], [0, 1, 0], [-s, 0, c]])
    assert np.allclose(rotation((0, 0, 10)), [[1, 0, 0], [0, c, s], [0, -s, c]])
    a, b, third = (rotation(t) for t in ((7, 0, 0), (0, -90, 0), (0, 0, 127)))
    assert np.allclose(rotation((7, -90, 127)), third @ b @ a)


def bits(covariance: np.ndarray, turn: tuple[int, int, int], step: float) -> float:
    """Of normal planes after a turn."""
    matrix = rotation(turn)
    left = np.diagonal(matrix @ covariance @ matrix.T, axis1=1, axis2=2)
    return float(np.log2(1 + left / (0.2 * step**2)).sum())


@settings(max_examples=60)
@given(turns, st.integers(0, 1000))
def test_the_best_turn_is_none_that_is_worse(turn: tuple[int, int, int], seed: int) -> None:
    spread = 10.0 ** np.random.default_rng(seed).uniform(0, 4, (60, 3))
    matrix = rotation(turn)
    covariance = matrix.T @ (spread[:, :, None] * np.eye(3)) @ matrix
    best = best_turn(covariance, 18.0)
    assert bits(covariance, best, 18.0) <= bits(covariance, (0, 0, 0), 18.0) + 1e-6
    for k in range(3):  # nor does a small change help
        for way in (-1, 1):
            near = list(best)
            near[k] = (near[k] + way + 128) % 256 - 128
            assert bits(covariance, tuple(near), 18.0) >= bits(covariance, best, 18.0) - 1e-6


@settings(max_examples=40)
@given(st.tuples(*[st.integers(-40, 40)] * 3), st.integers(0, 1000))
def test_the_best_turn_takes_stains_apart(turn: tuple[int, int, int], seed: int) -> None:
    """Planes as tissue has them, luma far ahead, are found again after a turn."""
    rng = np.random.default_rng(seed)
    spread = 10.0 ** (rng.uniform(1, 3, (120, 1)) + np.array([1.0, -0.2, -1.0]))
    matrix = rotation(turn)
    covariance = matrix.T @ (spread[:, :, None] * np.eye(3)) @ matrix
    best = best_turn(covariance, 18.0)
    assert bits(covariance, best, 18.0) <= bits(covariance, turn, 18.0) + 1


def test_independent_planes_stay() -> None:
    spread = np.array([[900.0, 50, 20], [400, 30, 10], [90, 8, 3]])
    assert best_turn(spread[:, :, None] * np.eye(3), 10.0) == (0, 0, 0)


def test_degenerate_colours_are_no_obstacle() -> None:
    for covariance in (np.zeros((255, 3, 3)), np.full((255, 3, 3), 1e30), np.ones((255, 3, 3))):
        assert all(-128 <= angle <= 127 for angle in best_turn(covariance, 1.0))


def test_cosines_are_orthonormal_and_rise_in_frequency() -> None:
    matrix = cosines().astype(float)
    assert np.allclose(matrix @ matrix.T, np.eye(16), atol=1e-6)
    changes = (np.diff(np.sign(matrix), axis=1) != 0).sum(1)
    assert changes.tolist() == list(range(16))


def test_the_border_matrix_is_the_formats_formula(model: DecoderModel) -> None:
    turn = model.lapping.astype(float)
    row = np.random.default_rng(0).normal(size=16)
    a, b = row[7::-1], row[8:]
    t = (turn @ (a - b) - (a - b)) / 2
    expected = np.concatenate([(a + t)[::-1], b - t])
    assert np.allclose(row @ border_matrix(model.lapping), expected, atol=1e-6)
    there = border_matrix(np.ascontiguousarray(model.lapping.T)).astype(float)
    assert np.allclose(there @ border_matrix(model.lapping), np.eye(16), atol=1e-6)


@settings(max_examples=25)
@given(st.integers(1, 70), st.integers(1, 70), turns, st.integers(0, 99))
def test_pixels_come_back(
    model: DecoderModel, height: int, width: int, turn: tuple[int, int, int], seed: int
) -> None:
    """Without quantisation the two linear paths are inverses, for every size and turn."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    shape = CellShape(height, width)
    rows, columns = shape.latents
    y = bands_of(pixels, shape, model).latents(model, turn)
    contexts = model.architecture.context_channels
    nothing = np.full((rows * columns, contexts), 128, np.uint8)
    out = np.empty((height, width, 3), np.uint8)
    gains = np.full(rows * columns, 100, np.uint8)
    paint(
        y, nothing, contexts, gains, STEPS, columns, brush_of(model).arguments(),
        colours_of(model, turn), out.reshape(height, -1),
    )  # fmt: skip
    assert np.array_equal(out, pixels)


def test_edges_repeat_beyond_the_cell(model: DecoderModel) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 24, 3)).astype(np.uint8)
    wide = np.pad(pixels, ((0, 8), (0, 8), (0, 0)), mode="edge")
    small = bands_of(pixels, CellShape(40, 24), model)
    assert np.allclose(small.values, bands_of(wide, CellShape(48, 32), model).values, atol=1e-3)


def test_the_covariance_is_that_of_the_planes(model: DecoderModel) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (64, 48, 3)).astype(np.uint8)
    bands = bands_of(pixels, CellShape(64, 48), model)
    planes = bands.values.reshape(3, 256, -1).transpose(1, 0, 2)[1:].astype(float)
    expected = np.stack([np.cov(p, bias=True) for p in planes])
    assert np.allclose(bands.covariance, expected, rtol=1e-3, atol=1e-2)


def test_corrections_are_those_of_leading_latents(model: DecoderModel) -> None:
    """A correction of 32 / 64 of a step is half a step of the latent."""
    shape, gain, c = CellShape(32, 32), 60, 5
    contexts = model.architecture.context_channels
    y = np.zeros((model.architecture.channels, 4), np.float32)
    correction = np.full((4, contexts), 128, np.uint8)
    gains = np.full(4, gain, np.uint8)

    def picture() -> np.ndarray:
        out = np.empty((shape.height, shape.width, 3), np.uint8)
        paint(
            y, correction, contexts, gains, STEPS, 2, brush_of(model).arguments(),
            colours_of(model, (3, 4, 5)), out.reshape(shape.height, -1),
        )  # fmt: skip
        return out

    correction[2, c] = 128 + 32
    corrected = picture()
    correction[2, c] = 128
    y[c, 2] = STEPS[gain] / 2
    assert np.array_equal(corrected, picture())
    y[c, 2] = 0
    assert not np.array_equal(corrected, picture())


THREADS = """
import threading
import os
import subprocess
import sys

import numpy as np
from wsicodec.codec.analysis import bands_of
from wsicodec.codec.cell import STEPS, CellShape
from wsicodec.codec.pixels import brush_of, colours_of, paint
from wsicodec.models.store import decoder_of_prefix, find_model

model = decoder_of_prefix(bytes.fromhex(find_model("he-fast").digest)[:4])
contexts = model.architecture.context_channels
pixels = np.random.default_rng(0).integers(0, 256, (96, 80, 3)).astype(np.uint8)
shape, gains = CellShape(96, 80), np.full(30, 100, np.uint8)
nothing = np.full((30, contexts), 128, np.uint8)
wrong = []

def work():
    for _ in range(300):
        y = bands_of(pixels, shape, model).latents(model, (9, 8, 7))
        out = np.empty((96, 80, 3), np.uint8)
        paint(
            y, nothing, contexts, gains, STEPS, 5, brush_of(model).arguments(),
            colours_of(model, (9, 8, 7)), out.reshape(96, -1),
        )
        if not np.array_equal(out, pixels):
            wrong.append(1)

work()
threads = [threading.Thread(target=work) for _ in range(4)]
for t in threads:
    t.start()
for t in threads:
    t.join()
print("wrong", len(wrong))
"""


def test_scratch_memory_is_no_other_threads() -> None:
    """Threads that share one heap: memory given back too early would be another's by then."""
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", THREADS]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "wrong 0"), done.stderr[-2000:]
