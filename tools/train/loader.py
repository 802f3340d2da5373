"""Batches drawn ahead by processes of their own, so that a fast device does not wait for crops.

A batch depends on the seed and the step alone: any number of workers gives the same ones, and a run
that goes on at step n sees what it would have seen. Images lie once in shared memory; workers
import neither torch nor this run's main module.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import traceback
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from tools.train.images import CropSettings, Sampler, Source

SLOTS = 2
"""Batches that each worker draws ahead."""

Array = np.ndarray[Any, Any]
Table = list[tuple[str, tuple[bool, ...], list[tuple[int, tuple[int, ...]]]]]
"""(name, JPEG pasts, (offset, shape) of each image) of every source in shared memory."""


def share(sources: list[Source], memory: Any) -> Table:
    """Copy images into shared memory."""
    flat, at, table = np.frombuffer(memory, np.uint8), 0, []
    for s in sources:
        places = []
        for image in s.images:
            flat[at : at + image.size] = image.reshape(-1)
            places.append((at, image.shape))
            at += image.size
        table.append((s.name, s.jpeg, places))
    return table


def shared(memory: Any, table: Table) -> list[Source]:
    """Sources whose images lie in shared memory."""
    flat = np.frombuffer(memory, np.uint8)
    sources = []
    for name, jpeg, places in table:
        images = [flat[at : at + int(np.prod(shape))].reshape(shape) for at, shape in places]
        sources.append(Source(name, images, jpeg))
    return sources


def _work(
    tasks: Connection, memory: Any, table: Table, slots: list[Any], crop: int, seed: int,
    settings: CropSettings, batch: int,
) -> None:  # fmt: skip
    """Answer (step, part) with the shape of the batch that is now in the next slot."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # signals to the run's group are the run's to answer
    try:
        sampler = Sampler(shared(memory, table), crop, seed, settings)
        turn = 0
        while True:
            step, part = tasks.recv()
            tiles = sampler.tiles(step, part, batch)
            np.frombuffer(slots[turn], np.uint8)[: tiles.size] = tiles.reshape(-1)
            tasks.send((tiles.shape, None))
            turn = (turn + 1) % len(slots)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the run is over
    except Exception:  # whatever it is, the run must see it
        tasks.send(((), traceback.format_exc()))
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                tasks.recv()


class _Worker:
    def __init__(self, context: Any, slot_bytes: int, arguments: tuple[Any, ...]) -> None:
        self.slots = [context.RawArray(ctypes.c_uint8, slot_bytes) for _ in range(SLOTS)]
        self.tasks, theirs = context.Pipe()
        memory, table, *rest = arguments
        self.process = context.Process(
            target=_work, args=(theirs, memory, table, self.slots, *rest), daemon=True
        )
        self.process.start()
        theirs.close()  # so that either side sees the other's end
        self.turn = 0

    def receive(self) -> Array:
        try:
            shape, failure = self.tasks.recv()
        except (EOFError, ConnectionResetError):
            raise RuntimeError("a process that draws crops has died") from None
        if failure:
            raise RuntimeError(f"a process that draws crops has failed:\n{failure}")
        flat = np.frombuffer(self.slots[self.turn], np.uint8)
        self.turn = (self.turn + 1) % SLOTS
        return flat[: int(np.prod(shape))].reshape(shape).copy()

    def close(self) -> None:
        self.tasks.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


class Loader:
    """The pixels of every training step from ``first`` on: ``accumulate`` arrays for each, (n, 3,
    rows, columns) uint8 (``Sampler.tiles``). A context manager; workers end with it.

    workers: processes; 0 draws crops when they are asked for.
    """

    def __init__(
        self, sources: list[Source], crop: int, seed: int, settings: CropSettings, batch: int,
        accumulate: int = 1, first: int = 0, workers: int = 0,
    ) -> None:  # fmt: skip
        self.batch, self.accumulate, self.first = batch, accumulate, first
        self.sampler = Sampler(sources, crop, seed, settings)
        self.received = 0
        self.workers: list[_Worker] = []
        if not workers:
            return
        context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
        memory = context.RawArray(ctypes.c_uint8, sum(i.size for s in sources for i in s.images))
        shapes = self.sampler.shapes(batch)
        slot = max(3 * n * rows * columns for n, rows, columns in shapes)
        arguments = memory, share(sources, memory), crop, seed, settings, batch
        for _ in range(workers):
            self.workers.append(_Worker(context, slot, arguments))
        for k in range(SLOTS * workers):
            self._ask(k)

    def _place(self, k: int) -> tuple[int, int]:
        """(step, part) of the k-th array."""
        return self.first + k // self.accumulate, k % self.accumulate

    def _ask(self, k: int) -> None:
        self.workers[k % len(self.workers)].tasks.send(self._place(k))

    def _next(self) -> Array:
        k, self.received = self.received, self.received + 1
        if not self.workers:
            return self.sampler.tiles(*self._place(k), self.batch)
        tiles = self.workers[k % len(self.workers)].receive()
        self._ask(k + SLOTS * len(self.workers))
        return tiles

    def step(self) -> list[Array]:
        """The pixels of the next step."""
        return [self._next() for _ in range(self.accumulate)]

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.close()
        self.workers = []
