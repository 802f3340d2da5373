"""Results of many tasks in order, computed by threads, a bounded number of them under way."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_order(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], T]], limit: int) -> Iterator[T]:
    """Results of ``tasks`` in their order; at most ``limit`` are submitted and not yet taken.

    tasks: consumed as results are taken, so they may be as many as a slide has tiles. What a task
    raises is raised here in its place; tasks not yet started are then cancelled.
    """
    pending: collections.deque[Future[T]] = collections.deque()
    try:
        for task in tasks:
            pending.append(pool.submit(task))
            if len(pending) >= limit:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
