"""Symbols of a learned tile, as one execution and one entropy decoder read them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from wsicodec.bitstream import Tile
from wsicodec.codec.cell import CellJob, cells_of, code_cells
from wsicodec.codec.network import TURN_BYTES
from wsicodec.entropy import kernel, reference
from wsicodec.entropy.tables import SymbolTables
from wsicodec.models.decoder import DecoderModel

Array = np.ndarray[Any, Any]


class Stream(Protocol):
    """An entropy decoder at work; ``wsicodec.entropy.kernel.Decoder`` is one."""

    def get(self, classes: Array, *, dependent: bool = False) -> Array: ...

    def finish(self) -> None: ...


class PlainStream:
    """The entropy decoder in plain Python."""

    def __init__(self, data: bytes, tables: SymbolTables, lanes: int) -> None:
        self._decoder = reference.Decoder(data, tables, lanes)

    def get(self, classes: Array, *, dependent: bool = False) -> Array:
        values = self._decoder.symbols(classes.reshape(-1).tolist(), dependent)
        return np.array(values, np.int32).reshape(classes.shape)

    def finish(self) -> None:
        self._decoder.finish()


CODERS: dict[str, Any] = {"compiled": kernel.Decoder, "plain Python": PlainStream}


def read_symbols(tile: Tile, model: DecoderModel, coder: str = "compiled") -> list[Array]:
    """Hyper-latents and levels of every stage, int32, cell by cell in coding order.

    Raises as decoding the tile does.
    """
    header = tile.learned
    assert header is not None
    places = cells_of(tile.height, tile.width)
    turns = struct.iter_unpack("<3b", tile.payload[: TURN_BYTES * len(places)])
    payload = tile.payload[TURN_BYTES * len(places) :]
    stream: Stream = CODERS[coder](payload, model.tables, 1 << header.lanes_log2)
    found: list[Array] = []

    def hyper(classes: Array) -> Array:
        found.append(stream.get(classes))
        return found[-1]

    def stage(_k: int, classes: Array, _means: Array, _gains: Array) -> Array:
        found.append(stream.get(classes, dependent=True))
        return found[-1]

    for (_, _, shape), (a, b, c) in zip(places, turns, strict=True):
        job = CellJob(header.gain, header.tilt, (a, b, c), hyper, stage)
        code_cells(model, [job], header.stages, shape)
    stream.finish()
    return found


def digest_of(symbols: Sequence[Array]) -> str:
    """SHA-256 as tests/conformance/decode/symbols.json has it: int32, little-endian."""
    digest = hashlib.sha256()
    for array in symbols:
        digest.update(array.astype("<i4").tobytes())
    return digest.hexdigest()
