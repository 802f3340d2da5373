"""The learned codec: wsicodec tiles of any mode."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec import bitstream
from wsicodec.bitstream import LearnedHeader, Mode, Tile
from wsicodec.codec.cell import (
    BLOCK,
    STEPS,
    CellShape,
    cells_of,
    code_cell,
    quantise_stage,
    synthesise,
)
from wsicodec.codec.constant import decode_constant, encode_constant, is_constant
from wsicodec.codec.protocol import Image, TileInfo
from wsicodec.entropy.kernel import Decoder, Encoder
from wsicodec.errors import FormatError, SettingsError, UnknownModelError
from wsicodec.models.decoder import DecoderModel
from wsicodec.models.encoder import EncoderModel
from wsicodec.models.store import decoder_of_prefix, encoder_of, find_model, models
from wsicodec.settings import compute_slot

LANES_LOG2 = 2
_PAYLOAD_CODECS = {
    Mode.JPEGXL: "jpegxl",
    Mode.JPEG: "jpeg",
    Mode.JPEG2000: "jpeg2000",
    Mode.LOSSLESS: "lossless",
}

Coded = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]
"""Symbols and their classes, of one stage of one cell."""


class LearnedCodec:
    """wsicodec tiles; implements ``wsicodec.codec.protocol.Codec``."""

    name = "learned"

    def encode(self, image: Image, *, quality: int, lossless: bool, **options: Any) -> bytes:
        """A tile of mode constant, lossless or learned. Options: ``model``, a name or digest."""
        model = options.pop("model", "he-fast")
        if options:
            raise SettingsError(f"learned codec has no option {sorted(options)[0]!r}; known: model")
        if not isinstance(model, str):
            raise SettingsError(f"model must be a name or digest, not {model!r}")
        with compute_slot():
            if is_constant(image):
                return encode_constant(image).pack()
            if lossless:
                from wsicodec.codec.reference import REFERENCE_CODECS

                data = REFERENCE_CODECS["lossless"].encode(image, quality=100, lossless=True)
                return Tile(Mode.LOSSLESS, *image.shape[:2], data).pack()
            decoder, encoder = encoder_of(find_model(model))
            return encode_tile(image, decoder, encoder, int(encoder.quality_gain[quality - 1])).pack()

    def decode(self, data: bytes) -> Image:
        tile = bitstream.parse(data)
        with compute_slot():
            if tile.mode is Mode.CONSTANT:
                return decode_constant(tile)
            if tile.mode is Mode.LEARNED:
                assert tile.learned is not None
                return decode_tile(tile, decoder_of_prefix(tile.learned.model))
            return _decode_payload(tile)

    def check(self, data: bytes) -> bool:
        return bitstream.is_tile(data)

    def probe(self, data: bytes) -> TileInfo:
        tile = bitstream.parse(data)
        info = TileInfo("learned", tile.mode.name.lower(), tile.height, tile.width, len(data))
        if tile.learned is None:
            return info
        prefix = tile.learned.model.hex()
        record = next((r for r in models() if r.digest.startswith(prefix)), None)
        return TileInfo(
            info.codec,
            info.mode,
            info.height,
            info.width,
            info.bytes,
            model=prefix,
            model_name=record.name if record else None,
            quality=_quality_of(prefix, tile.learned.gain),
            gain=tile.learned.gain,
        )


def _quality_of(prefix: str, gain: int) -> int | None:
    """The lowest quality whose gain is at least ``gain``, where the encoder is installed."""
    try:
        _, encoder = encoder_of(find_model(prefix))
    except UnknownModelError:
        return None
    return int(min(np.searchsorted(encoder.quality_gain, gain), 99)) + 1


def _decode_payload(tile: Tile) -> Image:
    """Pixels of a tile whose payload is another codec's stream, of the size the tile says."""
    from wsicodec.codec.reference import REFERENCE_CODECS

    codec = REFERENCE_CODECS[_PAYLOAD_CODECS[tile.mode]]
    if not codec.check(tile.payload):
        raise FormatError(f"payload of a {tile.mode.name.lower()} tile is not a {codec.name} stream")
    inside = codec.probe(tile.payload)
    if (inside.height, inside.width) != (tile.height, tile.width):
        raise FormatError(
            f"tile of {tile.width} x {tile.height} holds a {inside.width} x {inside.height} payload"
        )
    return codec.decode(tile.payload)


