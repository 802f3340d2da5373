"""Headers of the reference codecs' streams: size, depth, channels, and what else costs memory.

Decoding takes bytes from strangers. Each ``*_size`` function walks a stream and gives (rows,
columns); whatever else decides how much a library allocates is checked against caps. With
``whole`` a stream that was cut short is refused too, where the library would pad it in silence
(libjpeg). Raises FormatError, TruncatedError, LimitError and UnsupportedError (not 8-bit RGB).
Not covered: frames inside a JPEG XL codestream may be larger than the image; libjxl bounds them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from wsicodec.bitstream import MAX_SIDE
from wsicodec.errors import FormatError, LimitError, TruncatedError, UnsupportedError

MAX_JPEG_SCANS = 100
"""Progressive JPEGs have about ten scans; each costs a pass over the whole image."""
MAX_J2K_TILES = 4096
MAX_J2K_PIECES = 2**20
"""Packets, or code blocks, of a JPEG-2000 image; OpenJPEG allocates for each before it decodes."""


class _Bytes:
    """Reads big-endian fields; past the end is TruncatedError. ``start``, ``end``: the window."""

    def __init__(self, data: bytes, what: str, start: int = 0, end: int | None = None) -> None:
        self.data, self.what, self.pos = data, what, start
        self.end = len(data) if end is None else end

    def take(self, count: int) -> bytes:
        if count > self.end - self.pos:
            raise TruncatedError(
                f"{self.what} ends within a header: "
                f"{count} bytes wanted at {self.pos}, {max(self.end - self.pos, 0)} there"
            )
        self.pos += count
        return self.data[self.pos - count : self.pos]

    def uint(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")


class _Bits:
    """Reads bits of a short header, from the lowest (``little``) or the highest of each byte."""

    def __init__(self, data: bytes, what: str, *, little: bool) -> None:
        self.what, self.little, self.pos, self.length = what, little, 0, 8 * len(data)
        self.number = int.from_bytes(data, "little" if little else "big")

    def read(self, count: int) -> int:
        if count > self.length - self.pos:
            raise TruncatedError(f"{self.what} ends within its header")
        shift = self.pos if self.little else self.length - self.pos - count
        self.pos += count
        return self.number >> shift & (1 << count) - 1


def _check_size(what: str, height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise FormatError(f"{what} of {width} x {height} pixels has no pixels")
    if height > MAX_SIDE or width > MAX_SIDE:
        raise LimitError(f"{what} of {width} x {height} pixels: sides must be 1 ... {MAX_SIDE}")


def _check_channels(what: str, channels: int) -> None:
    kind = {1: "grey", 2: "grey with alpha", 4: "RGBA or CMYK"}.get(channels)
    if channels != 3:
        raise UnsupportedError(
            f"{what} is {kind or f'an image of {channels} channels'}; wsicodec reads 8-bit RGB"
        )


def _check_depth(what: str, bits: int) -> None:
    if bits != 8:
        raise UnsupportedError(f"{what} has {bits} bits per sample; wsicodec reads 8-bit RGB")


# -- JPEG (ITU-T T.81) --

# a marker that is neither stuffing (FF 00) nor a restart (FF D0 ... D7), behind any filling FF;
# a literal first byte makes the search many times as fast
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_SOI, _EOI, _SOS, _DNL = 0xD8, 0xD9, 0xDA, 0xDC
_JPEG_FRAMES = {0xC0: "baseline", 0xC1: "extended", 0xC2: "progressive"}
_JPEG_OTHER_FRAMES = {*range(0xC3, 0xD0)} - {0xC4, 0xC8, 0xCC}


def jpeg_size(data: bytes, *, whole: bool) -> tuple[int, int]:
    """(height, width) of a JPEG. whole: walk on to its end, which must be there."""
    what = "JPEG"
    reader = _Bytes(data, what, 2)
    size: tuple[int, int] | None = None
    scans = 0
    while True:
        if reader.take(1) != b"\xff":
            raise FormatError(f"JPEG has no marker at byte {reader.pos - 1}")
        marker = reader.uint(1)
        while marker == 0xFF:
            marker = reader.uint(1)
        if marker == _EOI:
            if size is None or scans == 0:
                raise FormatError("JPEG ends without an image")
            return size
        if marker == _SOI or marker < 0xC0 or 0xD0 <= marker <= 0xD7:
            raise FormatError(f"JPEG has marker {marker:#04x} at byte {reader.pos - 1}")
        body = _Bytes(reader.take(max(reader.uint(2) - 2, 0)), what)
        if marker in _JPEG_OTHER_FRAMES:
            raise UnsupportedError(
                f"JPEG of type SOF{marker - 0xC0} (lossless, hierarchical or arithmetic)"
            )
        if marker == _DNL:
            raise UnsupportedError("JPEG that gives its height after the scan")
        if marker in _JPEG_FRAMES:
            if size is not None:
                raise FormatError("JPEG has two frames")
            bits, height, width, channels = (body.uint(n) for n in (1, 2, 2, 1))
            _check_size(what, height, width)
            _check_depth(what, bits)
            _check_channels(what, channels)
            size = height, width
            if not whole:
                return size
        if marker == _SOS:
            if size is None:
                raise FormatError("JPEG scan comes before its frame")
            scans += 1
            if scans > MAX_JPEG_SCANS:
                raise LimitError(f"JPEG has more than {MAX_JPEG_SCANS} scans")
            found = _JPEG_MARKER.search(data, reader.pos)
            if found is None:
                raise TruncatedError(f"JPEG of {len(data)} bytes ends within scan {scans}")
            reader.pos = found.start()


# -- JPEG-2000 (ITU-T T.800) --

J2K_MAGIC = b"\xff\x4f\xff\x51"
JP2_MAGIC = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
_SIZ, _COD, _COC, _SOT, _SOD, _EOC = 0xFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93, 0xFFD9


def jpeg2000_size(data: bytes, *, whole: bool) -> tuple[int, int]:
    """(height, width) of a JPEG-2000 codestream. whole: walk all tile parts up to its end."""
    what = "JPEG-2000"
    reader = _Bytes(data, what, 4)
    siz = _j2k_segment(reader)
    siz.take(2)
    x1, y1, x0, y0, tile_w, tile_h, tile_x, tile_y = (siz.uint(4) for _ in range(8))
    channels = siz.uint(2)
    width, height = x1 - x0, y1 - y0
    _check_size(what, height, width)
    _check_channels(what, channels)
    for _ in range(channels):
        depth, dx, dy = siz.uint(1), siz.uint(1), siz.uint(1)
        if depth & 0x80:
            raise UnsupportedError("JPEG-2000 of signed samples; wsicodec reads 8-bit RGB")
        _check_depth(what, depth + 1)
        if (dx, dy) != (1, 1):
            raise UnsupportedError("JPEG-2000 of subsampled channels; wsicodec reads 8-bit RGB")
    if tile_w < 1 or tile_h < 1 or tile_x > x0 or tile_y > y0:
        raise FormatError("JPEG-2000 tiles do not cover the image")
    tiles = -((tile_x - x1) // tile_w) * -((tile_y - y1) // tile_h)
    if tiles > MAX_J2K_TILES:
        raise LimitError(f"JPEG-2000 stream has {tiles} tiles of at most {MAX_J2K_TILES}")
    if not whole:
        return height, width
    layers = 1
    while True:
        marker = reader.uint(2)
        if marker == _EOC:
            return height, width
        if marker != _SOT:
            body = _j2k_segment(reader)
            layers = _j2k_check_pieces(marker, body, (height, width), tiles, layers)
            continue
        start = reader.pos - 2
        head = _j2k_segment(reader)
        head.take(2)
        length = head.uint(4)
        while (marker := reader.uint(2)) != _SOD:
            body = _j2k_segment(reader)
            _j2k_check_pieces(marker, body, (height, width), tiles, layers)
        if length == 0:  # the last tile part: up to the end marker
            length = len(data) - 2 - start
        if start + length < reader.pos:
            raise FormatError(f"JPEG-2000 tile part at byte {start} is shorter than its header")
        reader.pos = start + length
        if reader.pos > len(data) - 2:
            raise TruncatedError(f"JPEG-2000 stream of {len(data)} bytes ends within a tile part")


def _j2k_segment(reader: _Bytes) -> _Bytes:
    """The body of the marker segment at the reader, which moves behind it."""
    length = reader.uint(2)
    if length < 2:
        raise FormatError(f"JPEG-2000 marker segment of length {length}")
    return _Bytes(reader.take(length - 2), "JPEG-2000 marker segment")


def _j2k_check_pieces(
    marker: int, body: _Bytes, size: tuple[int, int], tiles: int, layers: int
) -> int:
    """Refuse coding styles (COD, COC) that cut the image into too many pieces.

    Returns the number of layers, which COD gives and COC inherits.
    """
    if marker == _COD:
        precincts = body.uint(1) & 1
        body.take(1)
        layers = body.uint(2)
        body.take(1)
    elif marker == _COC:
        body.take(1)
        precincts = body.uint(1) & 1
    else:
        return layers
    levels, block_x, block_y = body.uint(1), body.uint(1) + 2, body.uint(1) + 2
    body.take(2)
    if levels > 32 or block_x > 10 or block_y > 10 or block_x + block_y > 12:
        raise FormatError("JPEG-2000 coding style is out of range")
    # every tile and channel has at least one packet and one block a level
    packets = blocks = tiles * (levels + 1)
    for r in range(levels + 1):
        rows, columns = (-(-side >> levels - r) for side in size)
        log_x = log_y = 15
        if precincts:
            both = body.uint(1)
            log_x, log_y = both & 15, both >> 4
        packets += -(-columns >> log_x) * -(-rows >> log_y)
        side_x, side_y = min(block_x, log_x), min(block_y, log_y)
        blocks += -(-columns >> side_x) * -(-rows >> side_y)
    if 3 * max(packets * layers, blocks) > MAX_J2K_PIECES:
        raise LimitError(
            f"JPEG-2000 stream of {3 * packets * layers} packets and {3 * blocks} code blocks; "
            f"at most {MAX_J2K_PIECES} are read"
        )
    return layers


# -- boxes (ISO/IEC 14496-12), for AVIF and JPEG XL containers --


@dataclass(frozen=True)
class Box:
    """A box: its type and where its content starts and ends in the data."""

    kind: bytes
    start: int
    end: int


def boxes(data: bytes, what: str, start: int = 0, end: int | None = None) -> Iterator[Box]:
    """The boxes of a window of the data; TruncatedError where one leaves it."""
    end = len(data) if end is None else end
    while start < end:
        reader = _Bytes(data, what, start, end)
        size, kind = reader.uint(4), reader.take(4)
        if size == 1:
            size = reader.uint(8)
        stop = end if size == 0 else start + size
        if stop < reader.pos:
            raise FormatError(f"{what} box {kind!r} of {size} bytes is shorter than its header")
        if stop > end:
            raise TruncatedError(f"{what} box {kind!r} at byte {start} has {end - start} of {size}")
        yield Box(kind, reader.pos, stop)
        start = stop


# -- JPEG XL (ISO/IEC 18181-1) --

JXL_MAGIC = b"\xff\x0a"
JXL_BOX_MAGIC = b"\x00\x00\x00\x0cJXL \r\n\x87\n"
_JXL_HEADER_BYTES = 64
MAX_TRANSCODED_SEGMENTS = 64
"""APPn and COM segments, and stray bytes between segments, that a transcoded JPEG may bring: each
can unfold from nothing to 64 KiB."""
JXL_START = JXL_BOX_MAGIC + b"\0\0\0\x14ftypjxl \0\0\0\0jxl "
"""The first two boxes of a container, the same in all of them."""
_JXL_STREAM, _JXL_METADATA = (b"jxlc", b"jxlp"), (b"Exif", b"xml ")
_JBRD = b"jbrd"
_JBRD_START = 1024
JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
"""(width, height) of an image whose header tells its height and, from 1 on, one of these."""


def jpegxl_size(data: bytes, *, whole: bool) -> tuple[int, int]:
    """(height, width) of a JPEG XL stream, as shown. libjxl itself notices a missing end."""
    if data.startswith(JXL_MAGIC):
        return _jxl_header(data[2 : 2 + _JXL_HEADER_BYTES])
    head = b""
    for box in boxes(data, "JPEG XL"):
        # jxlc: the codestream; jxlp: a part of it, behind a counter
        if box.kind in (b"jxlc", b"jxlp"):
            start = box.start + (4 if box.kind == b"jxlp" else 0)
            head += data[start : min(box.end, start + 2 + _JXL_HEADER_BYTES)]
            if not whole and len(head) > _JXL_HEADER_BYTES:
                break
    if not head.startswith(JXL_MAGIC):
        raise FormatError("JPEG XL container holds no codestream")
    return _jxl_header(head[2:])


def transcoded_size(data: bytes, *, metadata: bool = False) -> tuple[int, int]:
    """(height, width) of a JPEG XL file that holds what turns it back into a JPEG stream.

    ISO/IEC 18181-2, box ``jbrd``. The list of the JPEG's markers, at the start of that box, tells
    how much else libjxl would unfold. metadata: boxes of EXIF and XMP may be there; else nothing
    but what the picture needs.
    """
    what = "transcoded JPEG"
    if not data.startswith(JXL_START):
        raise FormatError(f"{what} is not a JPEG XL container")
    found, levels = [], 0
    for box in boxes(data, what, len(JXL_START)):
        if box.kind == _JBRD:
            found.append(data[box.start : box.end])
        elif box.kind == b"jxll" and box.end - box.start == 1 and not levels:
            levels += 1
        elif box.kind not in _JXL_STREAM and not (metadata and box.kind in _JXL_METADATA):
            raise FormatError(f"{what} holds a box {box.kind!r}")
    if len(found) != 1:
        raise FormatError(f"{what} holds {len(found)} boxes of what it takes to turn it back")
    markers = _transcoded_markers(found[0], what)
    # APP0 ... APP15, COM, and 0xFF for bytes between segments
    unfolding = sum(0xE0 <= marker <= 0xEF or marker >= 0xFE for marker in markers)
    scans = markers.count(_SOS)
    if unfolding > MAX_TRANSCODED_SEGMENTS or scans > MAX_JPEG_SCANS:
        raise LimitError(f"{what} with {scans} scans and {unfolding} segments of other data")
    return jpegxl_size(data, whole=True)


def _transcoded_markers(jbrd: bytes, what: str) -> list[int]:
    """Markers of the JPEG in their order: after a bit that tells grey, six bits for each."""
    bits = _Bits(jbrd[:_JBRD_START], what, little=True)
    bits.read(1)
    markers: list[int] = []
    while not markers or markers[-1] != _EOI:
        markers.append(0xC0 + bits.read(6))
    return markers


def _jxl_header(data: bytes) -> tuple[int, int]:
    """SizeHeader and the start of ImageMetadata; refuses all but 8-bit RGB stills."""
    what = "JPEG XL"
    bits = _Bits(data, what, little=True)

    def u32(*choices: tuple[int, int]) -> int:
        """One of four (offset, bit count), chosen by two bits."""
        offset, count = choices[bits.read(2)]
        return offset + bits.read(count)

    def size() -> tuple[int, int]:
        plain = (1, 9), (1, 13), (1, 18), (1, 30)
        by_eight = bits.read(1)
        height = 8 * (1 + bits.read(5)) if by_eight else u32(*plain)
        ratio = bits.read(3)
        if ratio:
            over, under = JXL_RATIOS[ratio - 1]
            return height, height * over // under
        return height, 8 * (1 + bits.read(5)) if by_eight else u32(*plain)

    height, width = size()
    _check_size(what, height, width)
    if bits.read(1):  # all default: 8 bits, RGB
        return height, width
    if bits.read(1):  # extra fields
        orientation = bits.read(3)
        if orientation >= 4:
            height, width = width, height
        if bits.read(1):  # intrinsic size: a wish of the author's, not applied
            size()
        if bits.read(1):
            raise UnsupportedError("JPEG XL stream with a preview")
        if bits.read(1):
            raise UnsupportedError("JPEG XL animation")
    if bits.read(1):
        raise UnsupportedError("JPEG XL stream of float samples; wsicodec reads 8-bit RGB")
    _check_depth(what, u32((8, 0), (10, 0), (12, 0), (1, 6)))
    bits.read(1)  # 16-bit buffers suffice
    extra = u32((0, 0), (1, 0), (2, 4), (1, 12))
    if extra:
        _check_channels(what, 3 + extra)
    bits.read(1)  # XYB
    # ColourEncoding: unless all default (sRGB), a profile flag and the colour space as an Enum
    if not bits.read(1):
        bits.read(1)
        if u32((0, 0), (1, 0), (2, 4), (18, 6)) == 1:
            _check_channels(what, 1)
    return height, width


# -- AVIF (AV1 Image File Format, AV1 section 5) --


def avif_brands(data: bytes) -> set[bytes]:
    """Brands of the file type box, or an empty set."""
    if data[4:8] != b"ftyp":
        return set()
    stop = min(int.from_bytes(data[:4], "big"), len(data))
    return {data[8:12], *(data[i : i + 4] for i in range(16, stop - 3, 4))}


def avif_size(data: bytes, *, whole: bool) -> tuple[int, int]:
    """(height, width) of an AVIF still. whole: its coded data must be there and agree."""
    what, sequence = "AVIF", "AVIF image sequence; wsicodec reads stills"
    if data[8:12] == b"avis":
        raise UnsupportedError(sequence)
    meta: Box | None = None
    for box in boxes(data, what):
        if box.kind == b"moov":
            raise UnsupportedError(sequence)
        if box.kind == b"meta":
            meta = box
            if not whole:
                break
    if meta is None:
        raise TruncatedError(f"AVIF of {len(data)} bytes ends before its meta box")
    # meta is a full box: version and flags come first
    inner = {b.kind: b for b in boxes(data, "AVIF meta", meta.start + 4, meta.end)}
    for kind in (b"pitm", b"iinf", b"iloc", b"iprp"):
        if kind not in inner:
            raise FormatError(f"AVIF file has no {kind.decode()} box")
    primary = _avif_primary(data, inner[b"pitm"], inner[b"iinf"])
    height, width = _avif_properties(data, inner[b"iprp"], primary)
    if whole:
        _avif_check_coded(_avif_item(data, inner[b"iloc"], primary), height, width)
    return height, width


def _full(data: bytes, box: Box) -> tuple[_Bytes, int, int]:
    """A reader behind version and flags of a full box, the version, the flags."""
    reader = _Bytes(data, "AVIF box", box.start, box.end)
    return reader, reader.uint(1), reader.uint(3)


def _avif_primary(data: bytes, pitm: Box, iinf: Box) -> int:
    """The number of the primary item, which must be a coded image, not a grid of them."""
    reader, version, _ = _full(data, pitm)
    primary = reader.uint(4 if version else 2)
    reader, version, _ = _full(data, iinf)
    reader.take(4 if version else 2)
    for box in boxes(data, "AVIF items", reader.pos, iinf.end):
        if box.kind != b"infe":
            continue
        entry, version, _ = _full(data, box)
        if version < 2:
            continue
        item = entry.uint(4 if version > 2 else 2)
        entry.take(2)
        kind = entry.take(4)
        if item == primary:
            if kind != b"av01":
                raise UnsupportedError(f"AVIF whose image is derived ({kind!r}), not coded")
            return primary
    raise FormatError(f"AVIF file does not list its primary item {primary}")


def _avif_properties(data: bytes, iprp: Box, item: int) -> tuple[int, int]:
    """(height, width) of an item; refuses other than upright 8-bit RGB."""
    what = "AVIF"
    inner = {b.kind: b for b in boxes(data, "AVIF properties", iprp.start, iprp.end)}
    if b"ipco" not in inner or b"ipma" not in inner:
        raise FormatError("AVIF file has no item properties")
    ipco = inner[b"ipco"]
    properties = list(boxes(data, "AVIF properties", ipco.start, ipco.end))
    if any(p.kind == b"auxC" for p in properties):
        raise UnsupportedError("AVIF with an alpha or depth plane; wsicodec reads 8-bit RGB")
    reader, version, flags = _full(data, inner[b"ipma"])
    own: dict[bytes, Box] = {}
    for _ in range(reader.uint(4)):
        number = reader.uint(4 if version else 2)
        for _ in range(reader.uint(1)):
            # the highest bit says "essential"
            index = reader.uint(2) & 0x7FFF if flags & 1 else reader.uint(1) & 0x7F
            if number == item and 1 <= index <= len(properties):
                own[properties[index - 1].kind] = properties[index - 1]
    for kind in (b"irot", b"imir", b"clap"):
        if kind in own:
            raise UnsupportedError(f"AVIF that is shown rotated, mirrored or cut ({kind.decode()})")
    if b"ispe" not in own or b"av1C" not in own:
        raise FormatError("AVIF image has no size or no codec configuration")
    reader, _, _ = _full(data, own[b"ispe"])
    width, height = reader.uint(4), reader.uint(4)
    _check_size(what, height, width)
    reader = _Bytes(data, what, own[b"av1C"].start, own[b"av1C"].end)
    reader.take(2)
    config = reader.uint(1)
    if config & 0x40:
        _check_depth(what, 12 if config & 0x20 else 10)
    if config & 0x10:
        _check_channels(what, 1)
    return height, width


def _avif_item(data: bytes, iloc: Box, item: int) -> bytes:
    """The coded data of an item."""
    reader, version, _ = _full(data, iloc)
    sizes, more = reader.uint(1), reader.uint(1)
    offset_size, length_size, base_size = sizes >> 4, sizes & 15, more >> 4
    index_size = more & 15 if version else 0
    wide = 4 if version > 1 else 2
    for _ in range(reader.uint(wide)):
        number = reader.uint(wide)
        method = reader.uint(2) & 15 if version else 0
        reader.take(2)
        base = reader.uint(base_size)
        parts = []
        for _ in range(reader.uint(2)):
            reader.take(index_size)
            start = base + reader.uint(offset_size)
            parts.append((start, reader.uint(length_size)))
        if number != item:
            continue
        if method != 0 or len(parts) != 1:
            raise UnsupportedError("AVIF whose coded data lies in pieces or inside its header")
        start, length = parts[0]
        stop = start + length if length else len(data)
        if stop > len(data):
            raise TruncatedError(f"AVIF of {len(data)} bytes ends before its data does at {stop}")
        return data[start:stop]
    raise FormatError("AVIF file does not say where its image lies")


def _avif_check_coded(data: bytes, height: int, width: int) -> None:
    """Walk the AV1 data; its frame size must be the announced one, or dav1d allocates more."""
    reader = _Bytes(data, "AV1 data")
    found = False
    while reader.pos < reader.end:
        head = reader.uint(1)
        if head & 0x04:
            reader.take(1)
        length = reader.end - reader.pos
        if head & 0x02:
            length = 0
            for i in range(8):
                byte = reader.uint(1)
                length |= (byte & 0x7F) << 7 * i
                if byte < 0x80:
                    break
        body = reader.take(length)
        if head >> 3 & 15 == 1:
            found = True
            coded = _av1_frame_size(body)
            if coded != (height, width):
                raise FormatError(
                    f"AVIF of {width} x {height} pixels holds a frame of {coded[1]} x {coded[0]}"
                )
    if not found:
        raise FormatError("AVIF image holds no AV1 sequence header")


def _av1_frame_size(body: bytes) -> tuple[int, int]:
    """(height, width) of an AV1 sequence header."""
    bits = _Bits(body[:_JXL_HEADER_BYTES], "AV1 sequence header", little=False)
    bits.read(4)  # profile, still picture
    reduced = bits.read(1)
    if reduced:
        bits.read(5)
    else:
        if bits.read(1):
            raise UnsupportedError("AVIF of a video with timing; wsicodec reads stills")
        delays = bits.read(1)
        for _ in range(bits.read(5) + 1):
            bits.read(12)
            if bits.read(5) > 7:
                bits.read(1)
            if delays and bits.read(1):
                bits.read(4)
    bits_x, bits_y = bits.read(4) + 1, bits.read(4) + 1
    # a frame of a full header may name another size, of as many bits
    if not reduced and max(bits_x, bits_y) > MAX_SIDE.bit_length():
        raise LimitError(f"AV1 frame size of {max(bits_x, bits_y)} bits")
    width = bits.read(bits_x) + 1
    return bits.read(bits_y) + 1, width


# -- WebP (RFC 9649) --


def webp_size(data: bytes, *, whole: bool) -> tuple[int, int]:
    """(height, width) of a WebP still. whole: all that its header promises must be there."""
    what = "WebP"
    promised = 8 + int.from_bytes(data[4:8], "little")
    if whole and promised > len(data):
        raise TruncatedError(f"WebP has {len(data)} of {promised} bytes: it was cut short")
    reader = _Bytes(data, what, 12, min(promised, len(data)))
    canvas: tuple[int, int] | None = None
    while reader.pos < reader.end:
        kind = reader.take(4)
        length = int.from_bytes(reader.take(4), "little")
        start = reader.pos
        if kind == b"VP8X":
            flags = reader.take(4)[0]
            if flags & 0x02:
                raise UnsupportedError("WebP animation; wsicodec reads stills")
            if flags & 0x10:
                _check_channels(what, 4)
            width, height = (int.from_bytes(reader.take(3), "little") + 1 for _ in range(2))
            _check_size(what, height, width)
            canvas = height, width
        elif kind in (b"VP8 ", b"VP8L"):
            size = _vp8_size(reader) if kind == b"VP8 " else _vp8l_size(reader)
            _check_size(what, *size)
            if canvas is not None and canvas != size:
                raise FormatError(f"WebP frame of {size[1]} x {size[0]} pixels leaves its canvas")
            if whole and start + length > reader.end:
                raise TruncatedError("WebP ends within its frame")
            return size
        reader.pos = start
        reader.take(length + (length & 1))
    raise FormatError("WebP holds no frame")


def _vp8_size(reader: _Bytes) -> tuple[int, int]:
    if reader.take(3)[0] & 1 or reader.take(3) != b"\x9d\x01\x2a":
        raise FormatError("WebP frame does not start like one")
    width, height = struct.unpack("<HH", reader.take(4))
    return height & 0x3FFF, width & 0x3FFF


def _vp8l_size(reader: _Bytes) -> tuple[int, int]:
    if reader.take(1) != b"\x2f":
        raise FormatError("WebP lossless frame does not start like one")
    bits = _Bits(reader.take(4), "WebP", little=True)
    width, height = bits.read(14) + 1, bits.read(14) + 1
    if bits.read(1):
        _check_channels("WebP", 4)
    if bits.read(3):
        raise FormatError("WebP lossless frame of an unknown version")
    return height, width
