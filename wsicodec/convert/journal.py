"""The journal of a batch: an SQLite file with a row for each slide and each process at work.

Every change is one transaction that takes the write lock first, so that several processes, on one
machine or several, share a journal and no slide is taken twice. A process that dies leaves its rows
``running``; the others take them back when it is known to be gone (same machine), or when its
heartbeat has stood still for LEASE seconds by their own clock (another machine): clocks of
different machines are never compared.

The file is kept in SQLite's rollback mode, never WAL: WAL shares memory between its users and so
breaks on network file systems, it is a property of the file that whoever opens it elsewhere
inherits, and a few writes a minute gain nothing from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from wsicodec.errors import FormatError, SettingsError, SlideError, UnsupportedError

VERSION = 1
"""Of the tables. A journal of a later version is refused; an earlier one would be converted."""
APPLICATION = 0x57534A4C  # "WSJL", kept in the file's header
LEASE = 180.0
"""Seconds after which a process of another machine that gives no sign of life has lost its rows."""
BEAT = 20.0
"""Seconds between signs of life."""
LOCK_SECONDS = 60.0
"""How long another process may hold the write lock before that is an error."""
MAX_MESSAGE = 2000

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
STATES = (WAITING, RUNNING, DONE, FAILED)
LOST = "WorkerLost"
"""Error type of a slide whose process ended without a word."""

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE runs (
    id INTEGER PRIMARY KEY,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    born TEXT NOT NULL,           -- start of the process, so that a pid used again is told apart
    settings TEXT NOT NULL,       -- hash, as in slides
    settings_json TEXT NOT NULL,
    wsicodec TEXT NOT NULL,
    started REAL NOT NULL,        -- seconds since 1970, UTC, as all times
    heartbeat REAL NOT NULL,
    ended REAL
);
CREATE TABLE slides (
    id INTEGER PRIMARY KEY,
    source BLOB NOT NULL UNIQUE,  -- path below the source folder, bytes as the system has them
    target BLOB NOT NULL UNIQUE,  -- path below the output folder
    state TEXT NOT NULL CHECK (state IN ('waiting', 'running', 'done', 'failed')),
    attempts INTEGER NOT NULL DEFAULT 0,  -- conversions begun, ever
    tries INTEGER NOT NULL DEFAULT 0,     -- of them in the run that last listed the slide
    run INTEGER REFERENCES runs,
    worker TEXT,                  -- who converts or converted it
    vacant INTEGER,               -- 1: nothing was under the target's name before the attempt
    file_bytes INTEGER NOT NULL,  -- of the source's file when it was listed
    file_mtime_ms INTEGER NOT NULL,
    file_sha256 TEXT,
    settings TEXT,
    wsicodec TEXT,
    bytes_in INTEGER,             -- of the whole slide, which may be several files
    bytes_out INTEGER,
    target_mtime_ms INTEGER,
    mpp_x REAL, mpp_y REAL,
    tiles_measured INTEGER,
    psnr_mean REAL, psnr_worst REAL,
    ssim_mean REAL, ssim_worst REAL,
    seconds REAL,
    error TEXT, message TEXT,     -- of the last attempt that failed
    report TEXT,                  -- JSON: all that the conversion reported
    listed REAL NOT NULL,
    started REAL,
    finished REAL
);
CREATE INDEX slides_by_state ON slides (state, tries, id);
"""


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
        except (ValueError, TypeError):
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
        except OSError:
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


@dataclass(frozen=True)
class Listed:
    """A slide that a run found.

    source: path below the source folder with ``/`` between names. file_bytes, file_mtime_ms: of the
    file. sha256: of its bytes, where the run compares content.
    """

    source: str
    file_bytes: int
    file_mtime_ms: int
    sha256: str | None = None


