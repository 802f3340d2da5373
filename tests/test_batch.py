"""Many slides: what is found, what the journal keeps, and that each is done once."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from slides import ROOT, data_slide, tissue, write_svs

from wsicodec.cli import main
from wsicodec.convert import ConvertSettings
from wsicodec.convert.batch import (
    JOURNAL_NAME,
    BatchProgress,
    BatchReport,
    BatchSettings,
    convert_batch,
    preview,
    summary,
)
from wsicodec.convert.batch import database as databases
from wsicodec.convert.batch import journal as journals
from wsicodec.convert.batch import process as processes
from wsicodec.convert.batch import run as runs
from wsicodec.convert.batch.finding import find_slides
from wsicodec.convert.batch.jobs import (
    Failed,
    Job,
    Started,
    Succeeded,
    remove_partial,
    remove_traces,
    run_job,
)
from wsicodec.convert.batch.journal import Journal
from wsicodec.convert.batch.naming import MAX_NAME_BYTES, name_targets
from wsicodec.convert.batch.process import Process
from wsicodec.convert.batch.rows import DONE, FAILED, LOST, RUNNING, WAITING, Listed, Result
from wsicodec.convert.batch.settings import packed
from wsicodec.convert.work import work_folder
from wsicodec.errors import (
    FormatError,
    RuntimeMissingError,
    SettingsError,
    SlideError,
    UnsupportedError,
    WsicodecError,
)
from wsicodec.slide.opening import open_slide
from wsicodec.slide.placing import refused

JPEG = ConvertSettings(codec="jpeg", measure="none", in_process=True)
QUICK = BatchSettings(convert=JPEG, retries=0)
STRANGE = [
    "new\nline.svs",
    "x'); DROP TABLE slides;--.svs",
    '"quoted" % _ [a-z] ?.svs',
    "größe-東京.svs",
    os.fsdecode(b"latin-\xe4\xff.svs"),
    "\x1b[31mred.svs",
    " leading and trailing .svs",
]


@pytest.fixture(scope="module")
def svs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_svs(tmp_path_factory.mktemp("svs") / "a.svs", tissue(120, 150), levels=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def fill(folder: Path, slide: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(slide, folder / name)


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def by_source(report: BatchReport) -> dict[str, Any]:
    return {row.source: row for row in report.rows}


# -- finding and naming --


class TestFind:
    def test_by_promise_and_by_content(self, folder: Path, svs: Path) -> None:
        fill(
            folder, svs, "b.svs", "deep/er/A.TIF", "deep/no-suffix", "deep/photo.jpg", ".hidden.svs"
        )
        (folder / "empty.ndpi").write_bytes(b"")
        (folder / "notes.txt").write_text("II*\0 is no slide")
        sqlite3.connect(folder / "notes.db").execute("CREATE TABLE x (y)").connection.close()
        (folder / ".cache").mkdir()
        fill(folder, svs, ".cache/c.svs")
        (folder / "loop").symlink_to(folder)
        (folder / "link.svs").symlink_to(folder / "b.svs")
        (folder / "dangling.svs").symlink_to(folder / "nowhere")
        (folder / "nowhere at all.svs").symlink_to("x" * 300)  # no system takes such a name
        found = find_slides(folder)
        assert [slide.source for slide in found.slides] == [
            "b.svs",
            "empty.ndpi",
            "link.svs",
            "deep/no-suffix",
            "deep/photo.jpg",
            "deep/er/A.TIF",
        ]
        assert found.slides[0].file_bytes == svs.stat().st_size
        assert not found.unreadable

    def test_patterns(self, folder: Path, svs: Path) -> None:
        fill(folder, svs, "a.svs", "b.tif", "x/C.SVS", "x/d.ndpi")

        def names(*patterns: str) -> list[str]:
            return [slide.source for slide in find_slides(folder, patterns).slides]

        assert names("*.svs") == ["a.svs", "x/C.SVS"]
        assert names("x/*") == ["x/C.SVS", "x/d.ndpi"]
        assert names("*.tif", "*.ndpi") == ["b.tif", "x/d.ndpi"]

    def test_what_is_known_is_not_opened(self, folder: Path) -> None:
        (folder / "thing").write_bytes(b"no slide at all")
        assert not find_slides(folder).slides
        status = (folder / "thing").stat()
        known = {"thing": (status.st_size, status.st_mtime_ns // 1_000_000)}
        assert [slide.source for slide in find_slides(folder, known=known).slides] == ["thing"]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
    def test_folders_that_cannot_be_read_are_named(self, folder: Path) -> None:
        (folder / "closed").mkdir(mode=0)
        assert "closed" in find_slides(folder).unreadable[0]

    def test_a_dicom_series_is_one_slide(self, folder: Path) -> None:
        """Each of its files opens as the whole of it."""
        pytest.importorskip("openslide")
        slide = data_slide("highdicom-sm-image.dcm")
        fill(folder, slide, "a/1.dcm", "a/2", "b/1.dcm")
        fill(folder, data_slide("highdicom-sm-image-jpegls.dcm"), "c/unsupported")
        found = [slide.source for slide in find_slides(folder).slides]
        assert found == ["a/1.dcm", "b/1.dcm", "c/unsupported"]

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(SlideError, match="no folder"):
            find_slides(tmp_path / "missing")


class TestNames:
    def test_collisions(self) -> None:
        sources = ["a.svs", "a.ndpi", "b.svs", "x/a.svs", "c.svs", "C.svs", "c.ome.tiff", "d"]
        assert name_targets(sources, {}, ".ome.tiff") == {
            "a.svs": "a.svs.ome.tiff",
            "a.ndpi": "a.ndpi.ome.tiff",
            "b.svs": "b.ome.tiff",
            "x/a.svs": "x/a.ome.tiff",
            "c.svs": "c.svs.85ff21a1ad68.ome.tiff",
            "C.svs": "C.svs.0afc6ee5cc4e.ome.tiff",
            "c.ome.tiff": "c.ome.tiff.ome.tiff",
            "d": "d.ome.tiff",
        }

    def test_names_once_given_stay(self) -> None:
        first = name_targets(["a.svs"], {}, ".ome.tiff")
        assert first == {"a.svs": "a.ome.tiff"}
        both = name_targets(["a.ndpi", "a.svs"], first, ".ome.tiff")
        assert both == {"a.svs": "a.ome.tiff", "a.ndpi": "a.ndpi.ome.tiff"}

    def test_long_names_fit(self) -> None:
        sources = ["ö" * 125 + end for end in ("a.svs", "b.svs")]
        targets = name_targets(sources, {}, ".ome.tiff")
        assert len(set(targets.values())) == 2
        assert all(len(os.fsencode(name)) <= MAX_NAME_BYTES for name in targets.values())

    def test_no_output_is_called_as_a_folder_of_others(self) -> None:
        """An OME-Zarr that is replaced would take what lies in the folder of its name along."""
        sources = ["a.svs", "A.ome.zarr/b.svs", "c.svs", "c.ome.zarr/d/e.svs"]
        assert name_targets(sources, {}, ".ome.zarr") == {
            "a.svs": "a.svs.ome.zarr",
            "A.ome.zarr/b.svs": "A.ome.zarr/b.ome.zarr",
            "c.svs": "c.svs.ome.zarr",
            "c.ome.zarr/d/e.svs": "c.ome.zarr/d/e.ome.zarr",
        }

    @given(
        st.lists(
            st.text("aA.ß/ñ\u0303", min_size=1, max_size=6).map(lambda s: s.strip("/") or "x"),
            unique=True,
            max_size=8,
        ),
        st.integers(0, 8),
        st.randoms(),
    )
    def test_distinct_whatever_the_order(self, sources: list[str], split: int, random: Any) -> None:
        sources = [source + ".svs" for source in sources]
        first = name_targets(sources[:split], {}, ".tiff")
        both = name_targets(sources, first, ".tiff")
        assert {source: both[source] for source in first} == first
        assert len({name.casefold() for name in both.values()}) == len(sources)
        assert all(name.endswith(".tiff") for name in both.values())
        shuffled = list(sources)
        random.shuffle(shuffled)
        assert name_targets(shuffled, first, ".tiff") == both


# -- the journal --


def listed(*names: str) -> list[Listed]:
    return [Listed(name, 1000, 5) for name in names]


def begin(journal: Journal, output: Path, names: list[Listed], **changes: Any) -> None:
    settings = changes.pop("settings", "one")
    journal.begin(
        changes.pop("root", "/slides"),
        names,
        settings,
        "{}",
        "0.0",
        output=output,
        name_targets=lambda sources, taken: name_targets(sources, taken, ".tiff"),
        **changes,
    )


def done(journal: Journal, output: Path, size: int = 10) -> str | None:
    """Convert the next slide, in a manner of speaking."""
    row = journal.claim("one", "0.0", output)
    if row is None:
        return None
    (output / row.target).parent.mkdir(parents=True, exist_ok=True)
    (output / row.target).write_bytes(bytes(size))
    modified = (output / row.target).stat().st_mtime_ns // 1_000_000
    assert journal.finish(row.id, Result(1000, size, modified, 1.5))
    return row.source


def test_life_of_a_row(tmp_path: Path) -> None:
    report = {
        "quality": {
            "tiles": 7,
            "psnr_mean": 40.0,
            "psnr_worst": {"psnr": 30.0},
            "ssim_mean": 0.97,
            "ssim_worst": {"ssim": 0.9},
        }
    }
    with Journal.open(tmp_path / "j") as journal:
        begin(journal, tmp_path, listed("a.svs", "b.svs"))
        row = journal.claim("one", "0.0", tmp_path)
        assert row is not None
        assert (row.source, row.target, row.attempts, row.tries) == ("a.svs", "a.tiff", 1, 1)
        journal.assign(row.id, "someone")
        assert journal.fail(row.id, "SlideError", "why\udcff", again=True)
        assert not journal.fail(row.id, "SlideError", "again", again=True)
        other = journal.claim("one", "0.0", tmp_path)
        assert other is not None
        assert other.source == "b.svs"  # those tried less come first
        again = journal.claim("one", "0.0", tmp_path)
        assert again is not None
        assert (again.source, again.attempts) == ("a.svs", 2)
        assert journal.finish(again.id, Result(1000, 250, 5, 2.5, 0.25, 0.26, "ab", report))
        assert journal.claim("one", "0.0", tmp_path) is None
        assert journal.unsettled() == 1
        assert journal.fail(other.id, "MemoryError", "m" * 9999, again=False)
        assert journal.unsettled() == 0
        a, b = journal.rows()
        totals = journal.totals()
    assert (a.state, a.ratio, a.mpp_x, a.mpp_y, a.seconds) == (DONE, 0.25, 0.25, 0.26, 2.5)
    assert (a.tiles_measured, a.psnr_mean, a.psnr_worst) == (7, 40, 30)
    assert (a.ssim_mean, a.ssim_worst, a.error, a.message) == (0.97, 0.9, None, None)
    assert (b.state, b.error, len(b.message or "")) == (FAILED, "MemoryError", 2000)
    assert (totals.slides, totals.done, totals.failed) == (2, 1, 1)
    assert (totals.bytes_in, totals.bytes_out) == (1000, 250)
    json.dumps([a.as_dict(), b.as_dict()], allow_nan=False)


def test_what_a_second_run_does_again(tmp_path: Path) -> None:
    names = ["kept", "changed", "touched", "gone", "grown", "foreign"]
    before = listed(*names)
    with Journal.open(tmp_path / "j") as journal:
        begin(journal, tmp_path, before)
        for _ in names:
            done(journal, tmp_path)
    (tmp_path / "gone.tiff").unlink()
    (tmp_path / "grown.tiff").write_bytes(bytes(11))
    now = [
        dataclasses.replace(
            slide,
            file_bytes=999 if slide.source == "changed" else 1000,
            file_mtime_ms=6 if slide.source == "touched" else 5,
        )
        for slide in before
    ]
    with Journal.open(tmp_path / "j") as journal:
        begin(journal, tmp_path, now)
        waiting = {row.source for row in journal.rows() if row.state == WAITING}
        assert waiting == {"changed", "touched", "gone", "grown"}
        replace = {}
        while row := journal.claim("one", "0.0", tmp_path):
            replace[row.source] = row.replace_ours
        # a file that is not as it was written is somebody else's
        assert replace == {"changed": True, "touched": True, "gone": False, "grown": False}


def test_cut_off_while_an_output_was_replaced(tmp_path: Path) -> None:
    """Killed after the new output had its name, before the journal heard of it."""
    with Journal.open(tmp_path / "j") as journal:
        begin(journal, tmp_path, listed("a"))
        done(journal, tmp_path)
    with Journal.open(tmp_path / "j") as journal:
        begin(journal, tmp_path, [Listed("a", 1000, 6)])
        row = journal.claim("one", "0.0", tmp_path)
        assert row is not None
        assert row.replace_ours
        (tmp_path / "a.tiff").write_bytes(bytes(12))
    with Journal.open(tmp_path / "j") as journal:
        begin(journal, tmp_path, [Listed("a", 1000, 6)])
        row = journal.claim("one", "0.0", tmp_path)
        assert row is not None
        assert row.replace_ours


def test_looking_at_outputs_locks_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten thousand of them on a slow server take longer than others wait for the lock."""
    looked: list[Path] = []

    def slow(path: Path) -> int:
        with contextlib.closing(sqlite3.connect(tmp_path / "j", timeout=0)) as other:
            other.execute("BEGIN IMMEDIATE")
        looked.append(path)
        return path.stat().st_size

    with Journal.open(tmp_path / "j") as journal:
        begin(journal, tmp_path, listed("a", "b"))
        done(journal, tmp_path)
        done(journal, tmp_path)
    monkeypatch.setattr(journals, "tree_bytes", slow)
    with Journal.open(tmp_path / "j") as journal:
        begin(journal, tmp_path, listed("a", "b"))
        assert [row.state for row in journal.rows()] == [DONE, DONE]
    assert len(looked) == 2


