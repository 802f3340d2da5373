"""The learned codec: wsicodec tiles of any mode.

Only tiles of mode ``learned`` load the compiled kernels and networks; the rest stays light.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from wsicodec import bitstream
from wsicodec.bitstream import Mode, Tile
from wsicodec.codec.constant import decode_constant, encode_constant, is_constant
from wsicodec.codec.protocol import Image, TileInfo
from wsicodec.errors import FormatError, SettingsError, UnknownModelError
from wsicodec.models.store import decoder_of_prefix, encoder_of, find_model, models
from wsicodec.settings import compute_slot

_PAYLOAD_CODECS = {
    Mode.JPEGXL: "jpegxl",
    Mode.JPEG: "jpeg",
    Mode.JPEG2000: "jpeg2000",
    Mode.LOSSLESS: "lossless",
}


class LearnedCodec:
    """wsicodec tiles; implements ``wsicodec.codec.protocol.Codec``."""

    name = "learned"

    def encode(self, image: Image, *, quality: int, lossless: bool, **options: Any) -> bytes:
        """A tile of mode constant, lossless or learned.

        Options: ``model``, a name or digest; ``tune``, "ssim" (finer steps where the eye and SSIM
        are sensitive) or "psnr" (uniform steps).
        """
        model = options.pop("model", "he-fast")
        tune = options.pop("tune", "ssim")
        if options:
            raise SettingsError(
                f"learned codec has no option {sorted(options)[0]!r}; known: model, tune"
            )
        if tune not in ("ssim", "psnr"):
            raise SettingsError(f"tune must be 'ssim' or 'psnr', not {tune!r}")
        if not isinstance(model, str):
            raise SettingsError(f"model must be a name or digest, not {model!r}")
        with compute_slot():
            if is_constant(image):
                return encode_constant(image).pack()
            if lossless:
                from wsicodec.codec.reference import REFERENCE_CODECS

                data = REFERENCE_CODECS["lossless"].encode(image, quality=100, lossless=True)
                return Tile(Mode.LOSSLESS, image.shape[0], image.shape[1], data).pack()
            from wsicodec.codec.network import Search, encode_tile

            decoder, encoder = encoder_of(find_model(model))
            gain = int(encoder.quality_gain[quality - 1])
            strength = 0.0 if tune == "psnr" else encoder.step_strength
            search = Search(strength, encoder.lagrange)
            return encode_tile(image, decoder, encoder, gain, search).pack()

    def decode(self, data: bytes) -> Image:
        tile = bitstream.parse(data)
        with compute_slot():
            if tile.mode is Mode.CONSTANT:
                return decode_constant(tile)
            if tile.mode is Mode.LEARNED:
                from wsicodec.codec.network import decode_tile

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


def decode_alike(streams: list[bytes], outs: list[Image] | None) -> list[Image]:
    """Pixels of learned tiles of one model, size and number of stages, decoded together."""
    from wsicodec.codec.network import decode_tiles

    tiles = [bitstream.parse(s) for s in streams]
    first = tiles[0]
    assert first.learned is not None
    if outs is None:
        outs = [np.empty((t.height, t.width, 3), np.uint8) for t in tiles]
    with compute_slot():
        decode_tiles(tiles, decoder_of_prefix(first.learned.model), outs)
    return outs


def _quality_of(prefix: str, gain: int) -> int | None:
    """The lowest quality whose gain is at least ``gain``, where the encoder is installed."""
    try:
        _, encoder = encoder_of(find_model(prefix))
    except UnknownModelError:
        return None
    return min(int(np.searchsorted(encoder.quality_gain, gain)), 99) + 1


def _decode_payload(tile: Tile) -> Image:
    """Pixels of a tile whose payload is another codec's stream, of the size the tile says."""
    from wsicodec.codec.reference import REFERENCE_CODECS, decode_payload

    name = _PAYLOAD_CODECS[tile.mode]
    if not REFERENCE_CODECS[name].check(tile.payload):
        raise FormatError(f"payload of a {tile.mode.name.lower()} tile is not a {name} stream")
    return decode_payload(name, tile.payload, tile.height, tile.width)