@dataclass(frozen=True)
class Result:
    """A conversion that succeeded. target_mtime_ms: of the output. report: JSON-ready."""

    bytes_in: int
    bytes_out: int
    target_mtime_ms: int
    seconds: float
    mpp_x: float | None = None
    mpp_y: float | None = None
    sha256: str | None = None
    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A slide as the journal has it; None where it has not come to that yet.

    bytes_in, bytes_out: of the whole slide and of its output. tiles_measured and the figures
    behind: quality of the tiles that the conversion compared. seconds: of the conversion. error,
    message: of the last attempt that failed. replace_ours: what is under the target's name is an
    earlier output of this journal, or of an attempt that was cut off.
    """

    id: int
    source: str
    target: str
    state: str
    attempts: int
    tries: int
    worker: str | None
    file_bytes: int
    file_mtime_ms: int
    file_sha256: str | None
    settings: str | None
    wsicodec: str | None
    bytes_in: int | None
    bytes_out: int | None
    target_mtime_ms: int | None
    mpp_x: float | None
    mpp_y: float | None
    tiles_measured: int | None
    psnr_mean: float | None
    psnr_worst: float | None
    ssim_mean: float | None
    ssim_worst: float | None
    seconds: float | None
    error: str | None
    message: str | None
    started: float | None
    finished: float | None
    replace_ours: bool = False

    @property
    def ratio(self) -> float | None:
        """Output's bytes over source's."""
        if self.bytes_in and self.bytes_out is not None and self.state == DONE:
            return self.bytes_out / self.bytes_in
        return None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; names that are no text keep their bytes as lone surrogates."""
        hidden = {"id", "replace_ours", "target_mtime_ms"}
        values = {name: value for name, value in vars(self).items() if name not in hidden}
        owner = None if self.worker is None else Process.parse(self.worker)
        if owner is not None:
            values["worker"] = f"{owner.host.partition(' ')[0]}:{owner.pid}"
        return {**values, "ratio": self.ratio}


@dataclass(frozen=True)
class Totals:
    """Numbers of slides; bytes of those that are done."""

    slides: int
    done: int
    failed: int
    bytes_in: int
    bytes_out: int


_COLUMNS = tuple(name for name in Row.__dataclass_fields__ if name != "replace_ours")


