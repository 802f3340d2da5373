"""From pixels to latents: the encoder's blocks and its analysis network. Decoders know nothing of
this; another analysis makes other symbols, never another format."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wsicodec.codec.cell import BLOCK, SAMPLES, STEPS, CellShape
from wsicodec.codec.lapping import lap_image, line_weights
from wsicodec.codec.protocol import Image
from wsicodec.entropy.compiled import compiled
from wsicodec.models.decoder import DecoderModel
from wsicodec.models.encoder import EncoderModel

Floats = npt.NDArray[np.float32]


@compiled
def _spread(pixels, image):
    """Pixels (height, width, 3) less 128 into ``image`` (rows * 16, columns * 48) float32, whose
    further rows and columns repeat the last."""
    height, width = pixels.shape[0], pixels.shape[1]
    for y in range(image.shape[0]):
        source, target = pixels[min(y, height - 1)], image[y]
        for x in range(width):
            for c in range(3):
                target[3 * x + c] = np.float32(source[x, c]) - np.float32(128)
        for x in range(width, len(target) // 3):
            for c in range(3):
                target[3 * x + c] = target[3 * width - 3 + c]


@compiled
def _turn(image, blocks):
    """An image (rows * 16, columns * 48) to ``blocks`` (768, rows * columns), samples of a block in
    (row, column, colour) order."""
    columns = image.shape[1] // 48
    for i in range(image.shape[0] // 16):
        for a in range(16):
            line = image[16 * i + a]
            for n in range(48):
                target = blocks[48 * a + n]
                for j in range(columns):
                    target[i * columns + j] = line[48 * j + n]


def blocks_of(pixels: Image, shape: CellShape, model: DecoderModel) -> Floats:
    """(768, positions): samples of a cell's blocks less 128, lapped where the model is.

    Where blocks reach past the cell, the last row and column repeat.
    """
    rows, columns = shape.latents
    image = np.empty((rows * BLOCK, columns * 3 * BLOCK), np.float32)
    _spread(np.ascontiguousarray(pixels), image)
    if model.architecture.lapped:
        turn = np.ascontiguousarray(model.lapping.T)
        lap_image(image, turn, line_weights(turn))
    blocks = np.empty((SAMPLES, rows * columns), np.float32)
    _turn(image, blocks)
    return blocks


def analyse(
    blocks: Floats,
    shape: CellShape,
    model: DecoderModel,
    encoder: EncoderModel,
    gain: int,
    channels: int,
    *,
    share: float = 1.0,
) -> Floats:
    """Latents (channels, positions) of a cell's blocks (768, positions).

    share: of the analysis network's correction; 0 gives the plain transform.
    """
    inputs = {"blocks": blocks.reshape(1, SAMPLES, *shape.latents)}
    if not share:
        return encoder.transform(model, channels)(inputs)[0].reshape(channels, -1)
    inputs["plane"] = np.full((1, 1, 1, 1), gain, np.float32)
    inputs["step"] = np.full((1, 1, 1, 1), share * STEPS[gain], np.float32)
    return encoder.analysis(model, channels)(inputs)[0].reshape(channels, -1)


def transform(
    change: Floats, shape: CellShape, model: DecoderModel, encoder: EncoderModel, channels: int
) -> Floats:
    """The latents' part of a change of blocks (768, positions)."""
    blocks = np.ascontiguousarray(change + model.mean[:, None])  # the transform takes it away
    inputs = {"blocks": blocks.reshape(1, SAMPLES, *shape.latents)}
    return encoder.transform(model, channels)(inputs)[0].reshape(channels, -1)