def test_digest_decides_where_it_is_known(tmp_path: Path) -> None:
    def slide(modified: int, digest: str) -> list[Listed]:
        return [Listed("a", 1000, modified, digest)]

    for step, (modified, digest, state) in enumerate(
        [(5, "aa", WAITING), (6, "aa", DONE), (6, "bb", WAITING)]
    ):
        with Journal.open(tmp_path / "j") as journal:
            begin(journal, tmp_path, slide(modified, digest))
            assert [row.state for row in journal.rows()] == [state], step
            if state == WAITING:
                done(journal, tmp_path)


def test_other_settings_are_refused_unless_asked_for(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "j") as journal:
        begin(journal, tmp_path, listed("a"))
        done(journal, tmp_path)
    with Journal.open(tmp_path / "j") as journal:
        with pytest.raises(SettingsError, match="1 slides are done with other settings"):
            begin(journal, tmp_path, listed("a", "b"), settings="two")
        assert len(journal.rows()) == 1
        begin(journal, tmp_path, listed("a", "b"), settings="two", overwrite=True)
        assert [row.state for row in journal.rows()] == [WAITING, WAITING]
        with Journal.open(tmp_path / "j") as other:
            with pytest.raises(SettingsError, match="other settings; wait"):
                begin(other, tmp_path, listed("c"))
            begin(other, tmp_path, listed("b", "c"), settings="two")


