"""Takes out of compressed tiles what is no picture: comments, EXIF, XMP. Their pixels stay."""

from __future__ import annotations

import dataclasses

from wsicodec import bitstream
from wsicodec.bitstream import Mode
from wsicodec.codec.headers import JXL_MAGIC, JXL_START, boxes
from wsicodec.errors import FormatError, UnsupportedError
from wsicodec.slide.jpegscan import without_leftovers
from wsicodec.slide.jpegstream import segments, without_metadata

_JPEG = 7
_JPEG2000 = (33003, 33004, 33005, 34712)
_WEBP = (34927, 50001)
_JPEGXL = (50002, 52546)
_LEARNED = 60642
_NO_METADATA = (1, 5, 8, 32773, 32946, 34925, 34926, 50000)  # no place but behind samples
_PAYLOADS = {Mode.JPEG: 7, Mode.JPEG2000: 34712, Mode.JPEGXL: 50002, Mode.LOSSLESS: 50002}

# SOF, DHT, SOI and EOI, SOS, DQT, DNL, DRI, JFIF, Adobe: what decoding asks for
_JPEG_MARKERS = {*range(0xC0, 0xD0), 0xD8, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xE0, 0xEE} - {0xC8, 0xCC}
_JPEG_BYTES = {0xDC: 6, 0xDD: 6}  # DNL and DRI hold a number, and libjpeg looks at no DNL

_J2K_SOT, _J2K_SOD, _J2K_EOC = b"\xff\x90", b"\xff\x93", b"\xff\xd9"
_J2K_COMMENT, _J2K_LENGTHS = 0x64, 0x55  # COM; TLM, which has the lengths of tile-parts
# SOT CAP SIZ COD COC TLM PLM PLT CPF QCD QCC RGN POC PPM PPT CRG (T.800, T.814)
_J2K_PICTURE = bytes.fromhex("90 50 51 52 53 55 57 58 59 5c 5d 5e 5f 60 61 63")

_WEBP_PICTURE = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH"}

_JXL_LAST = 0x80  # in the first byte of a part of a codestream


def cleaned(compression: int, stream: bytes, tables: bytes | None = None) -> bytes:
    """The stream without metadata. compression: value of TIFF tag 259. tables: of JPEG, tag 347.

    Raises FormatError for a stream that cannot be taken apart, UnsupportedError where it holds
    metadata that this does not know how to remove.
    """
    if not stream or compression in _NO_METADATA:
        return stream
    if compression == _JPEG:
        return bare_jpeg(stream, tables)
    if compression == _LEARNED:
        return _bare_tile(stream)
    if compression in _JPEG2000 and stream[:2] == b"\xff\x4f":
        return _bare_codestream(stream)
    if compression in _WEBP and stream[:4] == b"RIFF":
        whole = stream[: 8 + int.from_bytes(stream[4:8], "little")]
        # what the flags of VP8X say of metadata does not bind anybody
        if _WEBP_PICTURE.issuperset(_chunks(whole)):
            return whole
    elif compression in _JPEGXL and (
        stream.startswith(JXL_MAGIC) or (stream.startswith(JXL_START) and _only_codestream(stream))
    ):
        return stream
    raise UnsupportedError(
        f"metadata cannot be removed from a tile of compression {compression} (starts with "
        f"{stream[:12].hex(' ')}) as it is; convert it with a codec instead"
    )


def bare_jpeg(stream: bytes, tables: bytes | None = None) -> bytes:
    """A JPEG stream, or tables, of nothing but the segments that decoding asks for.

    tables: tag 347, for an abbreviated stream: its last block is found by them, and what is behind
    it taken out, too.
    Raises FormatError for what is no JPEG, UnsupportedError for a segment of unknown purpose.
    """
    bare = without_metadata(stream)
    for marker, start, end in segments(bare):
        if marker not in _JPEG_MARKERS or end - start != _JPEG_BYTES.get(marker, end - start):
            raise UnsupportedError(
                f"JPEG segment ff {marker:02x} may be more than picture; convert the slide with a "
                "codec instead"
            )
    return without_leftovers(bare, tables)


