"""Walks the entropy-coded data of JPEG streams to find damage that decoders hide (T.81, annex F).

Huffman codes find back to a boundary of codes soon after a flipped bit. A decoder then paints
tissue that was never there, and at most writes a warning to nobody. What gives the damage away is
that the blocks do not come out even: codes that do not exist, blocks of more than 64 coefficients,
brightness beyond black and white, data that end before the last block or last beyond it.

No pixel is made, so that this takes a fraction of the time of decoding.
"""

from __future__ import annotations

import contextlib
import functools
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.entropy.compiled import compiled
from wsicodec.errors import FormatError
from wsicodec.slide.jpegstream import END, START, behind_fill, end_of_scan

_DHT, _EOI, _SOS, _DQT, _DRI = 0xC4, 0xD9, 0xDA, 0xDB, 0xDD
_SEQUENTIAL = (0xC0, 0xC1)  # Huffman-coded; the scans of other frames are walked by their markers
_FRAMES = tuple(code for code in range(0xC0, 0xD0) if code not in (_DHT, 0xC8, 0xCC))
_BARE = (0x01, *range(0xD0, 0xD8))
_MAX_BLOCKS = 10  # of one MCU (T.81, B.2.3)
_MAX_SEGMENTS = 4096
_MAX_TABLE_BYTES = 2**16  # of all Huffman tables, or all quantisers
_KEPT_BYTES = 8192  # of headers whose plan is remembered
_LOOK = 10  # bits of a code that are looked up at once
_END = 128  # places in a block that an end of block moves on
_PLACES = 64 + _END

# A lost sector is zeros, which are codes too. No pixels give as many equal bytes in one block:
# the flattest spectrum, of one dark pixel in a corner, gives ten.
_ALIKE = 16
_PADDING = re.compile(rb"(?:\xff?\x00)*")  # of a scan up to a round number of bytes
_MAX_PADDING = 64
_AHEAD = 8  # bytes that are read before their bits are needed

# Samples of eight bits have coefficients of at most 1024 (the transform is orthonormal, times 8).
# Encoders that overshoot black and white on purpose stay far below twice that.
_OVERSHOOT = 2

_FINE, _EXHAUSTED, _NO_CODE, _PAST_BLOCK, _OUT_OF_RANGE, _LEFT_OVER, _NO_RESTART, _REPEATED = range(
    8
)
_PROBLEMS = {
    _EXHAUSTED: "its data end within",
    _NO_CODE: "a Huffman code that does not exist in",
    _PAST_BLOCK: "more than 64 coefficients in",
    _OUT_OF_RANGE: "a coefficient that no pixels have in",
    _LEFT_OVER: "data are left over behind",
    _REPEATED: "the same byte again and again in",
    _NO_RESTART: "the restart marker is missing or wrong behind",
}

_Array = npt.NDArray[Any]


def check_scans(stream: bytes, tables: bytes | None = None) -> None:
    """Raise FormatError where the scans of a JPEG stream are not what its headers announce.

    tables: the directory's (tag 347), for an abbreviated stream.

    Of sequential Huffman-coded frames every block is walked; of progressive, lossless and
    arithmetic-coded ones only the markers are. Takes time in proportion to the bytes, and memory
    for the tables only. Bytes behind the end are nobody's, nor are those that fill the data of a
    scan up to a round number: up to 64 of zeros or stuffed ff. Tables may lack their end marker.
    """
    if stream[:2] != START:
        raise FormatError("JPEG stream does not start with ff d8")
    headers = _Headers()
    if tables is not None:
        headers.read_tables(tables)
    data = np.frombuffer(stream, np.uint8)
    position = headers.read(stream, 2)
    while position is not None:
        plan = headers.plan()
        end = (
            end_of_scan(stream, position) if plan is None else _walked(stream, data, position, plan)
        )
        position = headers.read(stream, end)
    headers.check_complete()


