"""Who codes blocks: threads of this process, or processes of their own.

Coding a tile is many short calls that take turns under the interpreter's lock: two threads give
1.1 to 1.6 times one, two processes nearly two. A worker is ``python -m wsicodec.convert.worker``
with a pipe to either side; nothing of the caller's program is imported again (as
``multiprocessing`` would), and a decoder that crashes on a damaged tile takes only its worker down.
Messages are a JSON object and raw bytes: models that this process may decode with, then settings,
then blocks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from wsicodec import errors
from wsicodec.convert.blocks import Block, CodedBlock, area_of, code_block
from wsicodec.convert.plan import ConvertPlan, ConvertSettings, LevelPlan, Pass, passes_of
from wsicodec.convert.tiles import CodedTile, TileCoder
from wsicodec.errors import SlideError, WsicodecError
from wsicodec.models.store import allowed_models
from wsicodec.slide.protocol import SlideReader
from wsicodec.tissue.mask import TissueMask

Image = npt.NDArray[np.uint8]

_FRAME = struct.Struct("<II")  # bytes of JSON, bytes after it
_MAX_JSON = 2**26


class BlockCoder(Protocol):
    """Codes blocks; as many threads may call at once as there are jobs."""

    def code(self, block: Block, pixels: Image | None) -> CodedBlock:
        """Code a block. pixels: of its area; None where they are read from the slide."""
        ...

    def stop(self) -> None:
        """End what is under way, soon."""
        ...


class Here:
    """Codes blocks in the calling thread."""

    def __init__(self, slide: SlideReader, passes: tuple[Pass, ...], coder: TileCoder) -> None:
        self._slide = slide
        self._passes = passes
        self._coder = coder
        self._stopped = threading.Event()

    def code(self, block: Block, pixels: Image | None) -> CodedBlock:
        passed = self._passes[block.number]
        if pixels is None:
            level, area = passed.levels[0].source, area_of(block, passed)
            assert level is not None
            pixels = self._slide.read_region(level, area.y, area.x, area.height, area.width)
        return code_block(block, passed, pixels, self._coder, self._stopped)

    def stop(self) -> None:
        self._stopped.set()


class Processes:
    """Codes blocks in worker processes, which start when they are first needed."""

    def __init__(self, plan: ConvertPlan, mask: TissueMask | None, jobs: int) -> None:
        self._start = {
            "path": str(plan.source.path.absolute()),
            "settings": settings_as_dict(plan.settings),
            "levels": [dataclasses.asdict(level) for level in plan.levels],
            "downsamples": [level_downsample(plan, level) for level in plan.levels],
        }
        self._mask = b"" if mask is None else mask.pack()
        self._models = allowed_models()
        self._passes = plan.passes
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(jobs):
            self._idle.put(None)
        self._lock = threading.Lock()
        self._all: list[_Worker] = []
        self._stopped = False

    def code(self, block: Block, pixels: Image | None) -> CodedBlock:
        worker = self._idle.get()
        try:
            if worker is None:
                worker = self._begin()
            return worker.code(block, self._passes[block.number], pixels)
        finally:
            self._idle.put(worker)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            workers, self._all = self._all, []
        for worker in workers:
            worker.stop()

    def _begin(self) -> _Worker:
        with self._lock:
            if self._stopped:
                raise SlideError("the conversion was stopped")
            try:
                worker = _Worker(self._start, self._mask, self._models)
            except OSError as error:
                raise SlideError(
                    f"no process to compute can be started: {error.strerror or error}; use fewer "
                    "jobs"
                ) from error
            self._all.append(worker)
        return worker


class _Worker:
    """One worker process, from the side of its parent."""

    def __init__(
        self, start: dict[str, Any], mask: bytes, models: Sequence[tuple[str, bytes]]
    ) -> None:
        self._process = subprocess.Popen(
            # -P: what lies in the current folder is not to be imported
            [sys.executable, "-P", "-m", "wsicodec.convert.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "WSICODEC_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            },
            # an interrupt from the keyboard is for the parent, which then stops its workers
            start_new_session=True,
        )
        for digest, data in models:
            self._send({"model": digest}, data)
        self._send(start, mask)

    def code(self, block: Block, passed: Pass, pixels: Image | None) -> CodedBlock:
        message: dict[str, Any] = {"block": [block.number, block.row, block.column]}
        if pixels is not None:
            message["shape"] = list(pixels.shape)
        self._send(message, b"" if pixels is None else pixels.tobytes())
        assert self._process.stdout is not None
        reply = receive(self._process.stdout)
        if reply is None:
            code = self._process.wait()
            reason = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise SlideError(
                f"level {passed.levels[0].index}, tiles from row {block.row * passed.side}, column "
                f"{block.column * passed.side}: the process that coded them ended by {reason}: "
                "killed, out of memory, or crashed on a damaged tile"
            )
        return block_of(block, *reply)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError, ValueError):
                    pipe.close()

    def _send(self, message: dict[str, Any], data: bytes) -> None:
        assert self._process.stdin is not None
        # a worker that died is noticed when its answer is missing
        with contextlib.suppress(BrokenPipeError):
            send(self._process.stdin, message, data)


def level_downsample(plan: ConvertPlan, level: LevelPlan) -> float:
    """Width of level 0 over the width of a level."""
    # averages round up: their pixels are exactly twice as large each time
    first = next(i for i in range(level.index, -1, -1) if plan.levels[i].source is not None)
    source = plan.levels[first].source
    assert source is not None
    return plan.source.levels[source].downsample * 2.0 ** (level.index - first)


# The two sides of the pipe


def send(pipe: IO[bytes], message: dict[str, Any], data: bytes) -> None:
    """Write one message."""
    text = json.dumps(message).encode()
    pipe.write(_FRAME.pack(len(text), len(data)))
    pipe.write(text)
    pipe.write(data)
    pipe.flush()


def receive(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """Read one message; None where the other side has gone."""
    head = pipe.read(_FRAME.size)
    if len(head) < _FRAME.size:
        return None
    text_bytes, data_bytes = _FRAME.unpack(head)
    if text_bytes > _MAX_JSON:
        raise SlideError("a worker process answers with what is no message")
    text, data = pipe.read(text_bytes), pipe.read(data_bytes)
    if len(text) < text_bytes or len(data) < data_bytes:
        return None
    message: dict[str, Any] = json.loads(text)
    return message, data


def answers(
    coder: BlockCoder, messages: Iterator[tuple[dict[str, Any], bytes]]
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The answer to each message: a worker's whole work."""
    for message, data in messages:
        block = Block(*message["block"])
        pixels = None
        if "shape" in message:
            pixels = np.frombuffer(data, np.uint8).reshape(message["shape"])
        try:
            yield message_of(coder.code(block, pixels))
        except WsicodecError as error:
            yield {"error": type(error).__name__, "reason": str(error)}, b""
        except MemoryError:
            yield {"error": "SlideError", "reason": "out of memory"}, b""


