"""Builds a whole slide from real pixels: an SVS of any size with secrets planted everywhere.

    python benchmarks/mosaic.py OUT.svs [--megapixels 400] [--glass 0.4]

What Aperio's scanners write is imitated to the bit where readers look: abbreviated JPEG tiles
beside common tables, levels of a quarter and a sixteenth, a thumbnail and a macro in JPEG strips,
a label in LZW strips, descriptions line by line, an ICC profile. The tissue is a window of a real
slide, mirrored over and over so that it has no seams, cut to the outline of sections; glass has a
gradient and noise. Blocks of 4 x 4 tiles repeat, so few of them are coded and most are copied: the
file is as large as a scanner's and takes seconds to make. Every level is the exact area average of
the decoded level 0, then coded once.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import imagecodecs
import numpy as np
import tifffile

ROOT = Path(__file__).parent.parent
CMU = ROOT / "wsicodec" / "data" / "cmu-1-small-region.svs"
DATA = Path(os.environ.get("WSICODEC_DATA", ROOT.parent / "shared" / "data"))
TCGA = DATA / "slides" / "tcga-cr-7395-01a-01-ts1.svs"

Image = np.ndarray

IN_DESCRIPTION = (
    "ScanScope ID",
    "Filename",
    "Title",
    "Date",
    "Time",
    "User",
    "Barcode",
    "Patient Name",
)

SECRETS: Mapping[str, str] = MappingProxyType(
    {
        "ScanScope ID": "SS12877XT",
        "Filename": "S21-004711-A3",
        "Title": "Mastectomy, Frau Mustermann",
        "Date": "03/17/21",
        "Time": "14:35:52",
        "User": "b414c0de-95c6-48b0-9369-8010ed517ba7",
        "Barcode": "7Q4X-99822-10",
        "Patient Name": "Mustermann^Erika",
        # TIFF tags 315, 316, 33432 of level 0
        "Artist": "Dr. Ingrid Beispiel",
        "Host Computer": "PATHO-PC-0815",
        "Copyright": "Klinikum Musterstadt",
        # a private tag: UTF-8, then UTF-16 of both byte orders
        "vendor tag": "LIMS-Fall-88123-Ä",
        # XMP as TIFF tag 700 and in the JPEG strips of thumbnail and macro
        "XMP": "xmp-creator-Schmidt",
        # Exif in JPEG strips: ASCII and UTF-16
        "Exif serial": "CAM-5583-0091",
        "Exif author": "Jörg Müller-Lüdenscheidt",
        # comments in a JPEG tile of level 0 and in strips of thumbnail and macro
        "JPEG comment": "scanned by station 17 for case 4711",
        # in the device model of the ICC profile, UTF-16 BE
        "ICC profile": "Scanner SN 40021-77",
    }
)
"""Where it is planted -> what. All of it is invented."""

VENDOR_TAG = 61234
LABEL_SHAPE, MACRO_SHAPE = (463, 387), (431, 1280)  # as Aperio's: rows, columns
MACRO_LABEL = 330
"""Columns of the macro that show the label, from the left."""

_BLOCK = 4  # tiles of a block's side: a block becomes one tile of the next level
_ASPECT = 1.35


def build_mosaic(
    path: str | Path,
    megapixels: float = 400,
    *,
    glass: float = 0.4,
    secrets: Mapping[str, str] | None = SECRETS,
    tile_size: int = 240,
    quality: int = 70,
    photometric: str = "ycbcr",
    sections: int = 3,
    label_shape: tuple[int, int] = LABEL_SHAPE,
    seed: int = 0,
) -> Path:
    """Write an SVS like Aperio's to ``path``, which is overwritten; returns the path.

    megapixels: of level 0, at least; sides are not multiples of the tile. glass: share of level 0
    outside of the sections (lumina within them are not counted). secrets: values for the places of
    SECRETS; places left out stay empty, None plants nothing. tile_size: 240 or 256.
    quality: of the JPEG tiles. photometric: ``ycbcr`` (4:2:2, "JPEG/YCC") or ``rgb`` ("JPEG/RGB",
    streams of RGB as in CMU-1). sections: pieces of tissue, side by side. label_shape: rows and
    columns of the label.
    """
    target = Path(path)
    planted = dict(secrets or {})
    rng = np.random.default_rng(seed)
    width = int(np.ceil(np.sqrt(megapixels * 1e6 * _ASPECT))) | 1
    height = int(np.ceil(megapixels * 1e6 / width)) | 1
    plan = _Plan(height, width, tile_size, glass, sections, rng)
    coder = _Coder(quality, photometric)
    blocks = _Blocks(plan, coder, rng)
    head, geometry = _header(plan, quality, photometric)
    pairs = _pairs(planted)
    # a chain has no close(), which tifffile would call at the last tile: the generator must end
    level0 = itertools.chain(blocks.level0(_comment(planted)))
    with tifffile.TiffWriter(target, bigtiff=megapixels > 3000) as writer:
        pyramid: dict[str, Any] = {
            "dtype": "uint8",
            "tile": (tile_size, tile_size),
            "metadata": None,
            "software": False,
            **coder.tags,
        }
        profile = srgb_profile(planted.get("ICC profile"))
        writer.write(
            level0,
            shape=(height, width, 3),
            jpegtables=coder.tables,
            description=_latin(f"{head}\r\n{geometry}{pairs}|ICC Profile = sRGB"),
            iccprofile=profile,
            extratags=_extratags(planted),
            **pyramid,
        )
        for _ in level0:  # the last block's averages are taken after its last tile
            pass
        overview = blocks.level2
        thumbnail = shrink(overview, 1024 / max(overview.shape[:2]))
        rows, columns = thumbnail.shape[:2]
        segments = _strip_segments(planted)
        _write_strips(
            writer,
            thumbnail,
            f"{head}\r\n{width}x{height} -> {columns}x{rows} - {pairs}",
            0,
            segments,
        )
        shape = (height // 4, width // 4, 3)
        note = f"{head}\r\n{width}x{height} ({tile_size}x{tile_size}) -> "
        writer.write(
            iter(blocks.level1_tiles()),
            shape=shape,
            jpegtables=coder.tables,
            description=_latin(f"{note}{shape[1]}x{shape[0]} {coder.name} Q={quality}"),
            subfiletype=0,
            **pyramid,
        )
        writer.write(
            coder.tiles(overview, tile_size),
            shape=overview.shape,
            jpegtables=coder.tables,
            description=_latin(
                f"{note}{overview.shape[1]}x{overview.shape[0]} {coder.name} Q={quality}"
            ),
            subfiletype=0,
            **pyramid,
        )
        writer.write(
            label_image(planted, label_shape),
            rowsperstrip=7,
            photometric="rgb",
            compression="lzw",
            predictor=True,
            description=_latin(f"{head}\r\nlabel {label_shape[1]}x{label_shape[0]}"),
            subfiletype=1,
            metadata=None,
            software=False,
        )
        macro = macro_image(planted, thumbnail)
        text = f"{head}\r\nmacro {MACRO_SHAPE[1]}x{MACRO_SHAPE[0]}"
        _write_strips(writer, macro, text, 9, segments)
    return target


def shrink(image: Image, factor: float) -> Image:
    """Area average of an image to ``factor`` of its size, uint8; ``factor`` at most 1."""
    if factor >= 1:
        return image
    out = image.astype(np.float32)
    for axis in (0, 1):
        length = out.shape[axis]
        edges = np.linspace(0, length, max(1, round(length * factor)) + 1)
        whole = np.insert(np.cumsum(out, axis=axis, dtype=np.float64), 0, 0, axis=axis)
        low = np.minimum(np.floor(edges).astype(int), length - 1)
        part = np.expand_dims(edges - low, tuple(i for i in range(3) if i != axis))
        total = np.take(whole, low, axis) * (1 - part) + np.take(whole, low + 1, axis) * part
        steps = np.diff(edges)
        out = (np.diff(total, axis=axis).swapaxes(axis, -1) / steps).swapaxes(axis, -1)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


class _Plan:
    """Sizes, and where the sections lie.

    alpha: float32, one value for 16 x 16 pixels of level 0 and one more on every side: 1 within a
    section, 0 on glass. rows, columns: of blocks.
    """

    def __init__(
        self,
        height: int,
        width: int,
        tile_size: int,
        glass: float,
        sections: int,
        rng: np.random.Generator,
    ) -> None:
        self.height, self.width, self.tile_size = height, width, tile_size
        self.side = tile_size * _BLOCK
        self.rows, self.columns = -(-height // self.side), -(-width // self.side)
        cells = self.side // 16
        y = np.arange(self.rows * cells + 2)[:, None] * 16.0 / height
        x = np.arange(self.columns * cells + 2)[None, :] * 16.0 / width
        field = np.full((y.size, x.size), -np.inf)
        for section in range(sections):
            centre = (section + 0.5) / sections + rng.uniform(-0.02, 0.02)
            angle = rng.uniform(-0.3, 0.3)
            u = (x - centre) * sections * np.cos(angle) + (y - 0.5) * np.sin(angle)
            v = (y - 0.5) * np.cos(angle) - (x - centre) * sections * np.sin(angle)
            field = np.maximum(field, 1 - np.hypot(u / 0.46, v / 0.48))
        for cell, weight in ((0.25, 0.2), (0.06, 0.06), (0.015, 0.03)):
            step = max(2, int(cell * min(field.shape)))
            field += weight * _noise(field.shape, step, rng)
        inside = field[: -(-height // 16), : -(-width // 16)]
        edge = np.quantile(inside, glass)
        self.alpha = np.clip((field - edge) / 0.01 + 0.5, 0, 1).astype(np.float32)
        if glass >= 1:
            self.alpha[:] = 0
        elif glass <= 0:
            self.alpha[:] = 1

    def block_alpha(self, row: int, column: int) -> Image:
        """The values that a block needs: (side / 16 + 1)^2."""
        cells = self.side // 16
        y, x = row * cells, column * cells
        return self.alpha[y : y + cells + 1, x : x + cells + 1]


class _Coder:
    """JPEG as Aperio keeps it: streams without tables, application data or comments."""

    def __init__(self, quality: int, photometric: str) -> None:
        rgb = {"ycbcr": False, "rgb": True}[photometric]
        self.name = "JPEG/RGB" if rgb else "JPEG/YCC"
        self._arguments = {
            "level": quality,
            "colorspace": "rgb",
            "outcolorspace": "rgb" if rgb else "ycbcr",
            "subsampling": "444" if rgb else "422",
        }
        self.tables, _ = split_jpeg(self._full(np.zeros((16, 16, 3), np.uint8)))
        self.tags = {
            "photometric": "rgb",
            "compression": "jpeg",
            # Aperio's directories claim (2, 2) for streams of RGB
            "subsampling": (2, 2) if rgb else (2, 1),
            "compressionargs": {"outcolorspace": "rgb" if rgb else "ycbcr"},
        }

    def _full(self, image: Image) -> bytes:
        return bytes(imagecodecs.jpeg8_encode(np.ascontiguousarray(image), **self._arguments))

    def code(self, image: Image) -> tuple[bytes, Image]:
        """(abbreviated stream, decoded pixels) of an image."""
        stream = self._full(image)
        return split_jpeg(stream)[1], imagecodecs.jpeg8_decode(stream)

    def tiles(self, image: Image, size: int) -> Iterator[bytes]:
        """Coded tiles of an image; those at the edge repeat its last pixels."""
        height, width = image.shape[:2]
        padded = np.pad(image, ((0, -height % size), (0, -width % size), (0, 0)), mode="edge")
        for y in range(0, height, size):
            for x in range(0, width, size):
                yield split_jpeg(self._full(padded[y : y + size, x : x + size]))[1]


@dataclass(frozen=True)
class _Block:
    """4 x 4 coded tiles, row by row; the block's tile of level 1; its pixels in level 2."""

    tiles: tuple[bytes, ...]
    level1: bytes
    level2: Image


