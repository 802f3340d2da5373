"""Does a backend give the CPU's symbols? Asked once for each model, before the first tile.

Noise in place of streams: networks, kernels and the order of work are all in it, and any model will
do, of whatever origin. Symbols must be equal to the last one: one that differs would turn all that
is coded behind it to noise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.bitstream import LearnedHeader, Mode, Tile
from wsicodec.codec.network import LANES_LOG2, TURN_BYTES
from wsicodec.errors import UnsupportedError
from wsicodec.models.decoder import DecoderModel
from wsicodec.pipelines.backend import Backend, HostBackend
from wsicodec.pipelines.batched import BatchDecoder, BatchSettings

GAINS = (70, 100, 120)
SIDE = 80  # pixels: an odd number of positions, which lattices and hyper-latents share unevenly
BYTES_PER_PIXEL = 4  # more than streams of these gains hold


def noise_tiles(model: DecoderModel) -> list[Tile]:
    """Tiles of one kind whose payloads are noise, which is the same on every machine."""
    rng = np.random.default_rng(0)
    tiles = []
    for n, gain in enumerate(GAINS):
        header = LearnedHeader(
            model.digest[:4], gain, len(model.architecture.stages), LANES_LOG2, 8 * n
        )
        payload = bytes(TURN_BYTES) + rng.bytes(BYTES_PER_PIXEL * SIDE**2)
        tiles.append(Tile(Mode.LEARNED, SIDE, SIDE, payload, header))
    return tiles


def symbols_of(decoder: BatchDecoder, tiles: list[Tile]) -> list[npt.NDArray[np.int32]]:
    """Hyper-latents and levels of tiles, stage by stage."""
    found: list[npt.NDArray[np.int32]] = []

    def note(_cell: int, _stage: int, symbols: npt.NDArray[Any]) -> None:
        found.append(np.array(symbols))

    decoder.decode(tiles, trace=note)
    return found


def check_backend(model: DecoderModel, backend: Backend) -> None:
    """Raise UnsupportedError where the backend's symbols are not the CPU's."""
    tiles = noise_tiles(model)
    settings = BatchSettings(tiles=len(tiles), flights=1)
    here, there = (
        symbols_of(BatchDecoder(model, which, settings), tiles)
        for which in (HostBackend(), backend)
    )
    for stage, (a, b) in enumerate(zip(here, there, strict=True), start=-1):
        if not np.array_equal(a, b):
            what = "hyper-latents" if stage < 0 else f"symbols of stage {stage}"
            raise UnsupportedError(
                f"the {backend.kind} backend gives other {what} than the CPU, with model "
                f"{model.name}: it is not used"
            )
