"""Processes by an identity that outlives them, and which of them are dead."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

LEASE = 180.0
"""Seconds after which a process of another machine that gives no sign of life has lost its rows."""
BEAT = 20.0
"""Seconds between signs of life."""


@dataclass(frozen=True)
class Process:
    """A process, told apart from every other one of any machine.

    host: machine, its present boot, and the namespace that the pid counts in. born: when it
    started, in the system's own unit; empty where the system does not tell.
    """

    host: str
    pid: int
    born: str

    def __str__(self) -> str:
        return json.dumps([self.host, self.pid, self.born])

    @classmethod
    def parse(cls, text: str) -> Process | None:
        """What ``str()`` wrote; None for anything else."""
        try:
            host, pid, born = json.loads(text)
        except (ValueError, TypeError, RecursionError):
            return None
        if isinstance(host, str) and isinstance(pid, int) and isinstance(born, str):
            return cls(host, pid, born)
        return None

    def gone(self) -> bool:
        """True when it is known to have ended; False also where this machine cannot tell."""
        if os.name != "posix" or self.host != this_host() or self.pid <= 0:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
        born = _born(self.pid)
        return bool(born is None or (self.born and born and born != self.born))


def this_host() -> str:
    """Where pids mean what they mean here."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))  # noqa: PTH115 - no path, a name
    return " ".join(parts)


def process(pid: int | None = None) -> Process:
    """This process, or another of this machine."""
    number = os.getpid() if pid is None else pid
    return Process(this_host(), number, _born(number) or "")


def _born(pid: int) -> str | None:
    """Start time in clock ticks since boot; "" where the system has no /proc, None for a zombie
    or for no process at all."""
    if not Path("/proc/self/stat").exists():
        return ""
    try:
        content = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # the second field is the name in parentheses and may hold anything
    fields = content.rpartition(")")[2].split()
    return None if len(fields) < 20 or fields[0] in "ZX" else fields[19]


class Watch:
    """Tells which runs are dead. Those of other machines are by their heartbeats standing still.

    Clocks of different machines are never compared: what counts is this one's, between two looks.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float]] = {}

    def dead(self, run: int, owner: Process, heartbeat: float) -> bool:
        """True when the run's process is known to be gone, or was silent for LEASE seconds."""
        if owner.host == this_host():
            return owner.gone()
        now = time.monotonic()
        seen, since = self._seen.setdefault(run, (heartbeat, now))
        if seen != heartbeat:
            self._seen[run] = (heartbeat, now)
            return False
        return now - since > LEASE