def without_leftovers(stream: bytes, tables: bytes | None = None) -> bytes:
    """The stream without bytes between the last block of a scan and the next marker; same pixels.

    No decoder looks at them. tables: as in ``check_scans``. What is damaged stays as it is, and so
    do scans that are not walked.
    """
    headers = _Headers()
    data = np.frombuffer(stream, np.uint8)
    kept, start = [], 0
    with contextlib.suppress(FormatError):
        if tables is not None:
            headers.read_tables(tables)
        position = headers.read(stream, 2)
        while position is not None:
            plan = headers.plan()
            end = end_of_scan(stream, position)
            if plan is not None:
                status, unit, behind = _outcome(data, position, plan)
                if status in (_FINE, _LEFT_OVER) and unit + 1 == plan.units:
                    kept.append(stream[start:behind])
                    start = end
            position = headers.read(stream, end)
    return b"".join([*kept, stream[start:]])


@dataclass
class _Headers:
    """Marker segments that count for a scan, as they were read so far: their payloads."""

    marker: int = 0
    frame: bytes = b""
    scan: bytes = b""
    interval: bytes = b"\0\0"
    huffman: bytes = b""
    quantisers: bytes = b""
    segments: int = 0
    scanned: list[int] = field(default_factory=list)  # identifiers of components

    def read_tables(self, tables: bytes) -> None:
        """Read the segments of a stream of tables, whose end may be that of its bytes."""
        what = "JPEG tables of the directory (tag 347)"
        if tables[:2] != START:
            raise FormatError(f"{what} do not start with ff d8")
        try:
            data = self.read(tables if tables.endswith(END) else tables + END, 2)
        except FormatError as error:
            raise FormatError(f"{what}: {str(error).removeprefix('JPEG ')}") from None
        if data is not None:
            raise FormatError(f"{what} hold a scan")
        self.interval = b"\0\0"  # the image's SOI ends it (T.81, B.2.4.4)

    def read(self, stream: bytes, position: int) -> int | None:
        """Read segments up to the data of a scan, whose place is returned; None for the end."""
        while True:
            position = behind_fill(stream, position)
            marker = stream[position : position + 2]
            self.segments += 1
            if self.segments > _MAX_SEGMENTS:
                raise FormatError(f"JPEG stream has more than {_MAX_SEGMENTS} segments")
            if len(marker) < 2:
                raise FormatError("JPEG stream has no end marker")
            code = marker[1]
            if marker[0] != 0xFF or code in (0, 0xD8):
                raise FormatError(f"JPEG stream has no marker at byte {position}")
            position += 2
            if code == _EOI:
                return None
            if code in _BARE:
                continue
            end = position + int.from_bytes(stream[position : position + 2])
            if not position + 2 <= end <= len(stream):
                raise FormatError(f"JPEG segment ff {code:02x} at byte {position} is cut short")
            self._take(code, stream[position + 2 : end])
            position = end
            if code == _SOS:
                return position

    def _take(self, code: int, body: bytes) -> None:
        if code == _DHT:
            self.huffman += body
        elif code == _DQT:
            self.quantisers += body
        elif code == _DRI:
            self.interval = body
        elif code == _SOS:
            self.scan = body
        elif code in _FRAMES:
            if self.marker:
                raise FormatError("JPEG stream has a second frame")
            self.marker, self.frame = code, body
        if max(len(self.huffman), len(self.quantisers)) > _MAX_TABLE_BYTES:
            raise FormatError(f"JPEG stream has more than {_MAX_TABLE_BYTES} bytes of tables")

    def plan(self) -> _Plan | None:
        """Of the scan that was just reached; None for one that is not walked."""
        if not self.marker:
            raise FormatError("JPEG stream has a scan without a frame")
        if self.marker not in _SEQUENTIAL:
            self.scanned.append(0)
            return None
        parts = (self.frame, self.scan, self.interval, self.huffman, self.quantisers)
        # tiles of a slide have the same; what a stranger made long is not kept
        make = _plan_kept if sum(map(len, parts)) <= _KEPT_BYTES else _plan
        plan = make(*parts)
        if not set(self.scanned).isdisjoint(plan.identifiers):
            raise FormatError("JPEG stream has two scans of one component")
        self.scanned += plan.identifiers
        return plan

    def check_complete(self) -> None:
        """Raise FormatError where a component had no scan."""
        if not self.scanned:
            raise FormatError("JPEG stream has no scan")
        if self.marker in _SEQUENTIAL and len(self.scanned) != self.frame[5]:
            raise FormatError(
                f"JPEG stream has scans of {len(self.scanned)} of {self.frame[5]} components"
            )


