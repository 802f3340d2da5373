"""A second decoder of wsicodec tiles, written from docs/format.md and nothing else.

Plain Python and NumPy: symbols by Python integers, networks by int64 arrays, pixels by float64.
It is slow on purpose and shares no line with the package, so that what both decode alike is what
the document says. Every function names the heading that it follows. ``onnx`` parses the graphs'
protobuf; modes 2 to 6 hold somebody else's stream, which ``imagecodecs`` decodes.

Models are given by a caller who vouches for them: the proof that section "Integer networks" asks
of a reader is not here, but the interpreter refuses operators that no graph may hold and checks
every sum that it forms.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import struct
import zlib
from dataclasses import dataclass, field, replace

import imagecodecs
import numpy as np
import onnx


class RefusedError(ValueError):
    """Input that a compliant decoder must refuse."""


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise RefusedError(reason)


# --------------------------------------------------------------------------------------------- Tile

MODES = {
    0: "constant", 1: "learned", 2: "jpegxl", 3: "jpeg", 4: "jpeg2000", 5: "lossless",
    6: "transcoded",
}  # fmt: skip


@dataclass
class Cell:
    """What one cell's symbols said, for comparison: arrays as the document names them.

    Those of a stage are (channels, positions of its lattice), in coding order.
    """

    z: np.ndarray
    effective: np.ndarray
    turn: tuple[int, int, int]
    classes: list[np.ndarray] = field(default_factory=list)
    means: list[np.ndarray | None] = field(default_factory=list)
    quantisers: list[np.ndarray] = field(default_factory=list)
    indices: list[np.ndarray] = field(default_factory=list)
    levels: list[np.ndarray] = field(default_factory=list)
    sums: np.ndarray | None = None
    """Of the absolute latents of every position."""


@dataclass
class Decoded:
    """A decoded tile: uint8 pixels (rows, columns, 3), and the cells of mode ``learned``."""

    pixels: np.ndarray
    mode: str
    cells: list[Cell]
    real: np.ndarray | None = None
    """Mode ``learned``: the samples before rounding and clipping, float64."""
    free: np.ndarray | None = None
    """Mode ``learned``: (rows, columns) bool, the pixels of which the tolerance asks nothing."""


def decode(data: bytes, models: list[bytes]) -> Decoded:
    """Section "Tile". ``models`` are the files of the decoder models that are installed."""
    require(len(data) >= 18, "fewer bytes than the header")
    magic, version, mode, height, width, length, crc = struct.unpack("<4sBBHHII", data[:18])
    require(magic == bytes.fromhex("57 53 43 1A"), "magic")
    require(version == 1, "version")
    require(mode in MODES, "mode")
    require(1 <= height <= 4096 and 1 <= width <= 4096, "height or width")
    require(length <= 2**28, "length")
    require(len(data) == 18 + length, "number of bytes")
    require(crc == zlib.crc32(data[18:], zlib.crc32(data[:14])), "crc")

    payload = data[18:]
    if MODES[mode] == "constant":  # section "Modes"
        require(length == 3, "length of mode constant")
        colour = np.frombuffer(payload, np.uint8)
        return Decoded(np.broadcast_to(colour, (height, width, 3)).copy(), "constant", [])
    if MODES[mode] == "learned":
        return decode_learned(payload, height, width, models)
    return Decoded(decode_foreign(payload, MODES[mode], height, width), MODES[mode], [])


# -------------------------------------------------------------------------------------------- Modes


def decode_foreign(stream: bytes, mode: str, height: int, width: int) -> np.ndarray:
    """Section "Modes": the size is compared before a pixel is decoded."""
    if mode == "transcoded":
        require(jpegxl_size(stream) == (height, width), "transcoded JPEG of another size")
        stream, mode = jpeg_of_jpegxl(stream, 6 * height * width + 65536), "jpeg"
    size = {
        "jpegxl": jpegxl_size,
        "lossless": jpegxl_size,
        "jpeg": jpeg_size,
        "jpeg2000": jpeg2000_size,
    }[mode](stream)
    require(size == (height, width), f"{mode} stream of another size: {size}")
    read = {
        "jpegxl": imagecodecs.jpegxl_decode,
        "lossless": imagecodecs.jpegxl_decode,
        "jpeg": imagecodecs.jpeg8_decode,
        "jpeg2000": imagecodecs.jpeg2k_decode,
    }[mode]
    try:
        pixels = read(stream)
    except Exception as error:
        raise RefusedError(f"{mode} stream: {error}") from error
    fits = pixels.dtype == np.uint8 and pixels.shape == (height, width, 3)
    require(fits, f"{mode} stream is not 8-bit RGB")
    return pixels


def jpeg_of_jpegxl(stream: bytes, most: int) -> bytes:
    """Section "Transcoded JPEG"."""
    head = "0000000c4a584c200d0a870a00000014667479706a786c20000000006a786c20"
    require(stream[:32] == bytes.fromhex(head), "transcoded JPEG is no JPEG XL container")
    at, boxes, levels = 32, [], 0
    while at < len(stream):
        require(at + 8 <= len(stream), "JPEG XL box")
        size, kind = struct.unpack(">I4s", stream[at : at + 8])
        start = at + 8
        if size == 1:
            require(at + 16 <= len(stream), "JPEG XL box")
            (size,) = struct.unpack(">Q", stream[start : start + 8])
            start += 8
        end = at + size if size else len(stream)
        require(start <= end <= len(stream), "JPEG XL box")
        require(kind in (b"jxll", b"jxlc", b"jxlp", b"jbrd"), f"box {kind!r}")
        levels += kind == b"jxll"
        require(kind != b"jxll" or (levels == 1 and end - start == 1), "box jxll")
        boxes += [stream[start:end]] if kind == b"jbrd" else []
        at = end
    require(len(boxes) == 1, "boxes jbrd")
    markers, bits = [], "".join(f"{byte:08b}"[::-1] for byte in boxes[0][:1024])[1:]
    while 0x19 not in markers:  # EOI - 0xC0
        require(len(bits) >= 6, "list of markers")
        markers.append(int(bits[:6][::-1], 2))
        bits = bits[6:]
    require(sum(0x20 <= m <= 0x2F or m >= 0x3E for m in markers) <= 64, "segments of other data")
    require(markers.count(0x1A) <= 100, "scans")
    try:
        jpeg = bytes(imagecodecs.jpegxl_decode_jpeg(stream))
    except Exception as error:
        raise RefusedError(f"transcoded JPEG: {error}") from error
    require(len(jpeg) <= most, "transcoded JPEG is too long")
    return jpeg


def jpegxl_size(stream: bytes) -> tuple[int, int]:
    """(rows, columns) of a JPEG XL codestream, bare or in a container (ISO 18181-1, SizeHeader)."""
    if stream[:12] == bytes.fromhex("0000000C4A584C200D0A870A"):
        stream = jpegxl_codestream(stream)
    require(stream[:2] == b"\xff\x0a", "not a JPEG XL codestream")
    bits = int.from_bytes(stream[2:18].ljust(16, b"\0"), "little")

    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if small else take((9, 13, 18, 30)[take(2)]) + 1

    rows = side()
    ratio = take(3)
    across, down = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio]
    return rows, rows * across // down if ratio else side()


def jpegxl_codestream(stream: bytes) -> bytes:
    """The codestream of a JPEG XL container, or as much of it as its first box holds."""
    at = 0
    while at + 8 <= len(stream):
        size, kind = struct.unpack(">I4s", stream[at : at + 8])
        start = at + 8
        if size == 1:
            (size,) = struct.unpack(">Q", stream[start : start + 8].ljust(8, b"\0"))
            start += 8
        end = at + size if size else len(stream)
        require(end > at + 7, "JPEG XL box")
        if kind in (b"jxlc", b"jxlp"):
            return stream[start + (4 if kind == b"jxlp" else 0) : end]
        at = end
    raise RefusedError("no JPEG XL codestream in its container")


def jpeg_size(stream: bytes) -> tuple[int, int]:
    """(rows, columns) of a JPEG stream, from its frame header (ISO 10918-1, B.2.2).

    Libraries fill up a stream that was cut: its end marker must be there.
    """
    require(stream[:2] == b"\xff\xd8", "not a JPEG stream")
    require(stream.rfind(b"\xff\xd9") > 0, "JPEG stream ends early")
    at = 2
    while at + 4 <= len(stream):
        require(stream[at] == 0xFF, "JPEG marker")
        marker = stream[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            require(at + 9 <= len(stream), "JPEG frame header")
            return struct.unpack(">HH", stream[at + 5 : at + 9])
        else:
            at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    raise RefusedError("JPEG stream without a frame header")


def jpeg2000_size(stream: bytes) -> tuple[int, int]:
    """(rows, columns) of a JPEG 2000 codestream, from its SIZ segment (ISO 15444-1, A.5)."""
    at = stream.find(bytes.fromhex("FF4FFF51"))
    require(at >= 0 and len(stream) >= at + 24, "not a JPEG 2000 codestream")
    columns, rows, left, top = struct.unpack(">IIII", stream[at + 8 : at + 24])
    return rows - top, columns - left


# ----------------------------------------------------------------------------------- Learned header


def decode_learned(rest: bytes, height: int, width: int, models: list[bytes]) -> Decoded:
    """Sections "Learned header" and "Cells". ``rest`` is the tile from offset 18 on."""
    require(len(rest) >= 6, "learned header")
    digest, gain, packed = rest[:4], rest[4], rest[5]
    stages, log_lanes = packed & 15, packed >> 4 & 7
    require(log_lanes <= 5, "lanes")
    tilt, payload = 0, rest[6:]
    if packed >> 7:
        require(len(payload) >= 1, "tilt")
        tilt, payload = payload[0], payload[1:]
        require(1 <= tilt <= 16, "tilt")
    found = [file for file in models if hashlib.sha256(file).digest()[:4] == digest]
    require(bool(found), "no such model")
    model = read_model(found[0])
    require(1 <= stages <= len(model.stages), "stages")
    model = tilted(model, tilt)

    # section "Cells": row by row
    places = [(top, left) for top in range(0, height, 512) for left in range(0, width, 512)]
    turns, stream = read_turns(payload, len(places))
    coder = Decoder(stream, 1 << log_lanes)
    cells = []
    real = np.zeros((height, width, 3))
    free = np.zeros((height, width), bool)
    for (top, left), turn in zip(places, turns, strict=True):
        h, w = min(512, height - top), min(512, width - left)
        cell, samples = decode_cell(coder, model, (h, w), gain, stages, turn)
        cells.append(cell)
        real[top : top + h, left : left + w] = samples
        free[top : top + h, left : left + w] = free_pixels(model, cell)[:h, :w]
    coder.end()
    pixels = np.clip(np.rint(real + 128), 0, 255).astype(np.uint8)
    return Decoded(pixels, "learned", cells, real + 128, free)


# --------------------------------------------------------------------------------------------- Gain

# fmt: off
OCTAVE = np.array([
    32768, 33486, 34219, 34968, 35734, 36516, 37316, 38133, 38968, 39821, 40693, 41584, 42495,
    43425, 44376, 45348, 46341, 47356, 48393, 49452, 50535, 51642, 52773, 53928, 55109, 56316,
    57549, 58809, 60097, 61413, 62757, 64132,
], np.int64)
# fmt: on


# ---------------------------------------------------------------------------------- Learned payload


def read_turns(payload: bytes, cells: int) -> tuple[list[tuple[int, int, int]], bytes]:
    """Section "Learned payload": the turns of all cells, and the entropy-coded stream."""
    require(len(payload) >= 3 * cells, "payload ends among the turns")
    return list(struct.iter_unpack("<3b", payload[: 3 * cells])), payload[3 * cells :]


def decode_cell(
    coder: Decoder,
    model: Model,
    size: tuple[int, int],
    gain: int,
    stages: int,
    turn: tuple[int, int, int],
) -> tuple[Cell, np.ndarray]:
    """Section "Learned payload": one cell's symbols, then its samples (h, w, 3) less 128."""
    h, w = size
    rows, columns = math.ceil(h / 16), math.ceil(w / 16)
    z, hyper, effective = decode_hyper(coder, model, rows, columns, gain)
    cell = Cell(z, effective, turn)

    # section "Stages"
    v = np.zeros((len(model.order), rows, columns), np.int64)
    context = np.zeros((model.context_channels, rows, columns), np.int64)
    before = 0
    for k, (first, count, lattice) in enumerate(model.stages[:stages]):
        inputs = {"h": hyper, "plane": effective[None]}
        if k > 0:
            inputs["context"] = context[: min(before, model.context_channels)]
        outputs = run_graph(model.graphs[f"stage{k}"], inputs)
        shape = (count, rows, columns)
        require(outputs["class"].shape == shape, "shape of class")
        at = lattice_positions(lattice, rows, columns)
        classes = tilted_classes(model, first, outputs["class"][:, *at])
        mean = None
        if k < model.mean_stages:
            require(outputs["mean"].shape == shape, "shape of mean")
            mean = outputs["mean"][:, *at]
        cell.classes.append(classes)
        cell.means.append(mean)
        indices, quantisers = coder.indices(model, classes, cell)
        levels = levels_of(indices, quantisers)
        cell.indices.append(indices)
        cell.quantisers.append(quantisers)
        cell.levels.append(levels)

        here = effective[at]
        for i in range(count):
            c = first + i
            value = 8 * levels[i]
            if mean is not None:
                value = value + mean_of_channel(model, c, mean[i], here)
            v[c][at] = value
            if c < model.context_channels:
                mirrored = 255 - here
                t = 35 - (mirrored >> 5)
                product = value * int(model.context_factor[c]) * OCTAVE[mirrored & 31]
                context[c][at] = np.clip((product + (1 << t - 1)) >> t, -127, 127)

        before = first + count
    y = latents(model, v, context, effective)
    cell.sums = np.abs(y).sum(axis=0)
    return cell, synthesise(model, y, turn)[:h, :w]