class Journal:
    """An open journal. Not thread-safe. Whatever SQLite refuses is raised as SlideError."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._database = connection
        self._path = path
        self._run: int | None = None
        self._watched: dict[int, tuple[float, float]] = {}

    # -- opening --

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open, or begin, the journal at ``path``.

        Raises SlideError where it cannot be written, FormatError for a file that is no journal,
        UnsupportedError for one of a later version.
        """
        # connect() makes an empty file of any name; tell what is wrong before that
        if not path.parent.is_dir():
            raise SlideError(f"{path}: folder {path.parent} does not exist")
        with _named(path):
            connection = sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None)
        journal = cls(connection, path)
        try:
            journal._prepare()
        except BaseException:
            connection.close()
            raise
        return journal

    @classmethod
    def read(cls, path: Path, *, copy: bool = False) -> Journal:
        """Open an existing journal to look at it, which changes nothing on the disk.

        copy: a copy in memory, which may be changed; empty where there is no journal. Raises as
        ``open``.
        """
        if copy:
            connection = sqlite3.connect(":memory:", isolation_level=None)
            journal = cls(connection, path)
            if path.exists():
                with cls.read(path) as original, _named(path):
                    original._database.backup(connection)
            journal._prepare()
            return journal
        if not path.is_file():
            raise SlideError(f"{path}: there is no journal")
        with _named(path):
            # a crash may have left a transaction to be rolled back before anything can be read
            mode = "rw" if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK) else "ro"
            connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}",
                uri=True,
                timeout=LOCK_SECONDS,
                isolation_level=None,
            )
        journal = cls(connection, path)
        try:
            journal._check()
        except BaseException:
            connection.close()
            raise
        return journal

    def _prepare(self) -> None:
        with self._change() as database:
            tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            application = database.execute("PRAGMA application_id").fetchone()[0]
            if not tables and not application:
                for statement in _SCHEMA.split(";"):
                    database.execute(statement)
                database.execute(f"PRAGMA application_id = {APPLICATION}")
                database.execute(f"PRAGMA user_version = {VERSION}")
        self._check()
        with _named(self._path):
            self._database.execute("PRAGMA journal_mode = DELETE")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.execute("PRAGMA temp_store = MEMORY")
            self._database.execute("CREATE TEMP TABLE mine (id INTEGER PRIMARY KEY)")

    def _check(self) -> None:
        with _named(self._path):
            application = self._database.execute("PRAGMA application_id").fetchone()[0]
            version = self._database.execute("PRAGMA user_version").fetchone()[0]
        if application != APPLICATION:
            raise FormatError(f"{self._path}: is no journal of convert-batch")
        if version != VERSION:
            raise UnsupportedError(
                f"{self._path}: the journal has version {version}, this wsicodec knows {VERSION}; "
                "use the wsicodec that wrote it, or another --journal"
            )

    def close(self) -> None:
        """Close the file; a run that is under way ends, and what it had not finished waits."""
        try:
            if self._run is not None:
                self.end()
        finally:
            self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the write lock from its start."""
        with _named(self._path):
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    # -- what is known already --

    def known(self) -> dict[str, tuple[str, int, int]]:
        """By source: its target, and the bytes and time in ms of its file when last listed."""
        with _named(self._path):
            found = self._database.execute(
                "SELECT source, target, file_bytes, file_mtime_ms FROM slides"
            ).fetchall()
        return {_text(row[0]): (_text(row[1]), row[2], row[3]) for row in found}

    def rows(self, *, mine: bool = False) -> list[Row]:
        """All slides by name, or those of the present run."""
        where = "WHERE id IN (SELECT id FROM mine)" if mine else ""
        with _named(self._path):
            found = self._database.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM slides {where} ORDER BY source"
            ).fetchall()
        return [_row(values) for values in found]

    def root(self) -> str | None:
        """The source folder that the journal was last used with."""
        with _named(self._path):
            found = self._database.execute("SELECT value FROM meta WHERE name = 'root'").fetchone()
        return None if found is None else _text(found[0])

    # -- a run --

    def begin(
        self,
        root: str,
        listed: Sequence[Listed],
        settings: str,
        settings_json: str,
        wsicodec: str,
        *,
        output: Path,
        name_targets: Callable[[Sequence[str], Mapping[str, str]], Mapping[str, str]],
        overwrite: bool = False,
    ) -> None:
        """Start a run: list its slides, and decide which of them wait.

        root: the source folder. settings: hash of all that decides the output's bytes.
        name_targets: outputs of (sources, outputs that sources have already). A slide is
        done when its source has the size and time (or digest) of that day, it was converted with
        these settings, and the output is there with the size that it had.

        Raises SettingsError where another run with other settings is at work, slides are done with
        other settings (unless ``overwrite``), or the journal knows another file by a slide's name.
        """
        now = time.time()
        self.recover()
        me = process()
        with self._change() as database:
            others = database.execute(
                "SELECT host, pid FROM runs WHERE ended IS NULL AND settings <> ? "
                "AND heartbeat > ?",
                (settings, now - LEASE),
            ).fetchall()
            if others:
                host, pid = others[0]
                raise SettingsError(
                    f"{self._path}: process {pid} on {host.partition(' ')[0]} converts into this "
                    "journal with other settings; wait for its end, or use another output"
                )
            moved = self.root() not in (None, root)
            stale = []
            database.execute("DELETE FROM mine")
            taken = {source: target for source, (target, _, _) in self.known().items()}
            targets = name_targets([slide.source for slide in listed], taken)
            for slide in listed:
                values = database.execute(
                    f"SELECT {', '.join(_COLUMNS)} FROM slides WHERE source = ?",
                    (_bytes(slide.source),),
                ).fetchone()
                if values is None:
                    row = self._insert(slide, targets[slide.source], now)
                else:
                    found = _row(values)
                    same = _same_file(found, slide)
                    if moved and not same:
                        raise SettingsError(
                            f"{self._path}: knows another {printable(slide.source)}, below "
                            f"{printable(self.root() or '')}; use another output folder"
                        )
                    row = found.id
                    if found.state == DONE and found.settings != settings and not overwrite:
                        stale.append(slide.source)
                    self._relist(found, slide, settings, same=same, output=output)
                database.execute("INSERT INTO mine VALUES (?)", (row,))
            if stale:
                raise SettingsError(
                    f"{self._path}: {len(stale)} slides are done with other settings, "
                    f"{printable(stale[0])} among them; --overwrite converts them again, or use "
                    "another output folder"
                )
            database.execute(
                "INSERT INTO meta VALUES ('root', ?) "
                "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                (_bytes(root),),
            )
            self._run = database.execute(
                "INSERT INTO runs (host, pid, born, settings, settings_json, wsicodec, started, "
                "heartbeat) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (me.host, me.pid, me.born, settings, settings_json, wsicodec, now, now),
            ).lastrowid

    def _insert(self, slide: Listed, target: str, now: float) -> int:
        identity = self._database.execute(
            "INSERT INTO slides (source, target, state, file_bytes, file_mtime_ms, file_sha256, "
            "listed) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                _bytes(slide.source),
                _bytes(target),
                WAITING,
                slide.file_bytes,
                slide.file_mtime_ms,
                slide.sha256,
                now,
            ),
        ).lastrowid
        assert identity is not None
        return identity

    def _relist(
        self, found: Row, slide: Listed, settings: str, *, same: bool, output: Path
    ) -> None:
        if found.state == RUNNING:
            return
        if found.state == DONE and same and found.settings == settings:
            size = tree_bytes(output / found.target)
            if size is not None and size == found.bytes_out:
                return
        self._database.execute(
            "UPDATE slides SET state = ?, tries = 0, file_bytes = ?, file_mtime_ms = ?, "
            "file_sha256 = ? WHERE id = ?",
            (WAITING, slide.file_bytes, slide.file_mtime_ms, slide.sha256, found.id),
        )

    def beat(self) -> None:
        """Give a sign of life. Raises SlideError when the others have given this run up."""
        with self._change() as database:
            changed = database.execute(
                "UPDATE runs SET heartbeat = ? WHERE id = ? AND ended IS NULL",
                (time.time(), self._run),
            ).rowcount
        if not changed:
            raise SlideError(
                f"{self._path}: this process gave no sign of life for {LEASE:.0f} s, and others "
                "took its slides over"
            )

    def claim(self, settings: str, wsicodec: str, output: Path) -> Row | None:
        """Take the next slide that waits, those tried least often first; None when none does."""
        with self._change() as database:
            values = database.execute(
                f"SELECT {', '.join(_COLUMNS)}, vacant FROM slides WHERE state = ? "
                "AND id IN (SELECT id FROM mine) ORDER BY tries, id LIMIT 1",
                (WAITING,),
            ).fetchone()
            if values is None:
                return None
            *values, cut_off = values
            row = _row(values)
            there = os.path.lexists(output / row.target)
            ours = there and (cut_off or _untouched(row, output / row.target))
            database.execute(
                "UPDATE slides SET state = ?, attempts = attempts + 1, tries = tries + 1, run = ?, "
                "worker = NULL, vacant = ?, settings = ?, wsicodec = ?, started = ?, "
                "finished = NULL WHERE id = ?",
                (
                    RUNNING,
                    self._run,
                    int(bool(cut_off) or not there),
                    settings,
                    wsicodec,
                    time.time(),
                    row.id,
                ),
            )
        return _row(
            (*values[:3], RUNNING, row.attempts + 1, row.tries + 1, *values[6:]),
            replace_ours=bool(ours),
        )

    def assign(self, identity: int, worker: str) -> None:
        """Note who converts a claimed slide."""
        self._mine(identity, "worker = ?", worker)

    def restarted(self, identity: int, worker: str) -> int:
        """Note that a claimed slide began again elsewhere; how often this run has tried it."""
        self._mine(
            identity, "attempts = attempts + 1, tries = tries + 1, worker = ?", _storable(worker)
        )
        with _named(self._path):
            found = self._database.execute("SELECT tries FROM slides WHERE id = ?", (identity,))
            return int(found.fetchone()[0])

    def finish(self, identity: int, result: Result) -> bool:
        """Write a success down. False when the slide is no longer this run's."""
        quality = result.report.get("quality") or {}
        worst_psnr = (quality.get("psnr_worst") or {}).get("psnr")
        worst_ssim = (quality.get("ssim_worst") or {}).get("ssim")
        return self._mine(
            identity,
            "state = 'done', vacant = NULL, bytes_in = ?, bytes_out = ?, target_mtime_ms = ?, "
            "seconds = ?, mpp_x = ?, mpp_y = ?, file_sha256 = coalesce(?, file_sha256), "
            "tiles_measured = ?, psnr_mean = ?, psnr_worst = ?, ssim_mean = ?, ssim_worst = ?, "
            "report = ?, error = NULL, message = NULL, finished = ?",
            result.bytes_in,
            result.bytes_out,
            result.target_mtime_ms,
            result.seconds,
            result.mpp_x,
            result.mpp_y,
            result.sha256,
            quality.get("tiles"),
            quality.get("psnr_mean"),
            worst_psnr,
            quality.get("ssim_mean"),
            worst_ssim,
            json.dumps(dict(result.report)),
            time.time(),
        )

    def fail(
        self, identity: int, error: str, message: str, *, again: bool, lost: bool = False
    ) -> bool:
        """Write a failure down; the slide waits once more when ``again``.

        lost: the process died, and the output of its last moment may be there. False when the slide
        is no longer this run's.
        """
        return self._mine(
            identity,
            f"state = ?, error = ?, message = ?, finished = ?{'' if lost else ', vacant = NULL'}",
            WAITING if again else FAILED,
            _storable(error),
            _storable(message)[:MAX_MESSAGE],
            time.time(),
        )

    def _mine(self, identity: int, change: str, *values: Any) -> bool:
        with self._change() as database:
            return bool(
                database.execute(
                    f"UPDATE slides SET {change} WHERE id = ? AND run = ? AND state = 'running'",
                    (*values, identity, self._run),
                ).rowcount
            )

    def row(self, identity: int) -> Row:
        """One slide."""
        with _named(self._path):
            values = self._database.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM slides WHERE id = ?", (identity,)
            ).fetchone()
        return _row(values)

    def totals(self) -> Totals:
        """Over the slides of this run."""
        with _named(self._path):
            values = self._database.execute(
                "SELECT count(*), coalesce(sum(state = 'done'), 0), "
                "coalesce(sum(state = 'failed'), 0), "
                "coalesce(sum(CASE state WHEN 'done' THEN bytes_in END), 0), "
                "coalesce(sum(CASE state WHEN 'done' THEN bytes_out END), 0) "
                "FROM slides WHERE id IN (SELECT id FROM mine)"
            ).fetchone()
        return Totals(*values)

    def unsettled(self) -> int:
        """Slides of this run that wait or are being converted, by whomever."""
        with _named(self._path):
            found = self._database.execute(
                "SELECT count(*) FROM slides WHERE state IN ('waiting', 'running') "
                "AND id IN (SELECT id FROM mine)"
            )
            return int(found.fetchone()[0])

    def recover(self, retries: int | None = None) -> int:
        """Take back the slides of dead processes; how many. Call it now and then.

        retries: a slide that was tried more often than that fails instead of waiting again.
        """
        with _named(self._path):
            runs = self._database.execute(
                "SELECT id, host, pid, born, heartbeat FROM runs WHERE ended IS NULL AND id <> ?",
                (self._run or 0,),
            ).fetchall()
            orphans = self._database.execute(
                "SELECT slides.id, worker FROM slides LEFT JOIN runs ON runs.id = run "
                "WHERE state = 'running' AND (runs.id IS NULL OR ended IS NOT NULL)"
            ).fetchall()
        dead = [row[0] for row in runs if self._dead(*row)]
        if not dead and not orphans:
            return 0
        with self._change() as database:
            for run in dead:
                database.execute(
                    "UPDATE runs SET ended = ? WHERE id = ? AND ended IS NULL", (time.time(), run)
                )
            taken = 0
            for identity, worker in database.execute(
                "SELECT slides.id, worker FROM slides LEFT JOIN runs ON runs.id = run "
                "WHERE state = 'running' AND (runs.id IS NULL OR ended IS NOT NULL)"
            ).fetchall():
                owner = None if worker is None else Process.parse(worker)
                if owner is not None and owner.host == this_host() and not owner.gone():
                    continue  # it outlived its parent for a moment
                taken += database.execute(
                    "UPDATE slides SET state = CASE WHEN tries > ? THEN 'failed' ELSE 'waiting' "
                    "END, error = ?, message = ? WHERE id = ?",
                    (
                        2**31 if retries is None else retries,
                        LOST,
                        "the process that converted it ended without a word",
                        identity,
                    ),
                ).rowcount
        return taken

    def _dead(self, run: int, host: str, pid: int, born: str, heartbeat: float) -> bool:
        owner = Process(host, pid, born)
        if owner.host == this_host():
            return owner.gone()
        now = time.monotonic()
        seen, since = self._watched.setdefault(run, (heartbeat, now))
        if seen != heartbeat:
            self._watched[run] = (heartbeat, now)
            return False
        return now - since > LEASE

    def end(self) -> None:
        """End the run; slides that it has not finished wait for the next one."""
        run, self._run = self._run, None
        with self._change() as database:
            database.execute(
                "UPDATE slides SET state = 'waiting' WHERE run = ? AND state = 'running'", (run,)
            )
            database.execute("UPDATE runs SET ended = ? WHERE id = ?", (time.time(), run))


