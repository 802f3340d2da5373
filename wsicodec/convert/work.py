"""What a conversion has done so far, kept on the disk beside its target.

The folder ``.<target name>.wsicodec`` holds ``plan.json`` (what is being done, from which source),
``mask.bin`` (where the tissue is) and ``blocks.bin``: finished blocks, appended one after the other
with a checksum each. A process that is killed at any moment leaves whole blocks and at most one
torn one, which the next run cuts off. Nothing here is trusted further than its checksum, and
nothing outlives the conversion.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from wsicodec.bitstream import Mode
from wsicodec.convert.blocks import Block, CodedBlock
from wsicodec.convert.plan import ConvertPlan, LevelPlan
from wsicodec.convert.tiles import GLASS
from wsicodec.errors import SlideError
from wsicodec.slide.passport import LevelMap
from wsicodec.slide.placing import refused

Image = npt.NDArray[np.uint8]

BLOCKS = "blocks.bin"
"""Finished blocks, one after the other."""
TARGET_PART = "target.part"
"""The target while it is being written."""
_RECORD = struct.Struct("<4sIIIIII")  # magic, pass, row, column, tiles, bytes, CRC of what follows
_TILE = struct.Struct("<IIIBBddI")  # level, row, column, mode, quality, PSNR, SSIM, bytes
_PIECE = struct.Struct("<II")  # rows, columns
_MAGIC = b"WSCB"
_LOCK_TRIALS = 100  # each fails only where another process ends at that very moment


@dataclass
class _Level:
    """Where the tiles of a level are, and what they are like; arrays of (rows, columns)."""

    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.uint32]
    mode: npt.NDArray[np.uint8]
    quality: npt.NDArray[np.uint8]
    psnr: npt.NDArray[np.float64]
    ssim: npt.NDArray[np.float64]

    @classmethod
    def of(cls, level: LevelPlan) -> _Level:
        """Of a level without tiles."""
        shape = level.rows, level.columns
        return cls(
            np.full(shape, -1, np.int64),
            np.zeros(shape, np.uint32),
            np.zeros(shape, np.uint8),
            np.zeros(shape, np.uint8),
            np.full(shape, np.nan),
            np.full(shape, np.nan),
        )


class Work:
    """The work folder of a running conversion; a context manager that locks it.

    plan: of the conversion. identity: of its source and settings, JSON-ready: finished blocks are
    taken over from an earlier run only where it is the same. keep: leave the folder as it is when
    the conversion is stopped, for a later run to go on.

    Raises SlideError where another process works at it, or the disk refuses.
    """

    def __init__(self, plan: ConvertPlan, identity: Mapping[str, Any], *, keep: bool) -> None:
        self._plan = plan
        self._identity = json.loads(json.dumps(identity))
        self._keep = keep
        self.folder = work_folder(plan.target)
        self.blocks: set[Block] = set()
        self._pieces: dict[Block, tuple[int, int, int]] = {}
        self._levels = [_Level.of(level) for level in plan.levels]
        self._file: IO[bytes] | None = None
        self._lock: IO[bytes] | None = None
        self._end = 0

    def __enter__(self) -> Work:
        try:
            self._lock = _locked(self._plan.target)
            try:
                self._open()
            except BaseException as error:
                # an interrupt while finished blocks are looked through must not lose them
                self.__exit__(type(error), error, None)
                raise
        except OSError as error:
            if isinstance(error, SlideError):
                raise
            raise refused(self._plan.target, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            # closing flushes, which fails again on a full disk
            with contextlib.suppress(OSError):
                self._file.close()
        if self._lock is not None:
            _unlocked(self.folder, self._lock, keep=self._keep and kind is not None)

    def _open(self) -> None:
        plan_path, path = self.folder / "plan.json", self.folder / BLOCKS
        same = False
        # other refusals end the run: a disk that is away for a moment must not cost finished blocks
        with contextlib.suppress(FileNotFoundError, ValueError):
            same = json.loads(plan_path.read_text("utf-8")) == self._identity
        if not (self._keep and same):
            for name in ("plan.json", BLOCKS, "mask.bin"):
                (self.folder / name).unlink(missing_ok=True)
            # written last of the three and by a rename: with it, the rest belongs to it
            part = self.folder / "plan.part"
            part.write_text(json.dumps(self._identity), "utf-8")
            part.replace(plan_path)
        self._file = path.open("r+b" if path.exists() else "x+b")
        self._scan()

    def _scan(self) -> None:
        """Take over whole blocks; cut off what follows them."""
        assert self._file is not None
        file = self._file
        length = os.fstat(file.fileno()).st_size
        while True:
            file.seek(self._end)
            head = file.read(_RECORD.size)
            if len(head) < _RECORD.size:
                break
            magic, number, row, column, count, size, crc = _RECORD.unpack(head)
            if magic != _MAGIC or self._end + _RECORD.size + size > length:
                break
            body = file.read(size)
            if zlib.crc32(body, zlib.crc32(head[:-4])) != crc:
                break
            self._take(Block(number, row, column), count, body, self._end + _RECORD.size)
            self._end += _RECORD.size + size
        file.truncate(self._end)
        file.seek(self._end)

    def _take(self, block: Block, count: int, body: bytes, start: int) -> None:
        position = 0
        for _ in range(count):
            level, row, column, mode, quality, psnr, ssim, size = _TILE.unpack_from(body, position)
            position += _TILE.size
            self._note(level, row, column, mode, quality, psnr, ssim, start + position, size)
            position += size
        if position < len(body):
            rows, columns = _PIECE.unpack_from(body, position)
            self._pieces[block] = (rows, columns, start + position + _PIECE.size)
        self.blocks.add(block)

    def _note(
        self,
        level: int,
        row: int,
        column: int,
        mode: int,
        quality: int,
        psnr: float,
        ssim: float,
        offset: int,
        size: int,
    ) -> None:
        found = self._levels[level]
        at = row, column
        found.offset[at], found.size[at], found.mode[at] = offset, size, mode
        found.quality[at], found.psnr[at], found.ssim[at] = quality, psnr, ssim

    def add(self, coded: CodedBlock) -> None:
        """Keep a finished block. Raises SlideError where the disk refuses."""
        parts: list[bytes] = []
        for tile in coded.tiles:
            data = tile.data or b""
            parts.append(
                _TILE.pack(
                    tile.level,
                    tile.row,
                    tile.column,
                    tile.mode,
                    tile.quality,
                    tile.psnr,
                    tile.ssim,
                    len(data),
                )
            )
            parts.append(data)
        if coded.piece is not None:
            parts.append(_PIECE.pack(*coded.piece.shape[:2]))
            parts.append(coded.piece.tobytes())
        body = b"".join(parts)
        block = coded.block
        head = _RECORD.pack(
            _MAGIC, block.number, block.row, block.column, len(coded.tiles), len(body), 0
        )[:-4]
        crc = zlib.crc32(body, zlib.crc32(head))
        assert self._file is not None
        try:
            self._file.write(head + struct.pack("<I", crc) + body)
            self._file.flush()
        except OSError as error:
            raise refused(self._plan.target, error) from error
        self._take(block, len(coded.tiles), body, self._end + _RECORD.size)
        self._end += _RECORD.size + len(body)

    def coded_bytes(self, level: int) -> int:
        """Bytes of the level's tiles so far."""
        return int(self._levels[level].size.sum(dtype=np.int64))

    def mask(self) -> bytes | None:
        """The packed mask of an earlier run, None without one."""
        with contextlib.suppress(OSError):
            data = (self.folder / "mask.bin").read_bytes()
            if data[:4] == zlib.crc32(data[4:]).to_bytes(4, "little"):
                return data[4:]
        return None

    def keep_mask(self, packed: bytes) -> None:
        """Keep the packed mask: a resumed run must not find another.

        Blocks are forgotten: they were coded by one that is gone.
        """
        self._forget()
        part = self.folder / "mask.part"
        try:
            with part.open("wb") as file:
                file.write(zlib.crc32(packed).to_bytes(4, "little") + packed)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.folder / "mask.bin")
        except OSError as error:
            raise refused(self._plan.target, error) from error

    def _forget(self) -> None:
        """Begin without finished blocks."""
        assert self._file is not None
        self.blocks.clear()
        self._pieces.clear()
        self._levels = [_Level.of(level) for level in self._plan.levels]
        self._file.truncate(0)
        self._file.seek(0)
        self._end = 0

    def tiles(self, level: int) -> Iterator[bytes | None]:
        """Coded tiles of a level, rows from the top; None for those that are glass."""
        found = self._levels[level]
        for offset, size, mode in zip(
            found.offset.flat, found.size.flat, found.mode.flat, strict=True
        ):
            yield None if mode == GLASS else self._read(int(offset), int(size))

    def piece(self, block: Block) -> Image:
        """The piece that a finished block left, uint8 (rows, columns, 3)."""
        rows, columns, offset = self._pieces[block]
        data = self._read(offset, rows * columns * 3)
        return np.frombuffer(data, np.uint8).reshape(rows, columns, 3)

    def level_map(self, level: int) -> LevelMap:
        """What the tiles of a level are like; all-glass tiles have no bytes."""
        found = self._levels[level]
        rows, columns = found.offset.shape
        mode = found.mode.copy()
        mode[mode == GLASS] = Mode.CONSTANT
        return LevelMap(
            rows,
            columns,
            bytes=found.size,
            psnr=found.psnr.astype(np.float32),
            ssim=found.ssim.astype(np.float32),
            quality=found.quality,
            mode=mode,
        )

    def measured(self, level: int) -> Iterable[tuple[int, int, float, float]]:
        """(row, column, PSNR, SSIM) of the measured tiles of a level."""
        found = self._levels[level]
        for row, column in np.argwhere(~np.isnan(found.ssim)):
            yield (
                int(row),
                int(column),
                float(found.psnr[row, column]),
                float(found.ssim[row, column]),
            )

    def _read(self, offset: int, count: int) -> bytes:
        assert self._file is not None
        try:
            self._file.seek(offset)
            data = self._file.read(count)
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            reason = error.strerror or error
            raise SlideError(f"{self.folder}: cannot be read: {reason}") from error
        if len(data) != count:
            raise SlideError(f"{self.folder}: became shorter while it was read")
        return data