def test_another_folder(tmp_path: Path) -> None:
    """The same files under another path are known; others of the same name are refused."""
    with Journal.open(tmp_path / "j") as journal:
        begin(journal, tmp_path, listed("a", "b"))
        done(journal, tmp_path)
    with Journal.open(tmp_path / "j") as journal:
        begin(journal, tmp_path, listed("a"), root="/mnt/slides")
        assert [row.state for row in journal.rows(mine=True)] == [DONE]
    with Journal.open(tmp_path / "j") as journal:
        with pytest.raises(SettingsError, match="another a, below /mnt/slides"):
            begin(journal, tmp_path, [Listed("a", 1, 5)], root="/elsewhere")
        begin(journal, tmp_path, listed("c"), root="/elsewhere")
        assert len(journal.rows()) == 3
        assert [row.source for row in journal.rows(mine=True)] == ["c"]


class TestDeadProcesses:
    def _leave_running(self, path: Path, **owner: Any) -> None:
        """A journal as a process leaves it that ended without a word."""
        journal = Journal.open(path)
        begin(journal, path.parent, listed("a"))
        assert journal.claim("one", "0.0", path.parent) is not None
        journal._database.close()
        with sqlite3.connect(path) as database:
            for column, value in owner.items():
                database.execute(f"UPDATE runs SET {column} = ?", (value,))

    def test_on_this_machine(self, tmp_path: Path) -> None:
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        self._leave_running(tmp_path / "j", pid=process.pid)
        with Journal.open(tmp_path / "j") as journal:
            begin(journal, tmp_path, listed("a"))
            row = journal.claim("one", "0.0", tmp_path)
            assert row is not None
            assert (row.attempts, row.error) == (2, LOST)

    def test_a_pid_used_again(self, tmp_path: Path) -> None:
        if not processes.process().born:
            pytest.skip("this system does not tell when a process started")
        self._leave_running(tmp_path / "j", born="1")
        with Journal.open(tmp_path / "j") as journal:
            assert journal.recover() == 1

    def test_the_living_keep_theirs(self, tmp_path: Path) -> None:
        self._leave_running(tmp_path / "j")
        with Journal.open(tmp_path / "j") as journal:
            assert journal.recover() == 0
            begin(journal, tmp_path, listed("a"))
            assert journal.claim("one", "0.0", tmp_path) is None

    def test_worker_that_outlives_its_batch(self, tmp_path: Path) -> None:
        with Journal.open(tmp_path / "j") as journal:
            begin(journal, tmp_path, listed("a"))
            row = journal.claim("one", "0.0", tmp_path)
            assert row is not None
            worker = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
            journal.assign(row.id, str(processes.process(worker.pid)))
            journal._database.connection.execute("UPDATE runs SET ended = 1")
            with Journal.open(tmp_path / "j") as other:
                assert other.recover() == 0
                worker.communicate(b"\n")
                assert other.recover() == 1
            # what the first run still has to say of it no longer counts
            assert not journal.finish(row.id, Result(1, 1, 1, 1.0))
            with pytest.raises(SlideError, match="took its slides over"):
                journal.beat()

    def test_on_another_machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its heartbeat has to stand still for a while; what its clock says does not matter."""
        monkeypatch.setattr(processes, "LEASE", 0.3)
        self._leave_running(tmp_path / "j", host="elsewhere", heartbeat=0.0)
        with Journal.open(tmp_path / "j") as journal:
            for beat in range(4):
                with sqlite3.connect(tmp_path / "j") as database:
                    database.execute("UPDATE runs SET heartbeat = ?", (beat,))
                assert journal.recover() == 0
                time.sleep(0.15)
            time.sleep(0.4)
            assert journal.recover() == 1

    def test_tried_too_often(self, tmp_path: Path) -> None:
        self._leave_running(tmp_path / "j", pid=2**22 + 1)
        with Journal.open(tmp_path / "j") as journal:
            assert journal.recover(retries=0) == 1
            (row,) = journal.rows()
            assert (row.state, row.error) == (FAILED, LOST)

    def test_hostile_numbers(self, tmp_path: Path) -> None:
        for pid in (2**62, -1, 0):
            assert not Process(processes.this_host(), pid, "1").gone()
        assert Process.parse("[" * 100_000) is None

    def test_a_silent_process_of_this_machine_lives(self, tmp_path: Path) -> None:
        """Stopped with Ctrl-Z, or on a machine that slept: it goes on, with its own settings."""
        self._leave_running(tmp_path / "j", heartbeat=1.0)
        with Journal.open(tmp_path / "j") as journal:
            with pytest.raises(SettingsError, match="other settings; wait"):
                begin(journal, tmp_path, listed("a"), settings="two")
            begin(journal, tmp_path, listed("a"))

    @given(st.text())
    def test_hostile_worker_names(self, text: str) -> None:
        assert Process.parse(text) is None or isinstance(Process.parse(text), Process)

    def test_processes_are_told_apart(self) -> None:
        me = processes.process()
        assert Process.parse(str(me)) == me
        assert not me.gone()
        assert Process(me.host, me.pid, "0").gone() == bool(me.born)
        assert not Process("elsewhere", me.pid, "0").gone()


def _claim_all(path: Path, output: Path, names: list[Listed], answer: Any) -> None:
    with Journal.open(path) as journal:
        begin(journal, output, names)
        got = []
        while source := done(journal, output):
            got.append(source)
        answer.put(got)


def test_processes_at_once_share_the_slides(tmp_path: Path) -> None:
    """Registering and claiming at the same moment, as fast as they can."""
    names = listed(*(f"{n}.svs" for n in range(40)))
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    processes = [
        context.Process(target=_claim_all, args=(tmp_path / "j", tmp_path, names, answer))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    claimed = [answer.get() for _ in processes]
    for process in processes:
        process.join()
    found = sorted(source for sources in claimed for source in sources)
    assert found == sorted(slide.source for slide in names)
    with Journal.read(tmp_path / "j") as journal:
        assert {row.attempts for row in journal.rows()} == {1}


class TestJournalFile:
    def test_mode_is_safe_on_network_file_systems(self, tmp_path: Path) -> None:
        path = tmp_path / "j"
        with sqlite3.connect(path) as database:
            assert database.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
        database.close()
        with Journal.open(path) as journal:
            begin(journal, tmp_path, listed("a"))
            assert journal._database.query("PRAGMA journal_mode") == [("delete",)]
            assert journal._database.query("PRAGMA synchronous") == [(2,)]
            assert files(tmp_path) == ["j"]

    def test_of_a_later_version(self, tmp_path: Path) -> None:
        Journal.open(tmp_path / "j").close()
        with sqlite3.connect(tmp_path / "j") as database:
            database.execute(f"PRAGMA user_version = {databases.VERSION + 1}")
        before = (tmp_path / "j").read_bytes()
        for way in (Journal.open, Journal.read):
            with pytest.raises(UnsupportedError, match="journal has version 2"):
                way(tmp_path / "j")
        assert (tmp_path / "j").read_bytes() == before

    @pytest.mark.parametrize("content", [b"text that is no database" * 99, b"SQLite format 3\0xx"])
    def test_no_journal(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "j").write_bytes(content)
        for way in (Journal.open, Journal.read):
            with pytest.raises(FormatError, match="j: is no journal"):
                way(tmp_path / "j")
        assert (tmp_path / "j").read_bytes() == content

    def test_another_database(self, tmp_path: Path) -> None:
        with sqlite3.connect(tmp_path / "j") as database:
            database.execute("CREATE TABLE theirs (x)")
        database.close()
        before = (tmp_path / "j").read_bytes()
        with pytest.raises(FormatError, match="no journal"):
            Journal.open(tmp_path / "j")
        assert (tmp_path / "j").read_bytes() == before

    def test_damaged(self, tmp_path: Path) -> None:
        with Journal.open(tmp_path / "j") as journal:
            begin(journal, tmp_path, listed(*map(str, range(200))))
        content = bytearray((tmp_path / "j").read_bytes())
        content[4096:] = b"\x5a" * (len(content) - 4096)
        (tmp_path / "j").write_bytes(content)
        with pytest.raises(FormatError, match="damaged"), Journal.read(tmp_path / "j") as journal:
            journal.rows()

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(SlideError, match="no journal"):
            Journal.read(tmp_path / "j")
        with pytest.raises(SlideError, match="does not exist"):
            Journal.open(tmp_path / "no" / "j")
        assert not files(tmp_path)

    def test_locked_for_too_long(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(databases, "LOCK_SECONDS", 0.1)
        with Journal.open(tmp_path / "j") as journal:
            other = sqlite3.connect(tmp_path / "j", isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(SlideError, match=r"locked.*--journal"):
                begin(journal, tmp_path, listed("a"))
            other.execute("ROLLBACK")
            other.close()
            begin(journal, tmp_path, listed("a"))

    def test_commit_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is undone, and closing does not hide why."""
        monkeypatch.setattr(databases, "LOCK_SECONDS", 0.1)
        journal = Journal.open(tmp_path / "j")
        begin(journal, tmp_path, listed("a"))
        reader = sqlite3.connect(tmp_path / "j", isolation_level=None)
        reader.execute("BEGIN").execute("SELECT * FROM slides").fetchone()
        with pytest.raises(SlideError, match=r"locked.*--journal"):
            journal.claim("one", "0.0", tmp_path)
        reader.execute("ROLLBACK")
        assert [row.state for row in journal.rows()] == [WAITING]
        journal.close()
        with Journal.read(tmp_path / "j") as found:
            assert found._database.query("SELECT count(*) FROM runs WHERE ended IS NULL") == [(0,)]
        reader.close()

    def test_full_disk(self, tmp_path: Path) -> None:
        """As SQLite meets it: what was written before stays whole."""
        with Journal.open(tmp_path / "j") as journal:
            begin(journal, tmp_path, listed("a"))
            ((pages,),) = journal._database.query("PRAGMA page_count")
            journal._database.query(f"PRAGMA max_page_count = {pages}")
            with pytest.raises(SlideError, match="full; make room"):
                begin(journal, tmp_path, listed(*(f"{n:0100}" for n in range(99))))
            assert [row.source for row in journal.rows()] == ["a"]
            assert done(journal, tmp_path) == "a"
        with Journal.read(tmp_path / "j") as journal:
            assert [row.state for row in journal.rows()] == [DONE]

    def test_name_that_sqlite_takes_for_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with Journal.open(Path(":memory:")) as journal:
            begin(journal, tmp_path, listed("a"))
        assert files(tmp_path) == [":memory:"]