@dataclass(frozen=True)
class _Component:
    """Of a frame. across, down: sampling factors. quantiser: number of its table."""

    identifier: int
    across: int
    down: int
    quantiser: int


@dataclass(frozen=True)
class _Plan:
    """What the kernel needs to walk a scan.

    identifiers: of its components. units: number of MCUs. interval: MCUs between restart markers.
    blocks: int64 (blocks of an MCU), the component of each, counted within the scan.
    look: uint32 (2 x components, 2^_LOOK), the entry (see ``_entry``) of a code by the first bits
    of the data, 0 for longer codes; rows are DC and AC of each component. last: int64
    (2 x components, 17), the last code of each length, -1 without one. base: likewise, to add to a
    code for its place in entries, uint32 (2 x components, 256).
    most: uint8 (components, _PLACES), largest size of a coefficient by the place behind it.
    furthest: int64 (components), largest DC coefficient.
    """

    identifiers: tuple[int, ...]
    units: int
    interval: int
    blocks: _Array
    look: _Array
    last: _Array
    base: _Array
    entries: _Array
    most: _Array
    furthest: _Array


def _plan(frame: bytes, scan: bytes, interval: bytes, huffman: bytes, quantisers: bytes) -> _Plan:
    """Of the payloads of marker segments. Raises FormatError for what T.81 rules out."""
    bits, height, width, components = _frame(frame)
    chosen, tables = _scan(scan, components)
    if len(interval) != 2:
        raise FormatError(f"JPEG restart interval of {len(interval)} bytes")
    widest = max(part.across for part in components)
    tallest = max(part.down for part in components)
    if len(chosen) == 1:
        # a scan of one component has only the blocks that hold pixels
        part = chosen[0]
        blocks = [0]
        units = -(-_share(width, part.across, widest) // 8)
        units *= -(-_share(height, part.down, tallest) // 8)
    else:
        blocks = [i for i, part in enumerate(chosen) for _ in range(part.across * part.down)]
        units = -(-width // (8 * widest)) * -(-height // (8 * tallest))
        if len(blocks) > _MAX_BLOCKS:
            raise FormatError(f"JPEG scan has {len(blocks)} blocks in a unit")
    codes = _huffman_tables(huffman)
    steps = _quantisers(quantisers)
    look = np.zeros((2 * len(chosen), 1 << _LOOK), np.uint32)
    last = np.full((2 * len(chosen), 17), -1, np.int64)
    base = np.zeros((2 * len(chosen), 17), np.int64)
    entries = np.zeros((2 * len(chosen), 256), np.uint32)
    most = np.full((len(chosen), _PLACES), 15, np.uint8)  # behind the block another check counts
    reach = _OVERSHOOT * 1024 << (bits - 8)
    for i, (part, pair) in enumerate(zip(chosen, tables, strict=True)):
        if part.quantiser not in steps:
            raise FormatError(f"JPEG stream lacks quantiser {part.quantiser}")
        for k, step in enumerate(steps[part.quantiser]):
            # the smallest coefficient of a size is 2^(size - 1); one step is for rounding
            most[i, k + 1] = min(bits + (3 if k == 0 else 2), (reach // step + 1).bit_length())
        for row, key in enumerate(pair, 2 * i):
            if key not in codes:
                raise FormatError(f"JPEG stream lacks Huffman table {key[0]}.{key[1]}")
            _fill(codes[key], look[row], last[row], base[row], entries[row], ac=key[0] == 1)
    return _Plan(
        tuple(part.identifier for part in chosen),
        units,
        int.from_bytes(interval),
        np.array(blocks, np.int64),
        look,
        last,
        base,
        entries,
        most,
        np.array([reach // steps[part.quantiser][0] + 1 for part in chosen], np.int64),
    )


_plan_kept = functools.lru_cache(maxsize=32)(_plan)


def _share(pixels: int, factor: int, largest: int) -> int:
    return -(-pixels * factor // largest)


def _frame(body: bytes) -> tuple[int, int, int, tuple[_Component, ...]]:
    """Bits of a sample, height, width, components."""
    count = body[5] if len(body) > 5 else 0
    if not 1 <= count <= 4 or len(body) != 6 + 3 * count:
        raise FormatError(f"JPEG frame has {count} components in {len(body)} bytes")
    components = tuple(
        _Component(body[at], body[at + 1] >> 4, body[at + 1] & 15, body[at + 2])
        for at in range(6, len(body), 3)
    )
    bits = body[0]
    height, width = int.from_bytes(body[1:3]), int.from_bytes(body[3:5])
    if bits not in (8, 12) or not height or not width:
        raise FormatError(f"JPEG frame of {height} x {width} pixels of {bits} bits")
    if not all(1 <= part.across <= 4 and 1 <= part.down <= 4 for part in components):
        raise FormatError("JPEG frame has sampling factors that do not exist")
    if len({part.identifier for part in components}) != count:
        raise FormatError("JPEG frame names a component twice")
    return bits, height, width, components


_Pair = tuple[tuple[int, int], tuple[int, int]]


def _scan(body: bytes, components: tuple[_Component, ...]) -> tuple[list[_Component], list[_Pair]]:
    """Components of a scan, and (class, number) of their two Huffman tables."""
    count = body[0] if body else 0
    if not 1 <= count <= len(components) or len(body) != 4 + 2 * count:
        raise FormatError(f"JPEG scan has {count} components in {len(body)} bytes")
    by_identifier = {part.identifier: part for part in components}
    chosen: list[_Component] = []
    tables: list[_Pair] = []
    for at in range(1, 1 + 2 * count, 2):
        part = by_identifier.pop(body[at], None)
        if part is None:
            raise FormatError(f"JPEG scan names component {body[at]}, which is none or there twice")
        chosen.append(part)
        tables.append(((0, body[at + 1] >> 4), (1, body[at + 1] & 15)))
    return chosen, tables


def _quantisers(body: bytes) -> dict[int, list[int]]:
    """64 steps in the order of the data, by the number of the table."""
    tables: dict[int, list[int]] = {}
    position = 0
    while position < len(body):
        bytes_each = 2 if body[position] >> 4 else 1
        end = position + 1 + 64 * bytes_each
        if end > len(body):
            raise FormatError("JPEG quantiser is cut short")
        steps = np.frombuffer(body[position + 1 : end], ">u2" if bytes_each == 2 else "u1")
        tables[body[position] & 15] = [max(1, step) for step in steps.tolist()]
        position = end
    return tables


def _huffman_tables(body: bytes) -> dict[tuple[int, int], bytes]:
    """The 16 counts and the symbols of each table, by class (1 for AC) and number."""
    tables: dict[tuple[int, int], bytes] = {}
    position = 0
    while position < len(body):
        count = sum(body[position + 1 : position + 17])
        end = position + 17 + count
        if end > len(body) or count > 256:
            raise FormatError(f"JPEG Huffman table of {count} codes is cut short")
        tables[body[position] >> 4, body[position] & 15] = body[position + 1 : end]
        position = end
    return tables


def _entry(length: int, symbol: int, ac: bool) -> int:
    """What a code means: ``bits | places << 8 | size << 16``.

    bits: of the code, and for AC of the coefficient too. places: how far it moves on in the block;
    _END to its end. size: bits of the coefficient.
    """
    if not ac:
        return length | 1 << 8 | symbol << 16
    run, size = symbol >> 4, symbol & 15
    if size:
        return length + size | run + 1 << 8 | size << 16
    return length | (16 if run == 15 else _END) << 8


def _fill(
    table: bytes, look: _Array, last: _Array, base: _Array, entries: _Array, *, ac: bool
) -> None:
    """Rows of a ``_Plan`` for a table (T.81, C.2). Raises FormatError for codes that overlap."""
    code = place = 0
    for length in range(1, 17):
        count = table[length - 1]
        if code + count > 1 << length:
            raise FormatError("JPEG Huffman table has more codes than bits for them")
        base[length] = place - code
        if count:
            last[length] = code + count - 1
        free = _LOOK - length
        for number in range(count):
            entries[place + number] = entry = _entry(length, table[16 + place + number], ac)
            if free >= 0:
                start = code + number << free
                look[start : start + (1 << free)] = entry
        code = code + count << 1
        place += count


def _walked(stream: bytes, data: _Array, position: int, plan: _Plan) -> int:
    """Where the data of a scan end, which start at ``position``. Raises FormatError.

    data: the stream as an array.
    """
    status, unit, position = _outcome(data, position, plan)
    if status == _LEFT_OVER and unit + 1 == plan.units:
        end = end_of_scan(stream, position)
        rest = stream[position:end].rstrip(b"\xff")  # which fill before a marker
        if len(rest) <= _MAX_PADDING and _PADDING.fullmatch(rest):
            return end
    if status != _FINE:
        raise FormatError(
            f"JPEG scan is damaged: {_PROBLEMS[status]} block group {unit + 1} of {plan.units}"
        )
    return position


def _outcome(data: _Array, position: int, plan: _Plan) -> tuple[int, int, int]:
    """As ``_walk`` returns it."""
    status, unit, position = _walk(
        data, position, plan.units, plan.interval, plan.blocks, plan.look, plan.last, plan.base,
        plan.entries, plan.most, plan.furthest,
    )  # fmt: skip
    return int(status), int(unit), int(position)


@compiled
def _refill(data: _Array, position: Any, acc: Any, count: Any) -> tuple[Any, Any, Any]:
    """(position, acc, count) with more than 31 bits of data in acc where there are so many.

    acc: the next ``count`` bits, from the highest on; zeros behind. Stops at a marker.
    """
    size = np.int64(len(data))
    if position + 4 <= size:
        word = (
            np.uint64(data[position]) << np.uint64(24)
            | np.uint64(data[position + 1]) << np.uint64(16)
            | np.uint64(data[position + 2]) << np.uint64(8)
            | np.uint64(data[position + 3])
        )
        inverse = word ^ np.uint64(0xFFFFFFFF)
        # none of the four bytes is ff
        if (inverse - np.uint64(0x01010101)) & word & np.uint64(0x80808080) == np.uint64(0):
            return position + 4, acc | word << np.uint64(32 - count), count + 32
    while count <= 48 and position < size:
        byte = np.uint64(data[position])
        if byte == np.uint64(0xFF):
            if position + 1 >= size or data[position + 1] != 0:
                break
            position += 1
        position += 1
        acc |= byte << np.uint64(56 - count)
        count += 8
    return position, acc, count


@compiled
def _longer(acc: Any, row: Any, last: _Array, base: _Array, entries: _Array) -> Any:
    """The entry of a code that is not in ``look``, 0 for one that does not exist."""
    for length in range(_LOOK + 1, 17):
        code = np.int64(acc >> np.uint64(64 - length))
        if code <= last[row, length]:
            return np.uint64(entries[row, (code + base[row, length]) & 255])
    return np.uint64(0)


@compiled
def _spent(status: Any, count: Any) -> Any:
    """A problem, or that the data ended before it: behind them all bits are 0."""
    return status if count >= 0 else _EXHAUSTED


@compiled
def _alike(data: _Array, start: Any, end: Any) -> Any:
    """True where all bytes are the same one."""
    place = start + 1
    while place < end and data[place] == data[start]:
        place += 1
    return place == end


@compiled
def _walk(
    data: _Array, position: Any, units: Any, interval: Any, blocks: _Array, look: _Array,
    last: _Array, base: _Array, entries: _Array, most: _Array, furthest: _Array,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """(status, MCU where the walk ended, position behind the data of a scan, or of its last MCU).

    data: uint8 bytes of the stream; the others as in ``_Plan``. Each block takes two bits at
    least, and none is taken from beyond the data: time is bounded by the bytes.
    """
    end = np.int64(len(data))
    per_unit = len(blocks)
    one, low, rest = np.uint64(1), np.uint64(63), np.uint64(64 - _LOOK)
    position = np.int64(position)
    acc, count = np.uint64(0), np.int64(0)
    predicted = np.zeros(4, np.int64)
    until_restart = np.int64(interval)
    restart = np.int64(0)
    for unit in range(units):
        if interval > 0:
            if until_restart == 0:
                # what fills the last byte up, then the marker
                if count < 32:
                    position, acc, count = _refill(data, position, acc, count)
                if count >= 8:
                    return _LEFT_OVER, unit - 1, position
                while position + 1 < end and data[position] == 0xFF and data[position + 1] == 0xFF:
                    position += 1
                if position + 1 >= end or data[position + 1] != 0xD0 + restart:
                    return _NO_RESTART, unit - 1, position
                position += 2
                restart = (restart + 1) & 7
                until_restart = np.int64(interval)
                acc, count = np.uint64(0), np.int64(0)
                predicted[:] = 0
            until_restart -= 1
        for n in range(per_unit):
            component = np.uint64(blocks[n])
            row = component + component
            begun = position
            if count < 32:
                position, acc, count = _refill(data, position, acc, count)
            entry = np.uint64(look[row, acc >> rest])
            if entry == 0:
                entry = _longer(acc, row, last, base, entries)
                if entry == 0:
                    return _spent(_NO_CODE, count - 16), unit, position
            acc <<= entry & low
            count -= np.int64(entry & low)
            size = entry >> np.uint64(16)
            if size > np.uint64(most[component, one]):
                return _spent(_OUT_OF_RANGE, count), unit, position
            if size != 0:
                value = np.int64(acc >> (np.uint64(64) - size))
                if not value >> np.int64(size - one):
                    value -= (np.int64(1) << np.int64(size)) - 1
                acc <<= size
                count -= np.int64(size)
                predicted[component] += value
                if abs(predicted[component]) > furthest[component]:
                    return _spent(_OUT_OF_RANGE, count), unit, position
            row += one
            k = one
            while k < np.uint64(64):
                if count < 32:
                    position, acc, count = _refill(data, position, acc, count)
                entry = np.uint64(look[row, acc >> rest])
                if entry == 0:
                    entry = _longer(acc, row, last, base, entries)
                    if entry == 0:
                        return _spent(_NO_CODE, count - 16), unit, position
                acc <<= entry & low
                count -= np.int64(entry & low)
                k += (entry >> np.uint64(8)) & np.uint64(255)
                if entry >> np.uint64(16) > np.uint64(most[component, k]):
                    return _spent(_OUT_OF_RANGE, count), unit, position
            if np.uint64(64) < k < np.uint64(_END):
                return _spent(_PAST_BLOCK, count), unit, position
            if count < 0:
                return _EXHAUSTED, unit, position
            if position - begun >= _AHEAD + _ALIKE and _alike(data, begun, position - _AHEAD):
                return _REPEATED, unit, position
    if count < 32:
        position, acc, count = _refill(data, position, acc, count)
    if count >= 8:
        while count >= 8:  # back to the first byte that no block needed
            position -= 1
            if data[position] == 0 and data[position - 1] == 0xFF:
                position -= 1
            count -= 8
        return _LEFT_OVER, np.int64(units - 1), position
    return _FINE, np.int64(units - 1), position
