"""Results of many tasks, computed by threads, a bounded number of them under way."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
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


def as_done(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], T]], limit: int) -> Iterator[T]:
    """Results of ``tasks`` as they get done, else as ``in_order``: none waits for a slower one."""
    pending: set[Future[T]] = set()
    waiting = iter(tasks)
    more = True
    try:
        while more or pending:
            while more and len(pending) < limit:
                task = next(waiting, None)
                if task is None:
                    more = False
                else:
                    pending.add(pool.submit(task))
            if pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
    finally:
        for future in pending:
            future.cancel()
