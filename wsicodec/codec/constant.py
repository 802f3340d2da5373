"""The ``constant`` mode: a tile of one colour in 21 bytes."""

from __future__ import annotations

import numpy as np

from wsicodec.bitstream import Mode, Tile
from wsicodec.codec.protocol import Image


def is_constant(image: Image) -> bool:
    """True when all pixels have one colour."""
    return bool((image == image[0, 0]).all())


def encode_constant(image: Image) -> Tile:
    height, width = image.shape[:2]
    return Tile(Mode.CONSTANT, height, width, image[0, 0].tobytes())


def decode_constant(tile: Tile) -> Image:
    image = np.empty((tile.height, tile.width, 3), np.uint8)
    image[...] = np.frombuffer(tile.payload, np.uint8)
    return image