class _Blocks:
    """Makes blocks, each distinct one once. level2: pixels of the coarsest level."""

    def __init__(self, plan: _Plan, coder: _Coder, rng: np.random.Generator) -> None:
        self._plan, self._coder = plan, coder
        self._tissue, self._glass_colour = _tissue_window(plan.side)
        # large soft noise and a little grain: what a camera sees where there is nothing
        self._grain = (
            0.8 * _noise((plan.side, plan.side), 60, rng).repeat(3, axis=1)
            + rng.normal(0, 1.3, (plan.side, 3 * plan.side))
        ).astype(np.float32)
        self._buffers = np.empty_like(self._grain), np.empty_like(self._grain)
        self._made: dict[tuple[Any, ...], _Block] = {}
        self._level1: list[bytes] = []
        self.level2 = np.empty((plan.height // 16, plan.width // 16, 3), np.uint8)

    def level0(self, comment: bytes) -> Iterator[bytes]:
        """Tiles of level 0 in raster order; ``comment`` goes into the first of them."""
        plan = self._plan
        rows, columns = -(-plan.height // plan.tile_size), -(-plan.width // plan.tile_size)
        cells = plan.side // 16
        for block_row in range(plan.rows):
            blocks = [self._block(block_row, column) for column in range(plan.columns)]
            for row in range(min(_BLOCK, rows - block_row * _BLOCK)):
                for column in range(columns):
                    tile = blocks[column // _BLOCK].tiles[row * _BLOCK + column % _BLOCK]
                    first = not block_row and not row and not column
                    yield tile[:2] + comment + tile[2:] if first else tile
            self._level1 += [block.level1 for block in blocks]
            for column, block in enumerate(blocks):
                y, x = block_row * cells, column * cells
                part = self.level2[y : y + cells, x : x + cells]
                part[:] = block.level2[: part.shape[0], : part.shape[1]]

    def level1_tiles(self) -> Iterator[bytes]:
        """Tiles of level 1 in raster order, once level 0 is written."""
        plan = self._plan
        for row in range(-(-(plan.height // 4) // plan.tile_size)):
            for column in range(-(-(plan.width // 4) // plan.tile_size)):
                yield self._level1[row * plan.columns + column]

    def _block(self, row: int, column: int) -> _Block:
        alpha = self._plan.block_alpha(row, column)
        rows, columns = self._tissue.shape[0], self._tissue.shape[1]
        source = row % (2 * rows), column % (2 * columns)
        # the gradient of the illumination: glass has its own blocks in every column
        if not alpha.any():
            key: tuple[Any, ...] = ("glass", column, row % 2)
        elif alpha.min() == 1:
            key = ("tissue", *source)
        else:
            key = ("edge", row, column)
        if key not in self._made:
            made = self._make(self._pixels(alpha, source, row, column))
            if key[0] == "edge":
                return made
            self._made[key] = made
        return self._made[key]

    def _pixels(self, alpha: Image, source: tuple[int, int], row: int, column: int) -> Image:
        tissue = self._mirrored(*source)
        if alpha.min() == 1:
            return tissue
        across = column / max(1, self._plan.columns - 1)
        colour = np.asarray(self._glass_colour, np.float32) - np.float32([3, 3, 2]) * across
        side, cells = self._plan.side, self._plan.side // 16
        # rows of 3 x side samples, and no new arrays: both cost more than the arithmetic
        glass, rest = self._buffers
        every = np.tile(colour + np.float32(0.5), side)
        np.add(self._grain[:: -1 if row % 2 else 1], every, out=glass)
        if alpha.any():
            place = np.arange(side) / 16
            low = place.astype(int)
            weights = np.zeros((side, cells + 1), np.float32)
            weights[np.arange(side), low] = 1 - (place - low)
            weights[np.arange(side), low + 1] += place - low
            rest[:] = tissue.reshape(side, 3 * side)
            rest -= glass
            rest *= (weights @ alpha @ weights.T).repeat(3, axis=1)
            glass += rest
        np.clip(glass, 0, 255, out=glass)
        return glass.astype(np.uint8).reshape(side, side, 3)

    def _mirrored(self, row: int, column: int) -> Image:
        rows, columns = self._tissue.shape[:2]
        flip_y, flip_x = row >= rows, column >= columns
        block = self._tissue[
            2 * rows - 1 - row if flip_y else row, 2 * columns - 1 - column if flip_x else column
        ]
        return block[:: -1 if flip_y else 1, :: -1 if flip_x else 1]

    def _make(self, pixels: Image) -> _Block:
        size = self._plan.tile_size
        decoded = np.empty_like(pixels)
        tiles = []
        for y in range(0, pixels.shape[0], size):
            for x in range(0, pixels.shape[1], size):
                stream, back = self._coder.code(pixels[y : y + size, x : x + size])
                tiles.append(stream)
                decoded[y : y + size, x : x + size] = back
        sums = block_sums(decoded)
        level1 = ((sums + 8) // 16).astype(np.uint8)
        level2 = ((block_sums(sums).astype(np.uint32) + 128) // 256).astype(np.uint8)
        return _Block(tuple(tiles), self._coder.code(level1)[0], level2)


def block_sums(image: Image) -> Image:
    """Sums of 4 x 4 pixels, uint16; sides must be multiples of 4, values at most 4095."""
    rows = image[0::4].astype(np.uint16)
    for offset in (1, 2, 3):
        rows += image[offset::4]
    total = rows[:, 0::4].copy()
    for offset in (1, 2, 3):
        total += rows[:, offset::4]
    return total


@functools.lru_cache(maxsize=1)
def _tissue_window(side: int) -> tuple[Image, tuple[float, ...]]:
    """Blocks (rows, columns, side, side, 3) of the fullest window of a slide; its glass colour."""
    image = tifffile.imread(TCGA if TCGA.is_file() else CMU, key=0)
    rows, columns = min(2, image.shape[0] // side), min(4, image.shape[1] // side)
    small = image[: image.shape[0] // 16 * 16 : 16, : image.shape[1] // 16 * 16 : 16]
    bright = small.min(-1) > 225
    glass = bright & (small.min(-1) < 250)  # what was not scanned is white
    colour = np.median(small[glass], axis=0) if glass.any() else np.array([243, 241, 243])
    full = np.pad((~bright).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    tall, wide = rows * side // 16, columns * side // 16
    count = full[tall:, wide:] - full[:-tall, wide:] - full[tall:, :-wide] + full[:-tall, :-wide]
    y, x = (int(16 * i) for i in np.unravel_index(np.argmax(count), count.shape))
    window = image[y : y + rows * side, x : x + columns * side]
    blocks = window.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return np.ascontiguousarray(blocks), tuple(float(value) for value in colour)


def _noise(shape: tuple[int, ...], step: int, rng: np.random.Generator) -> Image:
    """Smooth noise: normal values every ``step``, straight lines between."""
    coarse = rng.normal(size=(shape[0] // step + 2, shape[1] // step + 2))
    for axis, length in enumerate(shape[:2]):
        place = np.arange(length) / step
        low = place.astype(int)
        part = (place - low)[:, None] if axis == 0 else (place - low)[None, :]
        coarse = np.take(coarse, low, axis) * (1 - part) + np.take(coarse, low + 1, axis) * part
    return coarse


def split_jpeg(stream: bytes) -> tuple[bytes, bytes]:
    """(tables, abbreviated stream) of a JPEG stream; application data and comments are dropped."""
    tables, rest, position = b"", b"", 2
    while True:
        marker = stream[position + 1]
        end = position + 2 + int.from_bytes(stream[position + 2 : position + 4])
        if marker in (0xDB, 0xC4):
            tables += stream[position:end]
        elif marker == 0xDA:
            rest += stream[position:]
            return b"\xff\xd8" + tables + b"\xff\xd9", b"\xff\xd8" + rest
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            rest += stream[position:end]
        position = end


def _write_strips(
    writer: tifffile.TiffWriter, image: Image, text: str, subfiletype: int, segments: bytes
) -> None:
    """An image in JPEG strips of 16 rows; ``segments`` go into the first strip."""
    coder = _Coder(80, "rgb")
    strips = []
    for y in range(0, image.shape[0], 16):
        strip, _ = coder.code(image[y : y + 16])
        strips.append(strip if y else strip[:2] + segments + strip[2:])
    writer.write(
        iter(strips),
        shape=image.shape,
        dtype="uint8",
        rowsperstrip=16,
        jpegtables=coder.tables,
        description=_latin(text),
        subfiletype=subfiletype,
        metadata=None,
        software=False,
        **coder.tags,
    )


def _header(plan: _Plan, quality: int, photometric: str) -> tuple[str, str]:
    head = "Aperio Image Library v12.0.15 "
    coding = f"{'JPEG/RGB' if photometric == 'rgb' else 'JPEG/YCC'} Q={quality}"
    size = f"{plan.width}x{plan.height}"
    geometry = f"{plan.width + 920}x{plan.height + 100} [0,100 {size}] "
    return head, f"{geometry}({plan.tile_size}x{plan.tile_size}) {coding}"


def _pairs(planted: Mapping[str, str]) -> str:
    pairs = {"AppMag": "20", "StripeWidth": "2040"}
    pairs.update({key: planted[key] for key in IN_DESCRIPTION if key in planted})
    pairs.update(
        {
            "Parmset": "USM Filter",
            "MPP": "0.4990",
            "Left": "25.691574",
            "Top": "23.449873",
            "LineCameraSkew": "-0.000424",
            "Focus Offset": "0.000000",
            "Filtered": "5",
        }
    )
    return "".join(f"|{key} = {value}" for key, value in pairs.items())


def _latin(text: str) -> bytes:
    return text.encode("utf-8")


def _extratags(planted: Mapping[str, str]) -> list[tuple[int, int, int, Any, bool]]:
    tags: list[tuple[int, int, int, Any, bool]] = []
    for code, place in ((315, "Artist"), (316, "Host Computer"), (33432, "Copyright")):
        if place in planted:
            tags.append((code, 2, 0, planted[place], True))
    if "Date" in planted:
        month, day, year = planted["Date"].split("/")
        date = f"20{year}:{month}:{day} {planted.get('Time', '00:00:00')}"
        tags.append((306, 2, 20, date, True))
    if "XMP" in planted:
        packet = _xmp(planted["XMP"])
        tags.append((700, 1, len(packet), packet, True))
    if "vendor tag" in planted:
        text = planted["vendor tag"]
        value = b"VENDOR\0" + b"\0\0".join(
            text.encode(code) for code in ("utf-8", "utf-16-le", "utf-16-be")
        )
        tags.append((VENDOR_TAG, 7, len(value), value, True))
    return tags


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def _comment(planted: Mapping[str, str]) -> bytes:
    text = planted.get("JPEG comment")
    return b"" if text is None else _segment(0xFE, text.encode())


def _xmp(creator: str) -> bytes:
    return (
        '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        f'xmlns:dc="http://purl.org/dc/elements/1.1/" dc:creator="{creator}"/></rdf:RDF>'
        '</x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def _strip_segments(planted: Mapping[str, str]) -> bytes:
    """Exif, XMP and a comment, as JPEG segments."""
    segments = b""
    entries = []
    for code, place, kind, coded in (
        (0x9C9D, "Exif author", 1, "utf-16-le"),  # XPAuthor
        (0xA431, "Exif serial", 2, "utf-8"),  # BodySerialNumber
    ):
        if place in planted:
            entries.append((code, kind, planted[place].encode(coded) + b"\0\0"))
    if entries:
        start = 8 + 2 + 12 * len(entries) + 4
        directory, values = struct.pack("<H", len(entries)), b""
        for code, kind, value in entries:
            directory += struct.pack("<HHII", code, kind, len(value), start + len(values))
            values += value
        exif = b"II*\0\x08\0\0\0" + directory + b"\0\0\0\0" + values
        segments += _segment(0xE1, b"Exif\0\0" + exif)
    if "XMP" in planted:
        segments += _segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + _xmp(planted["XMP"]))
    return segments + _comment(planted)


def label_image(planted: Mapping[str, str], shape: tuple[int, int] = LABEL_SHAPE) -> Image:
    """The paper label: what is planted, printed."""
    lines = [planted.get(key, "") for key in ("Barcode", "Patient Name", "Filename", "Date")]
    return _paper(shape, lines)


def macro_image(planted: Mapping[str, str], thumbnail: Image) -> Image:
    """The whole glass: the label at its left end, the sections on the rest."""
    height, width = MACRO_SHAPE
    rng = np.random.default_rng(7)
    glass = np.median(thumbnail[[0, -1]].reshape(-1, 3), axis=0)
    image = rng.normal(glass, 1.5, (height, width, 3))
    lines = [planted.get(key, "") for key in ("Barcode", "Patient Name", "Date")]
    image[:, :MACRO_LABEL] = _paper((height, MACRO_LABEL), lines)
    small = shrink(thumbnail, min(1.0, (height - 80) / max(thumbnail.shape[:2])))
    y = (height - small.shape[0]) // 2
    x = MACRO_LABEL + 250
    image[y : y + small.shape[0], x : x + small.shape[1]] = small
    return np.clip(image, 0, 255).astype(np.uint8)


def _paper(shape: tuple[int, int], lines: list[str]) -> Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(shape[1] / 100, shape[0] / 100), dpi=100, facecolor="#fdfbe8")
    for index, line in enumerate(lines):
        # a dollar sign would start mathematics
        text = line.replace("$", r"\$")
        figure.text(0.04, 0.85 - 0.2 * index, text, fontsize=14, family="monospace")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[: shape[0], : shape[1], :3].copy()


def srgb_profile(model: str | None = None) -> bytes:
    """A real sRGB profile; ``model`` becomes its device model, in UTF-16 BE as ICC has it."""
    profile = bytes(imagecodecs.cms_profile("srgb"))
    # the library writes the time of the call
    profile = profile[:24] + struct.pack(">6H", 2016, 5, 4, 0, 0, 0) + profile[36:]
    if model is None:
        return profile
    coded = model.encode("utf-16-be")
    text = b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(coded), 28) + coded
    return with_profile_tag(profile, b"dmdd", text)


def with_profile_tag(profile: bytes, name: bytes, value: bytes) -> bytes:
    """An ICC profile with one tag more, or another value of a tag that it has."""
    tags = profile_tags(profile)
    tags[name] = value
    table, data = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for key, content in tags.items():
        table += struct.pack(">4sII", key, start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    whole = profile[:128] + table + data
    return struct.pack(">I", len(whole)) + whole[4:]


def profile_tags(profile: bytes) -> dict[bytes, bytes]:
    """Tags of an ICC profile."""
    (count,) = struct.unpack_from(">I", profile, 128)
    tags = {}
    for index in range(count):
        name, offset, length = struct.unpack_from(">4sII", profile, 132 + 12 * index)
        tags[name] = profile[offset : offset + length]
    return tags


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description="Build an SVS of any size from real pixels, with invented secrets planted.",
        epilog="example: python benchmarks/mosaic.py mosaic.svs --megapixels 400 --glass 0.4",
    )
    parser.add_argument("out", type=Path, help="SVS to write; replaced where it exists")
    parser.add_argument("--megapixels", type=float, default=400, help="of level 0 (default: 400)")
    parser.add_argument(
        "--glass", type=float, default=0.4, help="share of level 0 outside of tissue (default: 0.4)"
    )
    parser.add_argument("--tile-size", type=int, default=240, choices=(240, 256))
    parser.add_argument("--quality", type=int, default=70, help="of the JPEG tiles (default: 70)")
    parser.add_argument("--photometric", choices=("ycbcr", "rgb"), default="ycbcr")
    parser.add_argument("--no-secrets", action="store_true", help="plant nothing")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.glass <= 1 or not 0.05 <= arguments.megapixels <= 1e5:
        parser.error("--glass is 0 ... 1, --megapixels 0.05 ... 100000")
    path = build_mosaic(
        arguments.out,
        arguments.megapixels,
        glass=arguments.glass,
        secrets=None if arguments.no_secrets else SECRETS,
        tile_size=arguments.tile_size,
        quality=arguments.quality,
        photometric=arguments.photometric,
    )
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
