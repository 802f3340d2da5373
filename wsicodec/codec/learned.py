"""The learned codec: wsicodec tiles of any mode.

Only tiles of mode ``learned`` load the compiled kernels and networks; the rest stays light.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from wsicodec import bitstream
from wsicodec.bitstream import LearnedHeader, Mode, Tile
from wsicodec.codec.constant import decode_constant, encode_constant, is_constant
from wsicodec.codec.options import LearnedSettings
from wsicodec.codec.protocol import DEFAULT_QUALITY, Image, TileInfo
from wsicodec.errors import FormatError, UnknownModelError
from wsicodec.models.encoder import gain_beside
from wsicodec.models.store import decoder_of_prefix, encoder_of, find_model, models
from wsicodec.settings import compute_slot

BATCH_PIXELS = 2**19
"""Pixels that one run of onnxruntime's networks takes at most: eight tiles of 256."""
TRY_ALL_MODES = 8
"""Effort from which other modes are tried on tiles that look like tissue, too."""
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
        """A tile of the mode that suits the image: constant, learned, or another codec's stream.

        Options: ``model``, a name or digest; ``effort``, 1 (fastest) ... 9 (fewest bytes at equal
        quality), 5 unless given; ``tune``, "balanced", "ssim" (finer steps where SSIM of luma is
        sensitive) or "psnr" (nearly even steps, colour as fine as RGB asks for); ``target_psnr``
        (dB) or ``target_ssim`` in place of quality, reached with at most three encodes (up to
        effort 6) where the finest quality reaches it; ``modes``, "auto" (other modes for content
        that is not tissue, where they are smaller; effort 8 and 9 try them on all tiles) or
        "learned" (no other mode but constant).
        """
        settings = LearnedSettings.of(options)
        with compute_slot():
            if is_constant(image):
                return encode_constant(image).pack()
            if lossless:
                from wsicodec.codec.reference import REFERENCE_CODECS

                data = REFERENCE_CODECS["lossless"].encode(image, quality=100, lossless=True)
                return Tile(Mode.LOSSLESS, image.shape[0], image.shape[1], data).pack()
            return _encode(image, quality, settings)

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
            quality=_quality_of(tile.learned),
            gain=tile.learned.gain,
            tilt=tile.learned.tilt,
        )


def _encode(image: Image, quality: int, settings: LearnedSettings) -> bytes:
    from wsicodec.codec.effort import effort_of, encode_best
    from wsicodec.codec.fallback import Candidate, better_mode, measured, suspicions
    from wsicodec.codec.fidelity import ssim
    from wsicodec.codec.network import CodedTile, TileEncoder
    from wsicodec.codec.rate import Trial, reach, ssim_decibels, typical_shift
    from wsicodec.metrics import PSNR_OF_EQUAL, psnr

    decoder, encoder = encoder_of(find_model(settings.model))
    effort = effort_of(settings.effort, settings.tune, encoder)
    tile = TileEncoder(image, decoder, encoder)
    target, by_psnr = settings.target_psnr, settings.tune == "psnr"
    if settings.target_ssim is not None:
        target, by_psnr = ssim_decibels(settings.target_ssim), False
    elif target is not None:
        by_psnr = True

    def decibels(coded: CodedTile) -> float:
        if by_psnr:
            return min(psnr(image, coded.pixels), PSNR_OF_EQUAL)
        return ssim_decibels(ssim(image, coded.pixels))

    def trial(gain: int) -> tuple[float, CodedTile]:
        coded = tile.encode(gain, effort.first)
        return decibels(coded), coded

    gain, most = (int(encoder.quality_gain[q - 1]) for q in (quality, 100))
    first = None
    if target is not None:
        typical = encoder.typical_psnr + typical_shift(image) if by_psnr else encoder.typical_ssim
        found: Trial[CodedTile] = reach(target, trial, typical, most)
        gain, first = found.gain, found.coded
    coded = encode_best(tile, gain, effort, decibels, first, most)
    if settings.modes == "learned":
        return coded.data
    reasons = suspicions(image)
    if not reasons and settings.effort < TRY_ALL_MODES:
        return coded.data
    best: Candidate = better_mode(image, measured(coded.tile, coded.pixels, image), reasons)
    return best.tile.pack()


def most_alike(tile: Tile) -> int:
    """Tiles of this one's kind that are best decoded in one go.

    A run of onnxruntime costs as much as the arithmetic of a tile. Compiled programs go tile by
    tile: two at a time, since taking turns costs little.
    """
    assert tile.learned is not None
    if decoder_of_prefix(tile.learned.model).fused is not None:
        return 2
    return max(1, BATCH_PIXELS // (tile.height * tile.width))


def decode_alike(tiles: Sequence[Tile], outs: list[Image] | None) -> list[Image]:
    """Pixels of learned tiles of one model, size and number of stages, decoded together."""
    from wsicodec.codec.network import decode_tiles

    first = tiles[0]
    assert first.learned is not None
    if outs is None:
        outs = [np.empty((t.height, t.width, 3), np.uint8) for t in tiles]
    with compute_slot():
        decode_tiles(tiles, decoder_of_prefix(first.learned.model), outs)
    return outs


def _quality_of(header: LearnedHeader) -> int | None:
    """The lowest quality whose gain is at least the tile's, where the encoder is installed; the
    default quality where it has that gain too."""
    try:
        decoder, encoder = encoder_of(find_model(header.model.hex()))
    except UnknownModelError:
        return None
    gain = header.gain - gain_beside(decoder, encoder, header.tilt)
    if gain == encoder.quality_gain[DEFAULT_QUALITY - 1]:
        return DEFAULT_QUALITY
    return min(int(np.searchsorted(encoder.quality_gain, gain)), 99) + 1


def _decode_payload(tile: Tile) -> Image:
    """Pixels of a tile whose payload is another codec's stream, of the size the tile says."""
    from wsicodec.codec.reference import REFERENCE_CODECS, decode_payload

    if tile.mode is Mode.TRANSCODED:
        from wsicodec.codec.transcoded import jpeg_of

        return decode_payload("jpeg", jpeg_of(tile), tile.height, tile.width)
    name = _PAYLOAD_CODECS[tile.mode]
    if not REFERENCE_CODECS[name].check(tile.payload):
        raise FormatError(f"payload of a {tile.mode.name.lower()} tile is not a {name} stream")
    return decode_payload(name, tile.payload, tile.height, tile.width)