def work_folder(target: Path) -> Path:
    """Where the work on a target is kept."""
    return target.with_name(f".{target.name}.wsicodec")


@contextlib.contextmanager
def locked_folder(target: Path) -> Iterator[Path]:
    """The work folder of a target, of which nothing stays: for work that is done in one go.

    What a process that was killed left there is removed with it. Raises as ``Work``.
    """
    try:
        lock = _locked(target)
    except OSError as error:
        if isinstance(error, SlideError):
            raise
        raise refused(target, error) from error
    try:
        yield work_folder(target)
    finally:
        _unlocked(work_folder(target), lock, keep=False)


def _locked(target: Path) -> IO[bytes]:
    """An open file in the work folder, which is made, with a lock that ends with the process.

    Raises SlideError where another process has it.
    """
    folder = work_folder(target)
    path = folder / "lock"
    for _ in range(_LOCK_TRIALS):
        folder.mkdir(exist_ok=True)
        try:
            file = path.open("ab")
        except FileNotFoundError:
            continue  # another process has just removed the folder
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()
            raise
        try:
            import fcntl
        except ImportError:  # no such locks here: two runs at once are for the user to avoid
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise SlideError(f"{target}: is being written by another process") from None
        except OSError:
            # network file systems without locks
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # was removed with its folder before it was locked
    raise SlideError(f"{target}: {path} cannot be locked")


def _unlocked(folder: Path, lock: IO[bytes], *, keep: bool) -> None:
    if not keep:
        _remove(folder)
    lock.close()
    if not keep and os.name == "nt":
        _remove(folder)  # Windows removes no open file


def _remove(folder: Path) -> None:
    """Remove the folder and what a conversion puts there, nothing else."""
    names = (BLOCKS, "mask.bin", "mask.part", "plan.json", "plan.part", TARGET_PART, "lock")
    with contextlib.suppress(OSError):
        for name in names:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