def _bare_tile(data: bytes) -> bytes:
    """A wsicodec tile whose payload, where that is another codec's stream, is bare."""
    tile = bitstream.parse(data)
    if tile.mode is Mode.TRANSCODED:
        from wsicodec.codec.transcoded import jpeg_of, transcode

        stream = jpeg_of(tile)
        bare = bare_jpeg(stream)
        if bare == stream:
            return data
        packed = transcode(bare)
        if packed is None:
            raise UnsupportedError("transcoded JPEG without its metadata is none any more")
        return packed.pack()
    if tile.mode in _PAYLOADS:
        payload = cleaned(_PAYLOADS[tile.mode], tile.payload)
        return dataclasses.replace(tile, payload=payload).pack()
    return data


def _bare_codestream(stream: bytes) -> bytes:
    """A JPEG-2000 codestream without comments (T.800, A.9.2) or bytes behind its end."""
    main, position = _without_comments(stream, 2, _J2K_SOT)
    kept = [stream[:2], *main]
    while stream[position : position + 2] == _J2K_SOT:
        length = int.from_bytes(stream[position + 6 : position + 10])  # of the whole tile-part
        # 0: up to the end of the stream; no packet holds its marker
        end = position + length if length else stream.find(_J2K_EOC, position)
        header, data = _without_comments(stream, position, _J2K_SOD)
        if end > len(stream) or end < data:
            raise FormatError(f"JPEG-2000 tile-part is broken at byte {position}")
        if removed := data - position - sum(map(len, header)):
            if any(segment[1] == _J2K_LENGTHS for segment in main):
                raise UnsupportedError("JPEG-2000 comment in a tile-part whose length is listed")
            if length:
                header[0] = header[0][:6] + (length - removed).to_bytes(4) + header[0][10:]
        kept += [*header, stream[data:end]]
        position = end
    if stream[position : position + 2] not in (_J2K_EOC, b""):
        raise FormatError(f"JPEG-2000 stream has neither tile-part nor end at byte {position}")
    return b"".join([*kept, stream[position : position + 2]])


def _without_comments(stream: bytes, position: int, end: bytes) -> tuple[list[bytes], int]:
    """Marker segments up to the marker ``end``, but for comments; and where that is."""
    kept = []
    while (marker := stream[position : position + 2]) != end:
        length = int.from_bytes(stream[position + 2 : position + 4])
        after = position + 2 + length
        if marker[:1] != b"\xff" or length < 2 or after > len(stream):
            raise FormatError(f"JPEG-2000 header is broken at byte {position}")
        if marker[1] in _J2K_PICTURE:
            kept.append(stream[position:after])
        elif marker[1] != _J2K_COMMENT:
            raise UnsupportedError(
                f"JPEG-2000 segment ff {marker[1]:02x} may be more than picture; convert the slide "
                "with a codec instead"
            )
        position = after
    return kept, position


def _chunks(stream: bytes) -> list[bytes]:
    """Types of the chunks of a WebP file that ends where its last chunk does."""
    names, position = [], 12
    while position < len(stream):
        length = int.from_bytes(stream[position + 4 : position + 8], "little")
        if position + 8 + length > len(stream):
            raise FormatError(f"WebP chunk at byte {position} is cut short")
        names.append(stream[position : position + 4])
        position += 8 + length + length % 2
    return names


def _only_codestream(stream: bytes) -> bool:
    """True for a JPEG-XL container of one codestream, whole or in parts, and its level."""
    found = list(boxes(stream, "JPEG XL", len(JXL_START)))
    if found and found[0].kind == b"jxll" and found[0].end - found[0].start == 1:
        del found[0]
    kinds = {box.kind for box in found}
    if kinds == {b"jxlc"}:
        return len(found) == 1
    # no decoder looks at what comes behind the last part
    last = [stream[box.start] & _JXL_LAST for box in found if box.end - box.start >= 4]
    return kinds == {b"jxlp"} and len(last) == len(found) and not any(last[:-1])
