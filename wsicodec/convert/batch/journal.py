"""The journal of a batch: an SQLite file with a row for each slide and each process at work.

Every change is one transaction that takes the write lock first, so that several processes, on one
machine or several, share a journal and no slide is taken twice. A process that dies leaves its rows
``running``; the others take them back when it is known to be gone (same machine), or when its
heartbeat has stood still for LEASE seconds by their own clock (another machine).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from wsicodec.convert.batch.database import Database
from wsicodec.convert.batch.process import LEASE, Process, Watch, process, this_host
from wsicodec.convert.batch.rows import (
    COLUMNS,
    DONE,
    FAILED,
    LOST,
    RUNNING,
    WAITING,
    Listed,
    Result,
    Row,
    Totals,
    name_of,
    row_of,
    stored_name,
)
from wsicodec.convert.batch.trees import tree_bytes, tree_mtime_ms
from wsicodec.errors import SettingsError, SlideError
from wsicodec.printing import printable

MAX_MESSAGE = 2000
_ORPHANS = (
    "SELECT slides.id, worker FROM slides LEFT JOIN runs ON runs.id = run "
    "WHERE state = 'running' AND (runs.id IS NULL OR ended IS NOT NULL)"
)
"""Slides of runs that have ended."""


class Journal:
    """An open journal. Not thread-safe. Whatever SQLite refuses is raised as SlideError."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._path = database.path
        self._run: int | None = None
        self._watch = Watch()

    # -- opening --

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open, or begin, the journal at ``path``.

        Raises SlideError where it cannot be written, FormatError for a file that is no journal,
        UnsupportedError for one of a later version.
        """
        return cls(Database.open(path))

    @classmethod
    def read(cls, path: Path, *, copy: bool = False) -> Journal:
        """Open an existing journal to look at it, which changes nothing on the disk.

        copy: a copy in memory, which may be changed; empty where there is no journal. Raises as
        ``open``.
        """
        return cls(Database.copy(path) if copy else Database.read(path))

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

    # -- what is known already --

    def known(self) -> dict[str, tuple[str, int, int]]:
        """By source: its target, and the bytes and time in ms of its file when last listed."""
        found = self._database.query("SELECT source, target, file_bytes, file_mtime_ms FROM slides")
        return {name_of(row[0]): (name_of(row[1]), row[2], row[3]) for row in found}

    def rows(self, *, mine: bool = False) -> list[Row]:
        """All slides by name, or those of the present run."""
        where = "WHERE id IN (SELECT id FROM mine)" if mine else ""
        found = self._database.query(f"SELECT {COLUMNS} FROM slides {where} ORDER BY source")
        return [row_of(values) for values in found]

    def row(self, identity: int) -> Row:
        """One slide."""
        (values,) = self._database.query(f"SELECT {COLUMNS} FROM slides WHERE id = ?", (identity,))
        return row_of(values)

    def root(self) -> str | None:
        """The source folder that the journal was last used with."""
        found = self._database.query("SELECT value FROM meta WHERE name = 'root'")
        return name_of(found[0][0]) if found else None

    def totals(self) -> Totals:
        """Over the slides of this run."""
        (values,) = self._database.query(
            "SELECT count(*), coalesce(sum(state = 'done'), 0), "
            "coalesce(sum(state = 'failed'), 0), "
            "coalesce(sum(CASE state WHEN 'done' THEN bytes_in END), 0), "
            "coalesce(sum(CASE state WHEN 'done' THEN bytes_out END), 0) "
            "FROM slides WHERE id IN (SELECT id FROM mine)"
        )
        return Totals(*values)

    def unsettled(self) -> int:
        """Slides of this run that wait or are being converted, by whomever."""
        ((count,),) = self._database.query(
            "SELECT count(*) FROM slides WHERE state IN ('waiting', 'running') "
            "AND id IN (SELECT id FROM mine)"
        )
        return int(count)

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
        # ten thousand outputs on a server take their time to look at: not while others wait
        sizes = {
            row.id: tree_bytes(output / row.target) for row in self.rows() if row.state == DONE
        }
        with self._database.change() as database:
            self._refuse_other_settings(settings, now)
            moved = self.root() not in (None, root)
            stale = []
            database.execute("DELETE FROM mine")
            taken = {source: target for source, (target, _, _) in self.known().items()}
            targets = name_targets([slide.source for slide in listed], taken)
            for slide in listed:
                values = database.execute(
                    f"SELECT {COLUMNS} FROM slides WHERE source = ?", (stored_name(slide.source),)
                ).fetchone()
                if values is None:
                    row = self._insert(slide, targets[slide.source], now)
                else:
                    found = row_of(values)
                    same = _same_file(found, slide)
                    if moved and not same:
                        raise SettingsError(
                            f"{self._path}: knows another {_shown(slide.source)}, below "
                            f"{_shown(self.root() or '')}; use another output folder"
                        )
                    row = found.id
                    if found.state == DONE and found.settings != settings and not overwrite:
                        stale.append(slide.source)
                    if found.state == DONE and row not in sizes:  # since we looked
                        sizes[row] = tree_bytes(output / found.target)
                    self._relist(found, slide, settings, same=same, size=sizes.get(row))
                database.execute("INSERT INTO mine VALUES (?)", (row,))
            if stale:
                raise SettingsError(
                    f"{self._path}: {len(stale)} slides are done with other settings, "
                    f"{_shown(stale[0])} among them; --overwrite converts them again, or use "
                    "another output folder"
                )
            database.execute(
                "INSERT INTO meta VALUES ('root', ?) "
                "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                (stored_name(root),),
            )
            self._run = database.execute(
                "INSERT INTO runs (host, pid, born, settings, settings_json, wsicodec, started, "
                "heartbeat) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (me.host, me.pid, me.born, settings, settings_json, wsicodec, now, now),
            ).lastrowid

    def _refuse_other_settings(self, settings: str, now: float) -> None:
        # the one place that believes another machine's clock: there is no time to watch it. Runs of
        # this machine that are dead have just been ended
        others = self._database.query(
            "SELECT host, pid FROM runs WHERE ended IS NULL AND settings <> ? "
            "AND (host = ? OR heartbeat > ?)",
            (settings, this_host(), now - LEASE),
        )
        if others:
            host, pid = others[0]
            raise SettingsError(
                f"{self._path}: process {pid} on {host.partition(' ')[0]} converts into this "
                "journal with other settings; wait for its end, or use another output"
            )

    def _insert(self, slide: Listed, target: str, now: float) -> int:
        identity = self._database.connection.execute(
            "INSERT INTO slides (source, target, state, file_bytes, file_mtime_ms, file_sha256, "
            "listed) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                stored_name(slide.source),
                stored_name(target),
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
        self, found: Row, slide: Listed, settings: str, *, same: bool, size: int | None
    ) -> None:
        """Let a known slide wait, unless it is under way or done. size: bytes of its output."""
        if found.state == RUNNING:
            return
        done = found.state == DONE and same and found.settings == settings
        if done and size is not None and size == found.bytes_out:
            return
        self._database.connection.execute(
            "UPDATE slides SET state = ?, tries = 0, file_bytes = ?, file_mtime_ms = ?, "
            "file_sha256 = ? WHERE id = ?",
            (WAITING, slide.file_bytes, slide.file_mtime_ms, slide.sha256, found.id),
        )

    def beat(self) -> None:
        """Give a sign of life. Raises SlideError when the others have given this run up."""
        with self._database.change() as database:
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
        with self._database.change() as database:
            values = database.execute(
                f"SELECT {COLUMNS}, vacant FROM slides WHERE state = ? "
                "AND id IN (SELECT id FROM mine) ORDER BY tries, id LIMIT 1",
                (WAITING,),
            ).fetchone()
            if values is None:
                return None
            *values, cut_off = values
            row = row_of(values)
            there = os.path.lexists(output / row.target)
            ours = there and (cut_off or _untouched(row, output / row.target))
            database.execute(
                "UPDATE slides SET state = ?, attempts = attempts + 1, tries = tries + 1, run = ?, "
                "worker = NULL, vacant = ?, settings = ?, wsicodec = ?, started = ?, "
                "finished = NULL WHERE id = ?",
                (
                    RUNNING,
                    self._run,
                    int(bool(cut_off or ours or not there)),
                    settings,
                    wsicodec,
                    time.time(),
                    row.id,
                ),
            )
        return row_of(
            (*values[:3], RUNNING, row.attempts + 1, row.tries + 1, *values[6:]),
            replace_ours=bool(ours),
        )

    def assign(self, identity: int, worker: str) -> None:
        """Note who converts a claimed slide."""
        self._mine(identity, "worker = ?", _storable(worker))

    def restarted(self, identity: int, worker: str) -> int:
        """Note that a claimed slide began again elsewhere; how often this run has tried it."""
        self._mine(
            identity, "attempts = attempts + 1, tries = tries + 1, worker = ?", _storable(worker)
        )
        ((tries,),) = self._database.query("SELECT tries FROM slides WHERE id = ?", (identity,))
        return int(tries)

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
        with self._database.change() as database:
            return bool(
                database.execute(
                    f"UPDATE slides SET {change} WHERE id = ? AND run = ? AND state = 'running'",
                    (*values, identity, self._run),
                ).rowcount
            )

    def recover(self, retries: int | None = None) -> int:
        """Take back the slides of dead processes; how many. Call it now and then.

        retries: a slide that was tried more often than that fails instead of waiting again.
        """
        runs = self._database.query(
            "SELECT id, host, pid, born, heartbeat FROM runs WHERE ended IS NULL AND id <> ?",
            (self._run or 0,),
        )
        dead = [
            run
            for run, host, pid, born, heartbeat in runs
            if self._watch.dead(run, Process(host, pid, born), heartbeat)
        ]
        if not dead and not self._database.query(_ORPHANS):
            return 0
        with self._database.change() as database:
            for run in dead:
                database.execute(
                    "UPDATE runs SET ended = ? WHERE id = ? AND ended IS NULL", (time.time(), run)
                )
            taken = 0
            for identity, worker in database.execute(_ORPHANS).fetchall():
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

    def end(self) -> None:
        """End the run; slides that it has not finished wait for the next one."""
        run, self._run = self._run, None
        with self._database.change() as database:
            database.execute(
                "UPDATE slides SET state = 'waiting' WHERE run = ? AND state = 'running'", (run,)
            )
            database.execute("UPDATE runs SET ended = ? WHERE id = ?", (time.time(), run))


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


def _storable(text: str) -> str:
    """SQLite keeps UTF-8, which has no lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _shown(name: str) -> str:
    return printable(name, None, escape=True)
