"""Decoded pieces of a slide, kept up to a number of bytes."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from concurrent.futures import Future

from wsicodec.forking import renewed_after_fork
from wsicodec.slide.protocol import Image

Key = tuple[int, int, int]  # level, row, column


class SegmentCache:
    """Latest decoded tiles up to a number of bytes; one thread decodes what several ask for.

    A forked process begins with an empty one: the thread that it would wait for is not there.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.renew()
        renewed_after_fork(self)

    def renew(self) -> None:
        """Forget all images, and who is making which."""
        self._lock = threading.Lock()
        self._ready: collections.OrderedDict[Key, Image] = collections.OrderedDict()
        self._running: dict[Key, Future[Image]] = {}
        self._bytes = 0

    def get(self, key: Key, make: Callable[[], Image]) -> Image:
        """The image of a key, made by ``make`` where it is not kept; its errors pass through."""
        with self._lock:
            image = self._ready.get(key)
            if image is not None:
                self._ready.move_to_end(key)
                return image
            running = self._running.get(key)
            mine = running is None
            if running is None:
                running = self._running[key] = Future()
        if not mine:
            return running.result()
        try:
            image = make()
        except BaseException as error:
            with self._lock:
                del self._running[key]
            running.set_exception(error)
            raise
        with self._lock:
            del self._running[key]
            self._ready[key] = image
            self._bytes += image.nbytes
            while self._bytes > self._limit:
                self._bytes -= self._ready.popitem(last=False)[1].nbytes
        running.set_result(image)
        return image
