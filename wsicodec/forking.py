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
    """Have ``thing.renew()`` called in each process that is forked while it lives.

    What that raises keeps no other thing from its turn; the first of it goes to
    ``sys.unraisablehook``.
    """
    _renewable.add(thing)


def _after_fork() -> None:
    errors: list[BaseException] = []
    for thing in list(_renewable):
        try:
            thing.renew()
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]  # Python shows it, and goes on


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
