"""What a forked process may not inherit: locks of threads that it lacks, places in open files."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Renewable(Protocol):
    """Has a state that only the process that made it may use."""

    def renew(self) -> None:
        """Forget that state. Called in a new process, before any other thread of it runs."""
        ...


_renewable: weakref.WeakSet[Renewable] = weakref.WeakSet()


def renewed_after_fork(thing: Renewable) -> None:
    """Have ``thing.renew()`` called in each process that is forked while it lives."""
    _renewable.add(thing)


def _after_fork() -> None:
    for thing in list(_renewable):
        thing.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