def lattice_positions(lattice: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Section "Learned payload": rows and columns of a lattice's positions, in their order."""
    found = [(row, column) for row in range(rows) for column in range(columns)]
    if lattice:  # one (row, column) parity after the other
        parities = {1: [(0, 0)], 2: [(1, 1)], 3: [(0, 1), (1, 0)]}[lattice]
        found = [p for parity in parities for p in found if (p[0] % 2, p[1] % 2) == parity]
    where = np.array(found, np.int64).reshape(-1, 2)
    return where[:, 0], where[:, 1]


def mean_of_channel(
    model: Model, channel: int, mean: np.ndarray, effective: np.ndarray
) -> np.ndarray:
    """Section "Stages": m, in sixteenths of a step."""
    s = 31 - (effective >> 5)
    product = mean * int(model.mean_factor[channel]) * OCTAVE[effective & 31]
    return (product + (1 << s - 1)) >> s


def decode_hyper(
    coder: Decoder, model: Model, rows: int, columns: int, gain: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Section "Hyper-latents": z, the channels ``h``, the effective gain index E by position."""
    down, across = math.ceil(rows / 2), math.ceil(columns / 2)
    classes = np.empty((model.z_channels, down, across), np.int64)
    classes[:] = model.z_classes[gain].astype(np.int64)[:, None, None]
    z = coder.hyper_latents(model, classes)
    plane = np.full((1, 2 * down, 2 * across), gain, np.int64)
    outputs = run_graph(model.graphs["hyper"], {"z": z, "plane": plane})
    hyper = outputs["h"][:, :rows, :columns]
    step = outputs["step"][0, :rows, :columns]
    return z, hyper, np.clip(gain + step, 0, 255)


# --------------------------------------------------------------------------------------------- Tilt


def tilted(model: Model, tilt: int) -> Model:
    """Section "Tilt": the model as the cells of a tile of this tilt use it."""
    finer = (tilt * model.tilt + 8) >> 4
    means, contexts = len(model.mean_factor), len(model.context_factor)
    return replace(
        model,
        finer=finer,
        mean_factor=tilted_factors(model.mean_factor, 4 * finer[:means]),
        context_factor=tilted_factors(model.context_factor, -4 * finer[:contexts]),
        inverse_gain=model.inverse_gain.astype(np.float64) * 2.0 ** (-finer / 8),
    )


def tilted_factors(factors: np.ndarray, e: np.ndarray) -> np.ndarray:
    q = 15 - (e >> 5)
    product = factors.astype(np.int64) * OCTAVE[e & 31]
    return np.clip((product + (1 << q - 1)) >> q, 1, 2**21 - 1)


def tilted_classes(model: Model, first: int, classes: np.ndarray) -> np.ndarray:
    """Classes of channels from ``first`` on, (channels, positions), as the graph gives them."""
    require(bool(np.all((classes >= 0) & (classes <= 127))), "class")
    finer = model.finer[first : first + len(classes), None]
    return np.where(classes == 0, 0, np.clip(classes + finer, 0, 127))


# ------------------------------------------------------------------------------------------- Levels

NEXT_STATE = {  # by parity of the index
    0: [0, 5, 1, 6, 2, 4, 3, 7],
    1: [2, 7, 3, 4, 0, 6, 1, 5],
}


def levels_of(indices: np.ndarray, quantisers: np.ndarray) -> np.ndarray:
    """Section "Levels": indices to levels, which count half steps."""
    return 2 * indices - quantisers * np.sign(indices)


# ------------------------------------------------------------------------------------------- Pixels


def latents(model: Model, v: np.ndarray, context: np.ndarray, effective: np.ndarray) -> np.ndarray:
    """Section "Pixels": y (channels, R, C), corrected."""
    step = 2.0 ** (6 - effective / 32)
    y = v * model.inverse_gain.astype(np.float64)[:, None, None] * step / 16
    last = np.maximum(effective, 1)[None]
    outputs = run_graph(model.graphs["chain"], {"context": np.concatenate([context + 128, last])})
    (correction,) = outputs.values()
    require(correction.shape == (*effective.shape, len(context)), "shape of correction")
    y[: len(context)] += (correction.transpose(2, 0, 1) - 128) * step / 64
    return y


def synthesise(model: Model, y: np.ndarray, turn: tuple[int, int, int]) -> np.ndarray:
    """Section "Pixels": samples (16 R, 16 C, 3), before 128 is added."""
    planes = lap(blocks(model, y), model.lapping.astype(np.float64))
    back = model.colours.astype(np.float64) @ turn_matrix(turn).T
    return model.mean.astype(np.float64) + planes @ back.T


def blocks(model: Model, y: np.ndarray) -> np.ndarray:
    """Section "Pixels": the blocks B in their places, (16 R, 16 C, 3 planes)."""
    _, rows, columns = y.shape
    frequencies = np.zeros((768, rows, columns))
    frequencies[model.order] = y
    f = frequencies.reshape(3, 16, 16, rows, columns)
    d = cosines()
    b = np.einsum("ui,puwrc,wj->ricjp", d, f, d, optimize=True)
    return b.reshape(16 * rows, 16 * columns, 3)


def cosines() -> np.ndarray:
    """Section "Pixels": D[u, i]."""
    u, i = np.arange(16)[:, None], np.arange(16)
    d = np.sqrt(1 / 8) * np.cos(np.pi * (2 * i + 1) * u / 32)
    d[0] = 1 / 4
    return d


def turn_matrix(turn: tuple[int, int, int]) -> np.ndarray:
    """Section "Pixels": T."""
    a, b, c = turn
    return givens(1, 2, c) @ givens(0, 2, b) @ givens(0, 1, a)


def givens(i: int, j: int, units: int) -> np.ndarray:
    """Section "Pixels": G(i, j, angle)."""
    angle = units * np.pi / 256
    g = np.eye(3)
    g[i, i] = g[j, j] = np.cos(angle)
    g[i, j] = np.sin(angle)
    g[j, i] = -np.sin(angle)
    return g


def free_pixels(model: Model, cell: Cell) -> np.ndarray:
    """Section "Pixels", "Tolerance": (16 R, 16 C), where it asks nothing."""
    assert cell.sums is not None
    free = np.kron(cell.sums > 2**17, np.ones((16, 16), bool))
    if np.array_equal(model.lapping, np.eye(8)):
        return free
    for axis in (0, 1):  # eight samples to either side of a border are mixed
        wide = np.pad(free, [(8, 8) if axis == i else (0, 0) for i in (0, 1)])
        windows = np.lib.stride_tricks.sliding_window_view(wide, 17, axis=axis)
        free = windows.any(axis=-1)
    return free


def lap(image: np.ndarray, lapping: np.ndarray) -> np.ndarray:
    """Section "Pixels": ``lap`` of whole blocks, (16 R, 16 C, 3)."""
    image = image.copy()
    lap_borders(image.transpose(1, 0, 2), lapping)  # along rows
    lap_borders(image, lapping)  # along columns
    return image


def lap_borders(samples: np.ndarray, lapping: np.ndarray) -> None:
    """In place, at every border of the first axis, of 16 n samples."""
    for border in range(16, len(samples), 16):
        a = samples[border - 8 : border][::-1]
        b = samples[border : border + 8]
        o = a - b
        t = np.tensordot(lapping, o, axes=1) / 2 - o / 2
        a += t
        b -= t


# ------------------------------------------------------------------------------------ Symbol tables


def read_symbol(coder: Decoder, model: Model, symbol_class: int, quantiser: int) -> int:
    """Section "Symbol tables": one index of a class of at least 1."""
    tables = len(model.table_radii) // 2
    raw = 0 if symbol_class <= tables else math.ceil((symbol_class - tables) / 8)
    table = symbol_class - 8 * raw - 1 + quantiser * tables
    radius = int(model.table_radii[table])
    index = coder.table_symbol(model.table_cdf[table][: 2 * radius + 3])
    if index <= 2 * radius:
        top = index - radius
    else:
        n = coder.raw(5)
        require(n <= 20, "escape beyond range")
        magnitude = radius + 2**n + coder.raw(n)
        top = -magnitude if coder.raw(1) else magnitude
    low = coder.raw(raw)
    return top * 2**raw + low - 2**raw // 2


# --------------------------------------------------------------------------------------------- rANS


class Decoder:
    """Section "rANS": the steps of a payload, all of a symbol in one lane."""

    def __init__(self, payload: bytes, lanes: int) -> None:
        require(len(payload) >= 4 * lanes, "payload shorter than its states")
        require(len(payload) % 2 == 0, "odd number of bytes")
        self.states = list(struct.unpack(f"<{lanes}I", payload[: 4 * lanes]))
        require(min(self.states) >= 2**16, "initial state")
        rest = payload[4 * lanes :]
        self.words = struct.unpack(f"<{len(rest) // 2}H", rest)
        self.word = 0
        self.symbol = 0
        """Number of the symbol that is being read; those of class 0 have none."""

    def hyper_latents(self, model: Model, classes: np.ndarray) -> np.ndarray:
        """Section "Hyper-latents": symbols of quantiser 0, which change no state."""
        z = np.zeros(classes.shape, np.int64)
        for place, symbol_class in np.ndenumerate(classes):
            require(1 <= symbol_class <= 127, "class of a hyper-latent")
            z[place] = read_symbol(self, model, int(symbol_class), 0)
            require(abs(z[place]) <= 127, "hyper-latent beyond its limit")
            self.symbol += 1
        return z

    def indices(
        self, model: Model, classes: np.ndarray, cell: Cell | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sections "Stages" and "Levels": indices of one stage's array, and their quantisers.

        ``cell`` is what is known of the cell so far. It does not matter here;
        tools/make_conformance.py puts in an object that chooses indices by it.
        """
        found = np.zeros(classes.shape, np.int64)
        quantisers = np.zeros(classes.shape, np.int64)
        states = [0] * len(self.states)
        for place, symbol_class in np.ndenumerate(classes):
            require(0 <= symbol_class <= 127, "class")
            if symbol_class == 0:
                continue
            lane = self.lane()
            quantisers[place] = states[lane] & 1
            k = read_symbol(self, model, int(symbol_class), states[lane] & 1)
            require(abs(k) <= 2**20, "index beyond its limit")
            found[place] = k
            states[lane] = NEXT_STATE[k % 2][states[lane]]
            self.symbol += 1
        return found, quantisers

    def lane(self) -> int:
        return self.symbol % len(self.states)

    def advance(self, start: int, frequency: int) -> None:
        x = self.states[self.lane()]
        x = frequency * (x // 2**14) + x % 2**14 - start
        if x < 2**16:
            require(self.word < len(self.words), "words end early")
            x = x * 2**16 + self.words[self.word]
            self.word += 1
        self.states[self.lane()] = x

    def slot(self) -> int:
        return self.states[self.lane()] % 2**14

    def table_symbol(self, cumulative: list[int]) -> int:
        slot = self.slot()
        index = 0
        while slot >= cumulative[index + 1]:
            index += 1
        self.advance(cumulative[index], cumulative[index + 1] - cumulative[index])
        return index

    def raw(self, bits: int) -> int:
        """Section "Symbol tables", last paragraph: at most 14 bits at once."""
        if bits == 0:
            return 0
        if bits > 14:
            high = self.raw(bits - 14)
            return high << 14 | self.raw(14)
        value = self.slot() >> 14 - bits
        self.advance(value << 14 - bits, 1 << 14 - bits)
        return value

    def end(self) -> None:
        require(all(x == 2**16 for x in self.states), "a state is not 2^16 at the end")
        require(self.word == len(self.words), "words are left")


# --------------------------------------------------------------------------------------- Model file


@dataclass
class Model:
    """Section "Model file": architecture and tensors by the document's names."""

    stages: list[list[int]]
    mean_stages: int
    context_channels: int
    z_channels: int
    hyper: int
    table_radii: list[int]
    table_cdf: list[list[int]]
    z_classes: np.ndarray
    mean_factor: np.ndarray
    context_factor: np.ndarray
    inverse_gain: np.ndarray
    order: np.ndarray
    colours: np.ndarray
    mean: np.ndarray
    lapping: np.ndarray
    tilt: np.ndarray
    finer: np.ndarray
    """By channel, of a tile: section "Tilt"."""
    graphs: dict[str, onnx.ModelProto]


ARCHITECTURE = {"block", "stages", "mean_stages", "context_channels", "z_channels", "hyper"}


def read_model(file: bytes) -> Model:
    """Section "Model file"."""
    require(len(file) <= 64 * 2**20, "size of the model file")
    require(file[:4] == b"WSCM" and file[4] == 1 and file[5:8] == b"\0\0\0", "model magic")
    (header_length,) = struct.unpack("<I", file[8:12])
    require(header_length <= 65536, "header length")
    header = json.loads(file[12 : 12 + header_length].decode("utf-8"))
    require(header["kind"] == "decoder", "kind")
    require(len(header["sections"]) <= 64, "number of sections")
    tensors: dict[str, np.ndarray] = {}
    graphs: dict[str, onnx.ModelProto] = {}
    at = 12 + header_length
    for section in header["sections"]:
        name, size, kind = section["name"], section["bytes"], section["type"]
        content = file[at : at + size]
        require(len(content) == size, "section past the end")
        require(name not in tensors and name not in graphs, "names are unique")
        at += size
        if kind == "onnx":
            graphs[name] = onnx.load_from_string(content)
        else:
            little_endian = np.dtype(kind).newbyteorder("<")
            tensors[name] = np.frombuffer(content, little_endian).reshape(section["shape"])
    require(at == len(file), "bytes after the last section")

    a = header["architecture"]
    channels, means = check_architecture(a)
    contexts = a["context_channels"]

    def tensor(name: str, kind: str, *shape: int) -> np.ndarray:
        require(name in tensors, f"{name} is missing")
        found = tensors[name]
        require(found.dtype == np.dtype(kind).newbyteorder("<"), f"type of {name}")
        require(found.shape == shape, f"shape of {name}")
        return found

    def floats(name: str, peak: float, *shape: int) -> np.ndarray:
        found = tensor(name, "float32", *shape)
        require(bool(np.isfinite(found).all()), f"{name} is not finite")
        require(bool(np.all(np.abs(found) <= peak)), f"{name} is beyond its bound")
        return found

    def factors(name: str, count: int) -> np.ndarray:
        found = tensor(name, "int32", count)
        require(bool(np.all((found >= 1) & (found < 2**21))), f"{name} is out of range")
        return found

    radii, cdf = read_tables(tensors)
    z_classes = tensor("z_classes", "uint8", 256, a["z_channels"])
    require(bool(np.all((z_classes >= 1) & (z_classes <= 127))), "a class of z_classes")
    order = tensor("order", "uint16", channels)
    require(len(set(order.tolist())) == channels, "two channels of one place in order")
    require(bool(np.all(order < 768)), "a place in order")
    colours = floats("colours", 2**4, 3, 3)
    require(abs(np.linalg.det(colours.astype(np.float64))) >= 1e-3, "determinant of colours")
    lapping = floats("lapping", np.inf, 8, 8)
    exact = lapping.astype(np.float64)
    require(bool(np.all(np.abs(exact @ exact.T - np.eye(8)) <= 1e-4)), "lapping is not orthogonal")
    tilt = np.zeros(channels, np.int64)
    if "tilt" in tensors:
        tilt = tensor("tilt", "int8", channels).astype(np.int64)
        require(bool(np.all(np.abs(tilt) <= 32)), "tilt is out of range")
    require(set(graphs) >= {"hyper", "chain", *(f"stage{k}" for k in range(len(a["stages"])))},
            "graphs")  # fmt: skip
    check_graphs(a, graphs)
    return Model(
        stages=a["stages"],
        mean_stages=a["mean_stages"],
        context_channels=contexts,
        z_channels=a["z_channels"],
        hyper=a["hyper"],
        table_radii=radii,
        table_cdf=cdf,
        z_classes=z_classes,
        mean_factor=factors("mean_factor", means),
        context_factor=factors("context_factor", contexts),
        inverse_gain=floats("inverse_gain", 2**16, channels),
        order=order,
        colours=colours,
        mean=floats("mean", 2**10, 3),
        lapping=lapping,
        tilt=tilt,
        finer=np.zeros(channels, np.int64),
        graphs=graphs,
    )


def read_tables(tensors: dict[str, np.ndarray]) -> tuple[list[int], list[list[int]]]:
    """Section "Symbol tables": table_radii and table_cdf."""
    require({"table_radii", "table_cdf"} <= set(tensors), "tables are missing")
    require(tensors["table_radii"].dtype == np.dtype("<i4"), "type of table_radii")
    require(tensors["table_cdf"].dtype == np.dtype("<u2"), "type of table_cdf")
    require(tensors["table_radii"].ndim == 1, "shape of table_radii")
    radii = tensors["table_radii"].tolist()
    require(len(radii) % 2 == 0 and 15 <= len(radii) // 2 <= 127, "number of tables")
    require(all(1 <= r <= 126 for r in radii), "radii")
    cdf = tensors["table_cdf"].tolist()
    require(tensors["table_cdf"].shape == (len(radii), 2 * max(radii) + 3), "tables")
    for r, row in zip(radii, cdf, strict=True):
        used = row[: 2 * r + 3]
        require(used[0] == 0 and used[-1] == 16384, "table ends")
        require(all(a < b for a, b in itertools.pairwise(used)), "table order")
        require(all(value == 16384 for value in row[2 * r + 3 :]), "table padding")
    return radii, cdf


def check_architecture(architecture: dict) -> tuple[int, int]:
    """Section "Model file", ``architecture``. Returns the channels, and those with means."""
    require(set(architecture) == ARCHITECTURE, "keys of the architecture")
    stages = architecture["stages"]
    numbers = [number for stage in stages for number in stage]
    numbers += [value for key, value in architecture.items() if key != "stages"]
    require(all(type(number) is int for number in numbers), "numbers of the architecture")
    require(architecture["block"] == 16, "block")
    require(1 <= architecture["z_channels"] <= 256, "z_channels")
    require(1 <= architecture["hyper"] <= 512, "hyper")
    channels = check_stages(stages)
    # a range of channels ends where its last lattice does
    ends = [0, *(k + 1 for k, (_, _, lattice) in enumerate(stages) if lattice in (0, 3))]
    reached = [0, *(first + count for first, count, lattice in stages if lattice in (0, 3))]
    require(architecture["mean_stages"] in ends, "mean_stages")
    means = reached[ends.index(architecture["mean_stages"])]
    require(architecture["context_channels"] in reached[1:], "context_channels")
    require(means <= architecture["context_channels"], "context covers stages with means")
    return channels, means


def check_stages(stages: list[list[int]]) -> int:
    """Section "Model file", key ``stages``: channels run on without gap. Returns their number."""
    require(1 <= len(stages) <= 15, "number of stages")
    channels = 0
    rest = list(stages)
    while rest:
        first, count, lattice = rest[0]
        wanted = [[first, count, i] for i in ((1, 2, 3) if lattice else (0,))]
        require(first == channels and count >= 1 and rest[: len(wanted)] == wanted, "stages")
        channels += count
        del rest[: len(wanted)]
    require(channels <= 768, "number of channels")
    return channels


# --------------------------------------------------------------------------------- Integer networks

FLOAT, UINT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
INT8, INT16 = onnx.TensorProto.INT8, onnx.TensorProto.INT16


def check_graphs(architecture: dict, graphs: dict[str, onnx.ModelProto]) -> None:
    """Types and channels of inputs and outputs, sections "Hyper-latents", "Stages", "Pixels"."""
    hyper, contexts = architecture["hyper"], architecture["context_channels"]
    check_ports(graphs["hyper"], {"z": architecture["z_channels"], "plane": 1}, FLOAT,
                [(hyper, FLOAT), (1, INT8)])  # fmt: skip
    coded = 0
    for k, (first, count, _) in enumerate(architecture["stages"]):
        inputs = {"h": hyper, "plane": 1}
        if k:
            inputs["context"] = min(coded, contexts)
        outputs = [(count, UINT8)]
        if k < architecture["mean_stages"]:
            outputs.append((count, INT16))
        check_ports(graphs[f"stage{k}"], inputs, FLOAT, outputs)
        coded = first + count
    chain = [(contexts, UINT8)]
    check_ports(graphs["chain"], {"context": contexts + 1}, UINT8, chain, channels_last=True)


def check_ports(
    model: onnx.ModelProto,
    inputs: dict[str, int],
    kind: int,
    outputs: list[tuple[int, int]],
    *,
    channels_last: bool = False,
) -> None:
    """inputs: channels by name, all of type ``kind``. outputs: channels and type."""

    def check(port: onnx.ValueInfoProto, channels: int, kind: int, axis: int) -> None:
        tensor = port.type.tensor_type
        require(tensor.elem_type == kind, f"type of {port.name}")
        extents = [extent.dim_value for extent in tensor.shape.dim]  # 0: free
        wanted = [channels if i == axis % 4 else 0 for i in range(4)]
        require(extents == wanted, f"extents of {port.name}")

    require({port.name for port in model.graph.input} == set(inputs), "names of the inputs")
    require(len(model.graph.output) == len(outputs), "number of outputs")
    for port in model.graph.input:
        check(port, inputs[port.name], kind, 1)
    for port, (channels, given) in zip(model.graph.output, outputs, strict=True):
        check(port, channels, given, -1 if channels_last else 1)


@dataclass
class Fixed:
    """The exact numbers integer · 2^exponent; the exponent broadcasts over the integers."""

    integer: np.ndarray
    exponent: np.ndarray
    limits: tuple[int, int] | None = None
    """Range of the integer type of an initializer: what QuantizeLinear saturates to."""

    def at(self, exponent: int) -> np.ndarray:
        """The same numbers as integers · 2^exponent, for an exponent that is not larger."""
        shift = self.exponent - exponent
        require(bool(np.all(shift >= 0)), "exponent")
        return self.integer << shift

    def floor(self) -> np.ndarray:
        up, down = np.maximum(self.exponent, 0), np.maximum(-self.exponent, 0)
        return self.integer << up >> down

    def rint(self) -> np.ndarray:
        """Round half to even, in integers."""
        down = np.maximum(-self.exponent, 0)
        whole = self.floor()
        rest = (self.integer << np.maximum(self.exponent, 0)) - (whole << down)
        twice = 2 * rest
        unit = np.int64(1) << down
        return whole + ((twice > unit) | ((twice == unit) & (whole & 1 == 1)))


def fixed(values: np.ndarray) -> Fixed:
    """An initializer; floats become exact, they are dyadic numbers in every valid graph."""
    if values.dtype.kind in "iu":
        limits = np.iinfo(values.dtype)
        return Fixed(values.astype(np.int64), np.int64(0), (int(limits.min), int(limits.max)))
    values = values.astype(np.float64)
    exponent = 0
    while np.any(np.ldexp(values, -exponent) != np.rint(np.ldexp(values, -exponent))):
        exponent -= 1
        require(exponent >= -60, "not a dyadic number")
    return Fixed(np.ldexp(values, -exponent).astype(np.int64), np.int64(exponent))


def log2_exact(scale: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(np.asarray(scale, np.float64))
    require(bool(np.all(mantissa == 0.5)), "scales are powers of two")
    return exponent.astype(np.int64) - 1


def run_graph(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Section "Integer networks": every number of a graph, exactly.

    Inputs and outputs here are without the batch axis that graphs have.
    """
    graph = model.graph
    require({i.name for i in graph.input} == set(inputs), "names of the inputs")
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    values: dict[str, Fixed] = {name: fixed(array) for name, array in arrays.items()}
    for name, array in inputs.items():
        values[name] = Fixed(array[None].astype(np.int64), np.int64(0))
    for node in graph.node:
        require(node.domain in ("", "ai.onnx") and len(node.output) == 1, "node")
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        operator = OPERATORS.get(node.op_type)
        require(operator is not None, f"operator {node.op_type}")
        arguments = [values[name] if name else None for name in node.input]
        values[node.output[0]] = operator(attributes, *arguments)
    results = {}
    for output in graph.output:
        value = values[output.name]
        require(bool(np.all(value.exponent == 0)), "an output is not an integer")
        results[output.name] = value.integer[0]
    return results


def op_conv(attributes: dict, x: Fixed, weight: Fixed, bias: Fixed | None = None) -> Fixed:
    """Correlation with zero padding to the same size; one exponent to each channel's sums."""
    require(attributes.get("group", 1) == 1, "group")
    require(set(attributes.get("strides", [1])) == {1}, "strides")
    require(set(attributes.get("dilations", [1])) == {1}, "dilations")
    outputs, channels, kernel_rows, kernel_columns = weight.integer.shape
    top, left = kernel_rows // 2, kernel_columns // 2
    if "auto_pad" not in attributes or attributes["auto_pad"] == b"NOTSET":
        require(list(attributes.get("pads", [0] * 4)) == [top, left, top, left], "padding")
    x_exponent = int(np.max(x.exponent))
    require(int(np.min(x.exponent)) == x_exponent, "one scale for all inputs of a convolution")
    batch, x_channels, rows, columns = x.integer.shape
    require(x_channels == channels, "channels")
    padded = np.pad(x.integer, ((0, 0), (0, 0), (top, top), (left, left)))
    total = np.zeros((batch, outputs, rows * columns), np.int64)
    bound = np.zeros((batch, outputs, rows * columns), np.int64)
    for i in range(kernel_rows):
        for j in range(kernel_columns):
            part = padded[:, :, i : i + rows, j : j + columns].reshape(batch, channels, -1)
            total += weight.integer[:, :, i, j] @ part
            bound += np.abs(weight.integer[:, :, i, j]) @ np.abs(part)
    exponent = x_exponent + np.broadcast_to(weight.exponent, (outputs, 1, 1, 1)).reshape(-1)
    if bias is not None:
        shift = np.broadcast_to(bias.exponent, (outputs,)) - exponent
        require(bool(np.all(shift >= 0)), "a bias finer than its sums")
        aligned = bias.integer << shift
        total += aligned[:, None]
        bound += np.abs(aligned)[:, None]
    require(int(bound.max(initial=0)) < 2**24, "a sum is not exact in float32")
    return Fixed(total.reshape(batch, outputs, rows, columns), exponent[:, None, None])


def op_mul(attributes: dict, x: Fixed, scale: Fixed) -> Fixed:
    """Multiplication by powers of two moves the exponent and no bit of the integers."""
    real = np.ldexp(scale.integer.astype(np.float64), scale.exponent)
    return Fixed(x.integer, x.exponent + log2_exact(real))


def op_round(attributes: dict, x: Fixed) -> Fixed:
    return Fixed(x.rint(), np.int64(0))


def op_floor(attributes: dict, x: Fixed) -> Fixed:
    return Fixed(x.floor(), np.int64(0))


def op_clip(attributes: dict, x: Fixed, low: Fixed, high: Fixed) -> Fixed:
    require(bool(np.all(x.exponent == 0)), "Clip takes integers")
    return Fixed(np.clip(x.integer, low.at(0), high.at(0)), np.int64(0))


def op_abs(attributes: dict, x: Fixed) -> Fixed:
    return Fixed(np.abs(x.integer), x.exponent)


def op_concat(attributes: dict, *parts: Fixed) -> Fixed:
    require(attributes["axis"] in (1, -3), "Concat of channels")
    exponent = min(int(np.min(part.exponent)) for part in parts)
    return Fixed(np.concatenate([part.at(exponent) for part in parts], axis=1), np.int64(exponent))


def op_depth_to_space(attributes: dict, x: Fixed) -> Fixed:
    require(attributes.get("mode") == b"CRD", "mode CRD")
    size = attributes["blocksize"]
    batch, channels, rows, columns = x.integer.shape
    require(bool(np.all(x.exponent == 0)), "DepthToSpace takes integers")
    parts = x.integer.reshape(batch, channels // size**2, size, size, rows, columns)
    parts = parts.transpose(0, 1, 4, 2, 5, 3)
    shape = batch, channels // size**2, rows * size, columns * size
    return Fixed(parts.reshape(shape), np.int64(0))


def op_cast(attributes: dict, x: Fixed) -> Fixed:
    """All numbers here fit the types that they are cast to."""
    return x


def per_channel(values: np.ndarray, attributes: dict, rank: int) -> np.ndarray:
    if values.ndim == 0 or values.size == 1:
        return values.reshape(())
    shape = [1] * rank
    shape[attributes.get("axis", 1)] = values.size
    return values.reshape(shape)


def op_dequantize(attributes: dict, x: Fixed, scale: Fixed, zero: Fixed | None = None) -> Fixed:
    real = np.ldexp(scale.integer.astype(np.float64), scale.exponent)
    rank = x.integer.ndim
    exponent = per_channel(log2_exact(real), attributes, rank)
    offset = per_channel(zero.integer, attributes, rank) if zero is not None else 0
    return Fixed(x.integer - offset, exponent)


def op_quantize(attributes: dict, x: Fixed, scale: Fixed, zero: Fixed) -> Fixed:
    """``rint``, then the zero point, then saturation to the zero point's type."""
    real = np.ldexp(scale.integer.astype(np.float64), scale.exponent)
    exponent = per_channel(log2_exact(real), attributes, x.integer.ndim)
    offset = per_channel(zero.integer, attributes, x.integer.ndim)
    low, high = zero.limits
    levels = Fixed(x.integer, x.exponent - exponent).rint() + offset
    return Fixed(np.clip(levels, low, high), np.int64(0))


def op_transpose(attributes: dict, x: Fixed) -> Fixed:
    require(np.ndim(x.exponent) == 0 or np.size(x.exponent) == 1, "Transpose takes one scale")
    return Fixed(x.integer.transpose(attributes["perm"]), np.int64(np.max(x.exponent)))


OPERATORS = {
    "Conv": op_conv,
    "Mul": op_mul,
    "Round": op_round,
    "Floor": op_floor,
    "Clip": op_clip,
    "Abs": op_abs,
    "Concat": op_concat,
    "DepthToSpace": op_depth_to_space,
    "Cast": op_cast,
    "DequantizeLinear": op_dequantize,
    "QuantizeLinear": op_quantize,
    "Transpose": op_transpose,
}