def message_of(coded: CodedBlock) -> tuple[dict[str, Any], bytes]:
    """A coded block as a message."""
    rows = []
    for tile in coded.tiles:
        size = None if tile.data is None else len(tile.data)
        figures = (tile.mode, tile.quality, tile.psnr, tile.ssim)
        rows.append((tile.level, tile.row, tile.column, size, *figures))
    piece = coded.piece
    data = b"".join(tile.data for tile in coded.tiles if tile.data is not None)
    if piece is None:
        return {"tiles": rows}, data
    return {"tiles": rows, "piece": list(piece.shape)}, data + piece.tobytes()


def block_of(block: Block, message: dict[str, Any], data: bytes) -> CodedBlock:
    """The coded block in a message. Raises the error that the message tells of."""
    if "error" in message:
        raise getattr(errors, message["error"], SlideError)(message["reason"])
    tiles, position = [], 0
    for level, row, column, size, mode, quality, psnr, ssim in message["tiles"]:
        stream = None if size is None else data[position : position + size]
        position += size or 0
        tiles.append(CodedTile(level, row, column, stream, mode, quality, psnr, ssim))
    piece = None
    if "piece" in message:
        piece = np.frombuffer(data, np.uint8, offset=position).reshape(message["piece"])
    return CodedBlock(block, tuple(tiles), piece)


def settings_as_dict(settings: ConvertSettings) -> dict[str, Any]:
    """JSON-ready; ``ConvertSettings(**settings_as_dict(s))`` equals ``s``."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    return {**values, "options": dict(settings.options)}


def coder_of(message: dict[str, Any], mask: bytes, slide: SlideReader) -> BlockCoder:
    """What a worker codes with, by the first message that it gets."""
    settings = ConvertSettings(**message["settings"])
    levels = [LevelPlan(**level) for level in message["levels"]]
    coder = TileCoder(
        settings,
        TissueMask.parse(mask) if mask else None,
        dict(enumerate(message["downsamples"])),
    )
    return Here(slide, passes_of(levels, settings), coder)
