"""White tiles in the coding of the tiles around them, for those that a file leaves out.

A scanner leaves out what is glass. Most readers paint a tile without bytes black.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from wsicodec.errors import FormatError, UnsupportedError
from wsicodec.slide.jpegstream import END, segments, with_tables
from wsicodec.slide.protocol import StoredLayout

_JPEG, _APERIO_YCBCR, _WSICODEC = 7, 33003, 60642
_YCBCR = 6
_LOSSLESS: dict[int, dict[str, Any]] = {  # what tifffile needs to be told
    33003: {"level": 0},
    33004: {"level": 0},
    33005: {"level": 0, "codecformat": "j2k"},
    34712: {"level": 0},
    50001: {"lossless": True},
    50002: {"lossless": True},
    52546: {"lossless": True},
}


def white_segment(layout: StoredLayout, height: int, width: int, like: bytes | None) -> bytes:
    """A segment of ``height`` x ``width`` white pixels, to stand among the directory's other ones.

    like: another segment of the directory, which JPEG needs: readers of TIFF keep one set of JPEG
    tables for a whole directory, so a tile that brings its own would spoil those behind it.

    Raises UnsupportedError for codings that cannot be made.
    """
    if layout.compression == _JPEG:
        if like is None:
            raise UnsupportedError("all tiles are left out, there is none to make a white one like")
        try:
            return _white_jpeg(layout, height, width, like)
        except (FormatError, IndexError) as error:
            raise UnsupportedError(f"no white JPEG tile can be made: {error}") from None
    colour = (255, 128, 128) if layout.compression == _APERIO_YCBCR else (255, 255, 255)
    pixels = np.full((height, width, 3), colour, np.uint8)
    if layout.compression == _WSICODEC:
        from wsicodec.codec.constant import encode_constant

        return encode_constant(pixels).pack()
    return _by_tifffile(layout, pixels)


def _by_tifffile(layout: StoredLayout, pixels: np.ndarray[Any, Any]) -> bytes:
    import tifffile

    file = io.BytesIO()
    try:
        tifffile.imwrite(
            file,
            pixels,
            photometric="rgb",
            compression=layout.compression,
            compressionargs=_LOSSLESS.get(layout.compression),
            predictor=None if layout.predictor == 1 else layout.predictor,
            rowsperstrip=pixels.shape[0],
            metadata=None,
        )
        file.seek(0)
        with tifffile.TiffFile(file) as tiff:
            page = tiff.pages.first
            file.seek(page.dataoffsets[0])
            return file.read(page.databytecounts[0])
    except Exception as error:
        raise UnsupportedError(
            f"no white tile of compression {layout.compression} can be made: {error}"
        ) from error


def _white_jpeg(layout: StoredLayout, height: int, width: int, like: bytes) -> bytes:
    """Headers of another tile, and a scan in which every block is white.

    Sequential JPEG with all components in one scan (T.81, F.1 and F.2). The DC step may not divide
    white: it is rounded up, and what exceeds white is cut off by every decoder.
    """
    whole = with_tables(layout.jpegtables, like)
    steps: dict[int, int] = {}
    codes: dict[int, dict[int, str]] = {}
    frame, scan, head = b"", b"", 2
    for marker, start, end in segments(like):
        if marker == 0xDA:
            length = int.from_bytes(like[start + 2 : start + 4])
            head = start + 2 + length
            scan = like[start + 4 : head]
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC0, 0xC1, 0xC4, 0xC8, 0xCC):
            raise FormatError("its like is neither baseline nor sequential")
        if marker in (0xC0, 0xC1):
            frame = like[start + 4 : end]
        if marker == 0xDD and like[start + 4 : end] != b"\0\0":
            raise FormatError("its like has restart markers")
    for marker, start, end in segments(whole):
        if marker == 0xDB:
            steps.update(_dc_steps(whole[start + 4 : end]))
        elif marker == 0xC4:
            codes.update(_huffman_codes(whole[start + 4 : end]))
        elif marker == 0xDA:
            break
    if len(frame) < 15 or frame[0] != 8 or frame[5] != 3 or len(scan) < 10 or scan[0] != 3:
        raise FormatError("its like has no 8-bit frame of three components in one scan")
    if (int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])) != (height, width):
        raise FormatError("its like has another size")
    first, others = "", ""
    factors = [(frame[7 + 3 * i] >> 4, frame[7 + 3 * i] & 15) for i in range(3)]
    for i, (across, down) in enumerate(factors):
        dc, ac = codes.get(scan[2 + 2 * i] >> 4), codes.get(16 | scan[2 + 2 * i] & 15)
        step = steps.get(frame[8 + 3 * i])
        if not (dc and ac and step and across and down):
            raise FormatError("its like lacks tables or sampling factors")
        white = layout.photometric != _YCBCR or i == 0
        value = -(-(255 - 128) * 8 // step) if white else 0
        size = value.bit_length()
        if size not in dc or 0 not in dc or 0 not in ac:
            raise FormatError("the Huffman tables have no code for it")
        same = dc[0] + ac[0]
        first += dc[size] + (f"{value:0{size}b}" if size else "") + ac[0]
        first += same * (across * down - 1)
        others += same * (across * down)
    across, down = (max(pair) for pair in zip(*factors, strict=True))
    units = -(-width // (8 * across)) * -(-height // (8 * down))
    bits = first + others * (units - 1)
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8).replace(b"\xff", b"\xff\x00")
    return like[:head] + data + END


def _dc_steps(body: bytes) -> dict[int, int]:
    """Quantiser step of the constant part, by the number of the table."""
    steps: dict[int, int] = {}
    while body:
        wide = body[0] >> 4
        steps[body[0] & 15] = int.from_bytes(body[1:3]) if wide else body[1]
        body = body[129 if wide else 65 :]
    return steps


def _huffman_codes(body: bytes) -> dict[int, dict[int, str]]:
    """Code words as strings of bits, by class (16 for AC) and number of the table (T.81, C.2)."""
    tables: dict[int, dict[int, str]] = {}
    while body:
        counts, position, code = body[1:17], 17, 0
        words: dict[int, str] = {}
        for length, count in enumerate(counts, 1):
            for _ in range(count):
                words[body[position]] = f"{code:0{length}b}"
                position += 1
                code += 1
            code <<= 1
        tables[body[0] & 31] = words
        body = body[position:]
    return tables