def tree_bytes(path: Path) -> int | None:
    """Bytes of a file, or of all files below a folder; None where nothing is."""
    try:
        if not path.is_dir():
            return path.stat().st_size
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except OSError:
        return None


def tree_mtime_ms(path: Path) -> int | None:
    """When a file was last changed, or any file below a folder; ms since 1970, None for nothing."""
    try:
        files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        return max((file.stat().st_mtime_ns // 1_000_000 for file in files), default=None)
    except OSError:
        return None


def printable(name: str) -> str:
    """A name as one harmless line: control characters and lone surrogates written as escapes."""
    safe = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in safe)


def _same_file(row: Row, slide: Listed) -> bool:
    if row.file_bytes != slide.file_bytes:
        return False
    if slide.sha256 is not None and row.file_sha256 is not None:
        return slide.sha256 == row.file_sha256
    return row.file_mtime_ms == slide.file_mtime_ms


def _untouched(row: Row, target: Path) -> bool:
    """True when the target is the output that the journal wrote down, not another file."""
    size, modified = tree_bytes(target), tree_mtime_ms(target)
    return size is not None and (size, modified) == (row.bytes_out, row.target_mtime_ms)


def _row(values: Iterable[Any], *, replace_ours: bool = False) -> Row:
    named = dict(zip(_COLUMNS, values, strict=True))
    named["source"], named["target"] = _text(named["source"]), _text(named["target"])
    return Row(**named, replace_ours=replace_ours)


def _text(value: Any) -> str:
    return os.fsdecode(value) if isinstance(value, bytes) else str(value)


def _bytes(name: str) -> bytes:
    return os.fsencode(name)


def _storable(text: str) -> str:
    """SQLite keeps UTF-8, which has no lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of SQLite as ours, with the journal's name and what to do."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        text = str(error)
        if "not a database" in text:
            raise FormatError(f"{path}: is no journal of convert-batch") from error
        if "malformed" in text or "no such" in text:
            raise FormatError(f"{path}: the journal is damaged ({text})") from error
        hint = ""
        if "locked" in text or "disk I/O" in text:
            hint = "; keep it on a file system that has file locks, with --journal"
        elif "readonly" in text or "unable to open" in text:
            hint = "; is the folder writable?"
        raise SlideError(f"{path}: the journal cannot be used: {text}{hint}") from error