# -- one job --


def test_a_job_never_raises(tmp_path: Path, svs: Path) -> None:
    def job(source: Path, **changes: Any) -> Any:
        return run_job(
            Job(3, str(source), str(tmp_path / "x" / "a.tiff"), {**packed(JPEG), **changes}),
            events.append,
        )

    events: list[Any] = []
    missing = job(tmp_path / "no.svs")
    assert isinstance(missing, Failed)
    assert (missing.id, missing.error, missing.final) == (3, "SlideError", False)
    wrong = job(svs, options={"effort": 3})
    assert (wrong.error, wrong.final) == ("SettingsError", True)
    assert not (tmp_path / "x" / "a.tiff").exists()


def test_disk_without_room(tmp_path: Path, svs: Path) -> None:
    job = Job(1, str(svs), str(tmp_path / "a.tiff"), packed(JPEG), reserved=2**62)
    outcome = run_job(job, lambda _: None)
    assert isinstance(outcome, Failed)
    assert outcome.error == "SlideError"
    assert outcome.no_room
    assert "bytes free" in outcome.message
    assert not files(tmp_path)


@pytest.mark.usefixtures("here")
def test_finished_blocks_outlive_a_full_disk(
    folder: Path, tmp_path: Path, svs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(folder, svs, "a.svs")
    settings = dataclasses.replace(QUICK, retries=0)
    usage = shutil._ntuple_diskusage(10**12, 10**12, 0)  # type: ignore[attr-defined]
    with monkeypatch.context() as patched:
        patched.setattr("wsicodec.convert.space.shutil.disk_usage", lambda _: usage)
        (row,) = convert_batch(folder, tmp_path / "out", settings).rows
        assert (row.state, row.error) == (FAILED, "SlideError")
        work = work_folder(tmp_path / "out" / row.target)
        work.mkdir()
        (work / "blocks.bin").write_bytes(b"of hours")
        (row,) = convert_batch(folder, tmp_path / "out", settings).rows
        assert row.state == FAILED
        assert (work / "blocks.bin").read_bytes() == b"of hours"
        # and have their place already
        with (work / "blocks.bin").open("ab") as file:
            file.truncate(10**7)
        (row,) = convert_batch(folder, tmp_path / "out", settings).rows
        assert row.state == DONE


def test_a_disk_that_fills_up_is_told_apart(tmp_path: Path) -> None:
    error = refused(tmp_path, OSError(errno.ENOSPC, "No space left on device"))
    assert (error.errno, str(error)) == (
        errno.ENOSPC,
        f"{tmp_path}: cannot be written: the disk is full",
    )


def test_partial_files_of_the_dead_are_removed_and_no_others(tmp_path: Path) -> None:
    ours = [".a.tiff.123.part", ".a.tiff.4567.part"]
    others = [".b.tiff.123.part", ".a.tiff.x.part", "a.tiff", ".a.tiff.1.partial", "a.tiff.1.part"]
    for name in ours + others:
        (tmp_path / name).write_bytes(b"")
    remove_partial(tmp_path / "a.tiff")
    assert files(tmp_path) == sorted(others)
    remove_partial(tmp_path / "missing" / "a.tiff")


def test_work_of_others_is_left_alone(tmp_path: Path) -> None:
    """Somebody converts to the same name by hand, without the journal."""
    for name in ("busy", "left"):
        (tmp_path / f".{name}.tiff.wsicodec").mkdir()
        (tmp_path / f".{name}.tiff.wsicodec" / "blocks.bin").write_bytes(b"hours of work")
        (tmp_path / f".{name}.tiff.wsicodec" / "lock").write_bytes(b"")
    with (tmp_path / ".busy.tiff.wsicodec" / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in ("busy", "left", "none"):
            remove_traces(tmp_path / f"{name}.tiff")
    assert files(tmp_path) == [".busy.tiff.wsicodec/blocks.bin", ".busy.tiff.wsicodec/lock"]


# -- batches --


class Here:
    """Workers that convert in this process, where a test is not about processes."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []

    def free(self) -> int:
        return 2 - len(self._jobs)

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def events(self, seconds: float) -> list[Any]:
        if not self._jobs:
            return []
        found: list[Any] = [Started(self._jobs[0].id, str(processes.process()))]
        return [*found, run_job(self._jobs.pop(0), found.append)]

    def abandon(self, identity: int) -> None:
        raise AssertionError

    def close(self) -> None:
        self._jobs.clear()


class Restarting(Here):
    """A worker is lost when its output has got its name; another one begins anew, as on Dask."""

    lost = False

    def events(self, seconds: float) -> list[Any]:
        first = self._jobs[0] if self._jobs else None
        found = super().events(seconds)
        if first is None or self.lost:
            return found
        self.lost = True
        assert isinstance(found[-1], Succeeded)
        return [*found[:-1], Started(first.id, "tcp://another"), run_job(first, found.append)]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_workers", lambda settings: Here())
    monkeypatch.setattr(runs, "TICK", 0.05)


def test_batch(folder: Path, tmp_path: Path, svs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Good slides, a broken one, names of all kinds, and three that want the same name."""
    fill(folder, svs, "a.svs", "a.tif", "A.svs", "deep/er/a.svs", "unnamed", *STRANGE)
    (folder / "broken.svs").write_bytes(svs.read_bytes()[:1500])
    (folder / "empty.tif").write_bytes(b"")
    (folder / "notes.txt").write_text("no slide")
    good = {"a.svs", "a.tif", "A.svs", "deep/er/a.svs", "unnamed", *STRANGE}
    output, seen = tmp_path / "made" / "out", []
    settings = dataclasses.replace(QUICK, retries=1)

    planned = preview(folder, output, settings)
    assert not output.exists()
    assert {row.source for row in planned.rows} == {*good, "broken.svs", "empty.tif"}
    assert {row.state for row in planned.rows} == {WAITING}

    report = convert_batch(folder, output, settings, seen.append)
    rows = by_source(report)
    assert {name for name, row in rows.items() if row.state == DONE} == good
    assert not report.ok
    assert report.converted == len(good)
    assert {row.source: row.target for row in planned.rows} == {
        row.source: row.target for row in report.rows
    }
    for name in good:
        row = rows[name]
        with open_slide(output / row.target) as slide:
            assert (slide.levels[0].height, slide.levels[0].width) == (120, 150)
        assert (row.attempts, row.mpp_x) == (1, 0.2527)
        assert row.bytes_in == svs.stat().st_size
        assert row.bytes_out == (output / row.target).stat().st_size
        assert row.seconds > 0
    assert rows["deep/er/a.svs"].target == "deep/er/a.ome.tiff"
    for name in ("broken.svs", "empty.tif"):
        assert (rows[name].state, rows[name].attempts) == (FAILED, 2)
        assert rows[name].error == "SlideError"
        assert name in rows[name].message
    assert files(output) == sorted([JOURNAL_NAME, *(rows[name].target for name in good)])
    last: BatchProgress = seen[-1]
    assert (last.done, last.failed, last.slides) == (len(good), 2, len(good) + 2)
    assert (last.bytes_in, last.bytes_out) == (report.bytes_in, report.bytes_out)
    printed = json.dumps(report.as_dict(), allow_nan=False)
    assert json.loads(printed)["counts"] == {"done": len(good), "failed": 2, "running": 0} | {
        "waiting": 0
    }

    # the second run: what is done stays as it is, to the byte; failures are tried again
    before = {name: (output / rows[name].target).stat() for name in good}
    os.utime(folder / "a.svs", ns=(1, 10**15))
    (folder / "broken.svs").write_bytes(svs.read_bytes())
    (folder / "empty.tif").unlink()
    monkeypatch.setattr(runs, "_workers", lambda settings: Here())
    again = convert_batch(folder, output, settings)
    assert again.ok
    assert again.converted == 2
    after = by_source(again)
    assert {name for name, row in after.items() if row.attempts > 1} == {"a.svs", "broken.svs"}
    for name in good - {"a.svs"}:
        now = (output / rows[name].target).stat()
        assert (now.st_ino, now.st_mtime_ns) == (before[name].st_ino, before[name].st_mtime_ns)
    every = summary(output)
    assert every.count(DONE) == len(good) + 1
    assert every.count(FAILED) == 1  # its source is gone, its story is kept


def test_worker_lost_behind_its_output(
    folder: Path, tmp_path: Path, svs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands in the way of the next attempt is what the lost one made."""
    fill(folder, svs, "a.svs")
    workers = Restarting()
    monkeypatch.setattr(runs, "_workers", lambda settings: workers)
    settings = dataclasses.replace(QUICK, retries=1)
    (row,) = convert_batch(folder, tmp_path / "1", settings).rows
    assert (row.state, row.attempts) == (FAILED, 2)
    assert "exists" in (row.message or "")
    (row,) = convert_batch(folder, tmp_path / "1", settings).rows
    assert (row.state, row.attempts) == (DONE, 3)
    workers = Restarting()
    settings = dataclasses.replace(QUICK, retries=2)
    (row,) = convert_batch(folder, tmp_path / "2", settings).rows
    assert (row.state, row.attempts) == (DONE, 3)


@pytest.mark.usefixtures("here")
def test_other_people_s_files_are_left_alone(folder: Path, tmp_path: Path, svs: Path) -> None:
    """One that was there before, and one of an output of ours that was changed since."""
    fill(folder, svs, "a.svs", "b.svs")
    output = tmp_path / "out"
    output.mkdir()
    (output / "a.ome.tiff").write_bytes(b"precious")
    first = by_source(convert_batch(folder, output, QUICK))
    assert [first[name].state for name in ("a.svs", "b.svs")] == [FAILED, DONE]
    assert "--overwrite" in first["a.svs"].message
    (output / "b.ome.tiff").write_bytes(b"changed")
    second = by_source(convert_batch(folder, output, QUICK))
    assert [second[name].state for name in ("a.svs", "b.svs")] == [FAILED, FAILED]
    assert (output / "a.ome.tiff").read_bytes() == b"precious"
    assert (output / "b.ome.tiff").read_bytes() == b"changed"
    allowed = dataclasses.replace(QUICK, convert=dataclasses.replace(JPEG, overwrite=True))
    assert convert_batch(folder, output, allowed).ok


@pytest.mark.usefixtures("here")
def test_output_within_the_source_folder(folder: Path, svs: Path) -> None:
    """Outputs are no sources, whether they lie below or beside the slides."""
    fill(folder, svs, "a.svs")
    assert convert_batch(folder, folder / "out", QUICK).ok
    assert [row.source for row in preview(folder, folder / "out", QUICK).rows] == ["a.svs"]
    shutil.rmtree(folder / "out")
    assert convert_batch(folder, folder, QUICK).ok
    assert files(folder) == ["a.ome.tiff", "a.svs", JOURNAL_NAME]
    assert [row.source for row in preview(folder, folder, QUICK).rows] == ["a.svs"]


@pytest.mark.usefixtures("here")
def test_journal_elsewhere(folder: Path, tmp_path: Path, svs: Path) -> None:
    """The names of sources stay out of the output folder when asked to."""
    fill(folder, svs, "secret name.svs")
    settings = dataclasses.replace(QUICK, journal=tmp_path / "private.sqlite")
    assert preview(folder, tmp_path / "out", settings).rows
    assert not (tmp_path / "private.sqlite").exists()
    assert convert_batch(folder, tmp_path / "out", settings).ok
    assert files(tmp_path / "out") == ["secret name.ome.tiff"]
    assert summary(tmp_path / "out", tmp_path / "private.sqlite").ok


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that takes nothing, not even from root."""
    target = tmp_path / "fixed"
    target.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k,ro", "tmpfs", str(target)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)


@pytest.mark.usefixtures("here")
def test_read_only_output(folder: Path, tmp_path: Path, svs: Path, read_only_disk: Path) -> None:
    fill(folder, svs, "a.svs")
    with pytest.raises(SlideError, match="is the folder writable"):
        convert_batch(folder, read_only_disk, QUICK)
    with pytest.raises(SlideError, match="cannot be made"):
        convert_batch(folder, read_only_disk / "below", QUICK)
    elsewhere = dataclasses.replace(QUICK, journal=tmp_path / "j")
    (row,) = convert_batch(folder, read_only_disk, elsewhere).rows
    assert (row.state, row.error) == (FAILED, "SlideError")
    assert "a.ome.tiff" in (row.message or "")


@pytest.mark.parametrize(
    "changes",
    [
        {"jobs": 0},
        {"jobs": 10**6},
        {"retries": -1},
        {"suffix": "tiff"},
        {"suffix": "./../x"},
        {"suffix": "." + "x" * 300},
        {"suffix": ".a\0b"},
    ],
    ids=lambda changes: str(changes)[:30],
)
def test_settings_are_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        BatchSettings(**changes)


def test_settings_hash() -> None:
    """It tells what shows in the output, and the model by its content."""
    base = QUICK.digest()
    same = [
        {"jobs": 3},
        {"overwrite": True},
        {"resume": True},
        {"cache_bytes": 1},
        {"block_size": 512},
        {"tissue": "otsu"},
        {"in_process": False},
    ]
    other = [
        {"quality": 71},
        {"codec": "learned"},
        {"tile_size": 512},
        {"options": {"x": 1}},
        {"glass": "drop"},
        {"deidentify": True},
        {"layout": "flat"},
        {"measure": "sample"},
    ]
    for change in same:
        assert BatchSettings(convert=dataclasses.replace(JPEG, **change)).digest() == base
    for change in other:
        assert BatchSettings(convert=dataclasses.replace(JPEG, **change)).digest() != base
    assert len(json.loads(BatchSettings().as_json())["model"]) == 64
    for first, second in (
        ({"glass": "drop", "tissue": "otsu"}, {"glass": "drop"}),
        ({"deidentify": True, "macro": "blank"}, {"deidentify": True}),
    ):
        digests = [
            BatchSettings(convert=dataclasses.replace(JPEG, **changes)).digest()
            for changes in (first, second)
        ]
        assert digests[0] != digests[1]
    copies = [ConvertSettings("copy"), ConvertSettings("copy", measure="none")]
    assert len({BatchSettings(convert=settings).digest() for settings in copies}) == 1


# -- the command --


@pytest.mark.usefixtures("here")
def test_command(
    folder: Path, tmp_path: Path, svs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(folder, svs, "a.svs", "red\x1b[31m\n.svs")
    (folder / "broken.svs").write_bytes(b"II*\0")
    words = ["convert-batch", str(folder), str(tmp_path / "out")]
    options = ["--codec", "jpeg", "--retries", "0"]

    assert main([*words, "--summary"]) == 1
    assert "there is no journal" in capsys.readouterr().err
    assert main([*words, *options, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "a.svs -> a.ome.tiff" in printed
    assert "3 slides, 0 of them done" in printed
    assert not (tmp_path / "out").exists()

    assert main([*words, *options]) == 1
    printed = capsys.readouterr()
    assert "3 slides: 2 done, 1 failed; " in printed.out
    assert "wsicodec: broken.svs: SlideError: " in printed.err
    assert "[3/3]" in printed.err
    assert "\x1b" not in printed.out + printed.err
    assert r"red\x1b[31m\n.svs" in printed.out

    (folder / "broken.svs").unlink()
    assert main([*words, *options, "--json"]) == 0
    printed = capsys.readouterr()
    assert not printed.err
    found = json.loads(printed.out)
    assert (found["counts"]["done"], found["converted"]) == (2, 0)
    assert found["slides"][0]["ssim_worst"] > 0.9
    assert found["slides"][0]["worker"].endswith(f":{os.getpid()}")

    assert main([*words, "--summary", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["failed"] == 1
    assert main([*words, "--codec", "jpeg", "--quality", "30"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert main([*words, "--codec", "jpeg", "--quality", "30", "--overwrite"]) == 0
    assert main([*words, "--jobs", "0"]) == 2


@pytest.mark.usefixtures("here")
def test_block_size_does_not_show(folder: Path, tmp_path: Path) -> None:
    """Else what is done would have to be made again when it changes."""
    write_svs(folder / "a.svs", tissue(300, 400), levels=2)
    convert = dataclasses.replace(JPEG, tile_size=64, levels=3, glass="fill", tissue="otsu")
    outputs = []
    for size in (128, 1024):
        settings = BatchSettings(convert=dataclasses.replace(convert, block_size=size))
        assert convert_batch(folder, tmp_path / str(size), settings).ok
        outputs.append((tmp_path / str(size) / "a.ome.tiff").read_bytes())
    assert outputs[0] == outputs[1]
    again = BatchSettings(convert=dataclasses.replace(convert, block_size=512))
    assert convert_batch(folder, tmp_path / "128", again).converted == 0


@pytest.mark.usefixtures("here")
def test_zarr(folder: Path, tmp_path: Path, svs: Path) -> None:
    pytest.importorskip("zarr")
    fill(folder, svs, "a.svs")
    settings = dataclasses.replace(QUICK, suffix=".ome.zarr")
    (row,) = convert_batch(folder, tmp_path / "out", settings).rows
    assert (row.state, row.target) == (DONE, "a.ome.zarr")
    every = [p for p in (tmp_path / "out" / "a.ome.zarr").rglob("*") if p.is_file()]
    assert row.bytes_out == sum(p.stat().st_size for p in every) > 0
    assert convert_batch(folder, tmp_path / "out", settings).converted == 0
    os.utime(folder / "a.svs", ns=(1, 10**15))
    (row,) = convert_batch(folder, tmp_path / "out", settings).rows
    assert (row.state, row.attempts, row.message) == (DONE, 2, None)


# -- batches in processes of their own, and their deaths --

COMMAND = [sys.executable, "-m", "wsicodec.cli", "convert-batch"]
# flat: no OME-XML, whose library each process would spend two seconds on
SLOW = ["--codec", "jpegxl", "--effort", "7", "--measure", "none", "--layout", "flat"]


class Batch:
    """A running ``wsicodec convert-batch``."""

    def __init__(self, folder: Path, output: Path, *words: str) -> None:
        self.output = output
        self.process = subprocess.Popen(
            [*COMMAND, str(folder), str(output), *words, "--json"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # background jobs of a shell inherit an ignored SIGINT
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
            start_new_session=True,
        )

    def wait_for(self, source: str) -> int:
        """Until this slide is being coded; pid of the process that does it."""
        deadline = time.monotonic() + 60
        journal = self.output / JOURNAL_NAME
        while self.process.poll() is None and time.monotonic() < deadline:
            if journal.is_file() and journal.stat().st_size:
                with contextlib.suppress(WsicodecError), Journal.read(journal) as opened:
                    for row in opened.rows():
                        work = self.output / f".{row.target}.wsicodec" / "lock"
                        owner = Process.parse(row.worker or "")
                        if (
                            row.source == source
                            and row.state == RUNNING
                            and owner
                            and work.exists()
                        ):
                            return owner.pid
            time.sleep(0.02)
        pytest.fail(f"{source} was not begun: {self.process.communicate()}")

    def end(self) -> dict[str, Any]:
        out, errors = self.process.communicate(timeout=120)
        assert "Traceback" not in errors
        value: dict[str, Any] = json.loads(out)
        return value


def ended(pid: int, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if processes.process(pid).gone() or processes._born(pid) is None:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide whose conversion with SLOW takes some tenths of a second."""
    return write_svs(tmp_path_factory.mktemp("svs") / "m.svs", tissue(700, 700), levels=1)


def test_killed(folder: Path, tmp_path: Path, middling: Path, svs: Path) -> None:
    """First the whole batch, in the middle of a slide; then the worker of the next batch."""
    fill(folder, svs, "a.svs")
    fill(folder, middling, "b.svs", "c.svs")
    output = tmp_path / "out"
    first = Batch(folder, output, *SLOW)
    worker = first.wait_for("b.svs")
    first.process.kill()
    first.process.communicate()
    assert ended(worker)
    assert not (output / "c.ome.tiff").exists()
    finished = (output / "a.ome.tiff").stat()

    second = Batch(folder, output, *SLOW)
    os.kill(second.wait_for("c.svs"), signal.SIGKILL)
    report = second.end()
    assert second.process.returncode == 0
    assert report["counts"] == {"done": 3, "failed": 0, "running": 0, "waiting": 0}
    attempts = {row["source"]: row["attempts"] for row in report["slides"]}
    assert attempts == {"a.svs": 1, "b.svs": 2, "c.svs": 2}
    assert (output / "a.ome.tiff").stat().st_mtime_ns == finished.st_mtime_ns
    assert files(output) == ["a.ome.tiff", "b.ome.tiff", "c.ome.tiff", JOURNAL_NAME]
    tiles = [tifffile.imread(output / f"{name}.ome.tiff") for name in "bc"]
    assert (tiles[0] == tiles[1]).all()


def test_two_batches_at_once(folder: Path, tmp_path: Path, middling: Path) -> None:
    names = [f"{n}.svs" for n in range(3)]
    fill(folder, middling, *names)
    both = [Batch(folder, tmp_path / "out", *SLOW) for _ in range(2)]
    reports = [batch.end() for batch in both]
    assert all(batch.process.returncode == 0 for batch in both)
    assert sum(report["converted"] for report in reports) == len(names)
    for report in reports:
        assert report["counts"]["done"] == len(names)
        assert {row["attempts"] for row in report["slides"]} == {1}
    assert files(tmp_path / "out") == sorted([JOURNAL_NAME, *(f"{n}.ome.tiff" for n in range(3))])


def test_interrupted(folder: Path, tmp_path: Path, middling: Path) -> None:
    """Ctrl-C, which a terminal sends to every process of the group."""
    fill(folder, middling, "a.svs", "b.svs")
    batch = Batch(folder, tmp_path / "out", *SLOW)
    worker = batch.wait_for("a.svs")
    os.killpg(batch.process.pid, signal.SIGINT)
    _, errors = batch.process.communicate(timeout=60)
    assert batch.process.returncode == 130
    assert errors.count("\n") == 1, errors
    assert "interrupted" in errors
    assert ended(worker)
    with Journal.read(tmp_path / "out" / JOURNAL_NAME) as journal:
        assert [row.state for row in journal.rows()] == [WAITING, WAITING]
    assert not [name for name in files(tmp_path / "out") if name.endswith((".tiff", ".part"))]


# -- a cluster --


def test_install_line_where_dask_is_missing(
    folder: Path, tmp_path: Path, svs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(folder, svs, "a.svs")
    monkeypatch.setitem(sys.modules, "distributed", None)
    settings = dataclasses.replace(QUICK, scheduler="tcp://127.0.0.1:1")
    with pytest.raises(RuntimeMissingError, match=r'pip install "wsicodec\[dask\]"'):
        convert_batch(folder, tmp_path / "out", settings)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two worker processes on loopback."""
    distributed = pytest.importorskip("distributed")
    import dask

    former = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        with (
            dask.config.set({"distributed.worker.daemon": False}),
            distributed.LocalCluster(
                n_workers=2,
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
                silence_logs=50,
                env={"WSICODEC_NUM_THREADS": "1"},
            ) as found,
        ):
            yield found
    finally:
        if former is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = former


def test_cluster_with_a_worker_killed(
    folder: Path, tmp_path: Path, middling: Path, cluster: Any
) -> None:
    import distributed

    names = [f"{n}.svs" for n in range(4)]
    fill(folder, middling, *names)
    (folder / "broken.svs").write_bytes(b"II*\0")
    output = tmp_path / "out"
    with distributed.Client(cluster.scheduler_address, set_as_default=False) as client:
        pids = client.run(os.getpid)
    killed: list[str] = []

    def kill(now: BatchProgress) -> None:
        if killed:
            return
        with Journal.read(output / JOURNAL_NAME) as journal:
            running = [row for row in journal.rows() if row.state == RUNNING]
        for row in running:
            if row.worker in pids and (output / f".{row.target}.wsicodec").exists():
                os.kill(pids[row.worker], signal.SIGKILL)
                killed.append(row.source)
                return

    settings = BatchSettings(
        # one tile a block: the first tells that it began
        convert=ConvertSettings(
            "jpegxl", options={"effort": 7}, measure="none", layout="flat", block_size=256
        ),
        scheduler=cluster.scheduler_address,
        retries=1,
    )
    report = convert_batch(folder, output, settings, kill)
    rows = by_source(report)
    assert len(killed) == 1
    assert rows.pop("broken.svs").state == FAILED
    assert {row.state for row in rows.values()} == {DONE}
    assert {name: row.attempts for name, row in rows.items()} == {
        name: 2 if name in killed else 1 for name in names
    }
    assert report.converted == len(names)
    assert files(output) == sorted([JOURNAL_NAME, *(f"{n}.ome.tiff" for n in range(4))])
    for name in names:
        with open_slide(output / rows[name].target) as slide:
            assert slide.info.mpp_x == pytest.approx(0.2527)


def test_interrupted_on_a_cluster(folder: Path, tmp_path: Path, cluster: Any) -> None:
    """Tasks that nobody waits for any longer stop by themselves."""
    write_svs(folder / "a.svs", tissue(1200, 1200), levels=1)
    settings = BatchSettings(
        # many small blocks: the task looks around after each
        convert=ConvertSettings(
            "jpegxl",
            options={"effort": 7},
            measure="none",
            layout="flat",
            tile_size=64,
            block_size=128,
        ),
        scheduler=cluster.scheduler_address,
    )

    def stop(now: BatchProgress) -> None:
        if any(now.running.values()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_batch(folder, tmp_path / "out", settings, stop)
    assert summary(tmp_path / "out").count(WAITING) == 1
    lock = tmp_path / "out" / ".a.ome.tiff.wsicodec" / "lock"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with lock.open("ab") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        time.sleep(0.1)
    assert not (tmp_path / "out" / "a.ome.tiff").exists()
    report = convert_batch(folder, tmp_path / "out", settings)
    assert report.ok
    assert files(tmp_path / "out") == ["a.ome.tiff", JOURNAL_NAME]


def test_scheduler_that_does_not_answer(
    folder: Path, tmp_path: Path, svs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    from wsicodec.convert.batch import cluster as clusters

    monkeypatch.setattr(clusters, "CONNECT_SECONDS", 1)
    fill(folder, svs, "a.svs")
    for address in ("tcp://127.0.0.1:9", "nonsense://x"):
        settings = dataclasses.replace(QUICK, scheduler=address)
        with pytest.raises(SettingsError, match="does not answer"):
            convert_batch(folder, tmp_path / "out", settings)
    assert summary(tmp_path / "out").count(WAITING) == 1