def decode_tile(tile: Tile, model: DecoderModel) -> Image:
    """Pixels of a learned tile."""
    assert tile.learned is not None
    header = tile.learned
    if header.model != model.digest[:4]:
        raise UnknownModelError(f"tile was coded with model {header.model.hex()}, not {model.name}")
    stream = Decoder(tile.payload, model.tables, 1 << header.lanes_log2)
    out = np.empty((tile.height, tile.width, 3), np.uint8)
    for top, left, shape in cells_of(tile.height, tile.width):
        cell = code_cell(
            model, header.gain, header.stages, shape,
            stream.get, lambda _k, classes, _m, _g: stream.get(classes),
        )  # fmt: skip
        synthesise(model, cell, out[top : top + shape.height, left : left + shape.width])
    stream.finish()
    return out


def encode_tile(image: Image, model: DecoderModel, encoder: EncoderModel, gain: int) -> Tile:
    """A learned tile of an image at a gain index."""
    height, width = image.shape[:2]
    limit = max(1, int((encoder.stage_gain <= gain).sum()))
    coded: list[list[Coded]] = []
    for top, left, shape in cells_of(height, width):
        pixels = image[top : top + shape.height, left : left + shape.width]
        coded.append(quantise_cell(pixels, shape, model, encoder, gain, limit))
    # trailing stages without means and without symbols decode to nothing: leave them out
    stages = limit
    while stages > max(1, model.architecture.mean_stages) and not any(
        c[stages][0].any() for c in coded
    ):
        stages -= 1
    stream = Encoder(model.tables, 1 << LANES_LOG2)
    for cell in coded:
        for symbols, classes in cell[: stages + 1]:
            stream.put(symbols, classes)
    header = LearnedHeader(model.digest[:4], gain, stages, LANES_LOG2)
    return Tile(Mode.LEARNED, height, width, stream.finish(), header)


def quantise_cell(
    pixels: Image,
    shape: CellShape,
    model: DecoderModel,
    encoder: EncoderModel,
    gain: int,
    stages: int,
) -> list[Coded]:
    """Symbols and classes of a cell in coding order: hyper-latents, then one entry per stage."""
    a = model.architecture
    rows, columns = shape.latents
    y = analyse(pixels, shape, model, encoder, gain)
    coded: list[Coded] = []
    z_rows, z_columns = shape.hyper
    head = y[: a.context_channels].reshape(-1, rows, columns)
    pad = ((0, 0), (0, 2 * z_rows - rows), (0, 2 * z_columns - columns))
    head = np.pad(head, pad, mode="edge")[None]
    plane = np.full((1, 1, *head.shape[2:]), gain, np.float32)
    z = encoder.hyper_analysis({"y": head, "plane": plane})[0][0]
    z_hat = np.clip(np.rint(z), -127, 127).astype(np.int32)

    def hyper_source(classes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
        coded.append((z_hat, classes))
        return z_hat

    def stage_source(
        k: int, classes: npt.NDArray[np.uint8], means: Any, gains: Any
    ) -> npt.NDArray[np.int32]:
        first = a.start(k)
        symbols = quantise_stage(model, k, y[first : first + a.groups[k]], classes, means, gains)
        coded.append((symbols, classes))
        return symbols

    code_cell(model, gain, stages, shape, hyper_source, stage_source)
    return coded


def analyse(
    pixels: Image, shape: CellShape, model: DecoderModel, encoder: EncoderModel, gain: int
) -> npt.NDArray[np.float32]:
    """Latents (channels, positions) of a cell's pixels, edges replicated to whole blocks."""
    rows, columns = shape.latents
    pad = ((0, rows * BLOCK - shape.height), (0, columns * BLOCK - shape.width), (0, 0))
    whole = np.pad(pixels, pad, mode="edge")
    blocks = whole.reshape(rows, BLOCK, columns, BLOCK, 3).transpose(0, 2, 1, 3, 4)
    flat = blocks.reshape(rows * columns, -1).astype(np.float32) - 128
    linear = encoder.forward_transform(model)({"y": flat})[0]
    y = np.ascontiguousarray(linear.T)
    plane = np.full((1, 1, rows, columns), gain, np.float32)
    correction = encoder.analysis(
        {
            "blocks": np.ascontiguousarray(flat.T).reshape(1, -1, rows, columns),
            "linear": y[: encoder.corrected].reshape(1, -1, rows, columns),
            "plane": plane,
        }
    )[0]
    y[: encoder.corrected] += STEPS[gain] * correction.reshape(encoder.corrected, -1)
    return y
