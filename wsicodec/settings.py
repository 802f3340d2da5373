"""Process-wide limits: the thread budget."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from wsicodec.errors import SettingsError

MAX_THREADS = 1024


def thread_budget() -> int:
    """Threads that may compute at once: ``WSICODEC_NUM_THREADS``, else this process's cores."""
    text = os.environ.get("WSICODEC_NUM_THREADS", "")
    if text:
        if not text.isdecimal() or not 1 <= int(text) <= MAX_THREADS:
            raise SettingsError(f"WSICODEC_NUM_THREADS={text!r} is not within 1 ... {MAX_THREADS}")
        return int(text)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Budget:
    """Slots for computing threads. Callers beyond the budget wait, whatever pool they come from."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.lock = threading.Lock()
        self.slots: threading.Semaphore | None = None

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        with self.lock:
            if self.slots is None:
                self.slots = threading.Semaphore(thread_budget())
            slots = self.slots
        with slots:
            yield


_budget = _Budget()
compute_slot = _budget.slot
"""Context manager around one tile's computation; each runs one thread of the budget."""

if hasattr(os, "register_at_fork"):
    # a forked child must not inherit slots that threads of the parent held
    os.register_at_fork(after_in_child=_budget.reset)
