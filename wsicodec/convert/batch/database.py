"""The SQLite file of a journal: its tables, its version, and transactions on it.

The file is kept in SQLite's rollback mode, never WAL: WAL shares memory between its users and so
breaks on network file systems, it is a property of the file that whoever opens it elsewhere
inherits, and a few writes a minute gain nothing from it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wsicodec.errors import FormatError, SlideError, UnsupportedError

VERSION = 1
"""Of the tables. A journal of a later version is refused; an earlier one would be converted."""
APPLICATION = 0x57534A4C  # "WSJL", kept in the file's header
LOCK_SECONDS = 60.0
"""How long another process may hold the write lock before that is an error."""

_SCHEMA = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
    """
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
)
""",
    """
CREATE TABLE slides (
    id INTEGER PRIMARY KEY,
    source BLOB NOT NULL UNIQUE,  -- path below the source folder, bytes as the system has them
    target BLOB NOT NULL UNIQUE,  -- path below the output folder
    state TEXT NOT NULL CHECK (state IN ('waiting', 'running', 'done', 'failed')),
    attempts INTEGER NOT NULL DEFAULT 0,  -- conversions begun, ever
    tries INTEGER NOT NULL DEFAULT 0,     -- of them in the run that last listed the slide
    run INTEGER REFERENCES runs,
    worker TEXT,                  -- who converts or converted it
    vacant INTEGER,               -- 1: nothing of others was under the target's name before it
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
)
""",
    "CREATE INDEX slides_by_state ON slides (state, tries, id)",
)


class Database:
    """A connection to a journal's file. Not thread-safe.

    Whatever SQLite refuses is raised as SlideError, a damaged file as FormatError.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.connection = connection
        self.path = path

    @classmethod
    def open(cls, path: Path) -> Database:
        """Open, or begin, the file at ``path``, with an empty table ``mine`` of its own.

        Raises SlideError where it cannot be written, FormatError for a file that is no journal,
        UnsupportedError for one of a later version.
        """
        # connect() makes an empty file of any name; tell what is wrong before that
        if not path.parent.is_dir():
            raise SlideError(f"{path}: folder {path.parent} does not exist")
        with _named(path):
            # absolute: SQLite takes ":memory:" for no file
            connection = sqlite3.connect(
                path.absolute(), timeout=LOCK_SECONDS, isolation_level=None
            )
        return cls(connection, path)._checked(write=True)

    @classmethod
    def read(cls, path: Path) -> Database:
        """Open an existing file to look at it, which changes nothing in it. Raises as ``open``."""
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
        return cls(connection, path)._checked(write=False)

    @classmethod
    def copy(cls, path: Path) -> Database:
        """A copy in memory, which may be changed; empty without a file. Raises as ``open``."""
        copied = cls(sqlite3.connect(":memory:", isolation_level=None), path)
        try:
            if path.exists():
                original = cls.read(path)
                try:
                    with _named(path):
                        original.connection.backup(copied.connection)
                finally:
                    original.close()
        except BaseException:
            copied.close()
            raise
        return copied._checked(write=True)

    def close(self) -> None:
        """Close the file."""
        self.connection.close()

    def query(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """All rows that a statement finds."""
        with _named(self.path):
            return self.connection.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the write lock from its start; undone where anything fails."""
        with _named(self.path):
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self.connection.execute("ROLLBACK")
                raise

    def _checked(self, *, write: bool) -> Database:
        try:
            if write:
                self._prepare()
            self._check()
            if write:
                with _named(self.path):
                    self.connection.execute("PRAGMA journal_mode = DELETE")
                    self.connection.execute("PRAGMA synchronous = FULL")
                    self.connection.execute("PRAGMA temp_store = MEMORY")
                    self.connection.execute("CREATE TEMP TABLE mine (id INTEGER PRIMARY KEY)")
        except BaseException:
            self.close()
            raise
        return self

    def _prepare(self) -> None:
        """Make the tables in an empty file, in one transaction with what says that they are."""
        with self.change() as database:
            tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            application = database.execute("PRAGMA application_id").fetchone()[0]
            if not tables and not application:
                for statement in _SCHEMA:
                    database.execute(statement)
                database.execute(f"PRAGMA application_id = {APPLICATION}")
                database.execute(f"PRAGMA user_version = {VERSION}")

    def _check(self) -> None:
        ((application,),) = self.query("PRAGMA application_id")
        ((version,),) = self.query("PRAGMA user_version")
        if application != APPLICATION:
            raise FormatError(f"{self.path}: is no journal of convert-batch")
        if version != VERSION:
            raise UnsupportedError(
                f"{self.path}: the journal has version {version}, this wsicodec knows {VERSION}; "
                "use the wsicodec that wrote it, or another --journal"
            )


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
        elif "full" in text:
            hint = "; make room, or keep it elsewhere with --journal"
        elif "readonly" in text or "unable to open" in text:
            hint = "; is the folder writable?"
        raise SlideError(f"{path}: the journal cannot be used: {text}{hint}") from error
