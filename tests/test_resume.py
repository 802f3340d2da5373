"""Conversions that are killed and go on: nothing done twice, nothing different in the end."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slides import CMU, ROOT, nothing_left, tissue, write_svs

from wsicodec.convert import ConvertPlan, ConvertProgress, ConvertSettings, convert, make_plan
from wsicodec.convert.batch import BatchSettings, convert_batch
from wsicodec.convert.blocks import Block, CodedBlock
from wsicodec.convert.source import Source, SourceDigest
from wsicodec.convert.tiles import GLASS, CodedTile
from wsicodec.convert.work import Work, work_folder
from wsicodec.errors import ModelError, SlideError, UnknownModelError
from wsicodec.models import store
from wsicodec.slide.opening import open_slide
from wsicodec.slide.record import SourceIdentity

COMMAND = [sys.executable, "-m", "wsicodec.cli", "convert"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def svs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_svs(tmp_path_factory.mktemp("svs") / "a.svs", tissue(333, 450))


class Stopped(Exception):
    pass


def stop_after(blocks: int):
    left = blocks

    def stop(_: ConvertProgress) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Stopped

    return stop


def test_goes_on_where_it_was_stopped(svs: Path, tmp_path: Path) -> None:
    settings = ConvertSettings("jpeg", tile_size=32, levels=4, block_size=64, resume=True, jobs=1)
    whole = tmp_path / "whole" / "a.ome.tiff"
    whole.parent.mkdir()
    convert(svs, whole, settings)
    target = tmp_path / "a.ome.tiff"
    for blocks in (1, 20, 25, 3):
        with pytest.raises(Stopped):
            convert(svs, target, settings, stop_after(blocks))
        assert not target.exists()
    seen: list[ConvertProgress] = []
    report = convert(svs, target, settings, seen.append)
    # 49 of 52 blocks were done, and their tiles are counted from the start
    assert report.resumed > 46 * 4
    assert seen[0].tiles_done > report.resumed
    assert target.read_bytes() == whole.read_bytes()
    nothing_left(tmp_path, "a.ome.tiff", "whole")


def test_other_settings_begin_afresh(svs: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.ome.tiff"
    first = ConvertSettings("jpeg", tile_size=64, block_size=64, resume=True, quality=20)
    with pytest.raises(Stopped):
        convert(svs, target, first, stop_after(20))
    report = convert(svs, target, ConvertSettings("jpeg", tile_size=64, block_size=64, resume=True))
    assert report.resumed == 0
    nothing_left(tmp_path, "a.ome.tiff")


def test_a_changed_source_begins_afresh(tmp_path: Path) -> None:
    source = write_svs(tmp_path / "a.svs", tissue(333, 450))
    settings = ConvertSettings("jpeg", tile_size=64, block_size=64, resume=True)
    with pytest.raises(Stopped):
        convert(source, tmp_path / "a.ome.tiff", settings, stop_after(20))
    write_svs(source, tissue(333, 450, 700, 500))
    assert convert(source, tmp_path / "a.ome.tiff", settings).resumed == 0


def test_another_source_of_the_same_size_and_time_begins_afresh(tmp_path: Path) -> None:
    source = write_svs(tmp_path / "a.svs", tissue(333, 450))
    settings = ConvertSettings("jpeg", tile_size=64, block_size=64, resume=True)
    with pytest.raises(Stopped):
        convert(source, tmp_path / "a.ome.tiff", settings, stop_after(20))
    status, content = source.stat(), source.read_bytes()
    source.write_bytes(content.replace(b"Q=70", b"Q=71", 1))
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert convert(source, tmp_path / "a.ome.tiff", settings).resumed == 0


def test_a_changed_zarr_begins_afresh(svs: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.zarr"
    convert(svs, source, ConvertSettings("jpeg", levels=1))
    settings = ConvertSettings("jpeg", tile_size=64, block_size=64, resume=True)
    with pytest.raises(Stopped):
        convert(source, tmp_path / "a.ome.tiff", settings, stop_after(20))
    shutil.rmtree(source)
    convert(svs, source, ConvertSettings("jpeg", levels=1, quality=30))
    assert convert(source, tmp_path / "a.ome.tiff", settings).resumed == 0


@pytest.mark.parametrize("zarr", [False, True])
def test_a_copy_is_the_same_source(svs: Path, tmp_path: Path, zarr: bool) -> None:
    """As after ``touch``, ``rsync`` without times, or a file manager's visit."""
    source = tmp_path / "a.svs"
    if zarr:
        source = tmp_path / "a.zarr"
        convert(svs, source, ConvertSettings("jpeg", levels=1))
    else:
        source.write_bytes(svs.read_bytes())
    settings = ConvertSettings("jpeg", tile_size=64, block_size=64, resume=True)
    with pytest.raises(Stopped):
        convert(source, tmp_path / "a.ome.tiff", settings, stop_after(20))
    for path in (source, *source.rglob("*")):
        os.utime(path, ns=(1, 1))
    if zarr:
        (source / ".DS_Store").write_bytes(b"a place on a desktop")
        (source / "0" / ".nfs0001").write_bytes(b"removed, and open somewhere")
    assert convert(source, tmp_path / "a.ome.tiff", settings).resumed > 0


def test_links_that_lead_nowhere(svs: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.zarr"
    convert(svs, source, ConvertSettings("jpeg", levels=1))
    (source / "note").symlink_to("nowhere")
    convert(source, tmp_path / "a.ome.tiff", ConvertSettings("jpeg"))


@pytest.mark.parametrize("codec", ["jpeg", "copy"])
def test_a_source_that_is_touched_meanwhile(svs: Path, tmp_path: Path, codec: str) -> None:
    source = tmp_path / "a.svs"
    source.write_bytes(svs.read_bytes())
    convert(source, tmp_path / "a.ome.tiff", ConvertSettings(codec), lambda _: os.utime(source))
    with open_slide(tmp_path / "a.ome.tiff") as slide:
        assert slide.info.record is not None
        assert slide.info.record.source is not None
        assert slide.info.record.source.sha256 == hashlib.sha256(svs.read_bytes()).hexdigest()


@pytest.mark.parametrize("codec", ["jpeg", "copy"])
def test_a_source_that_changes_while_its_digest_is_awaited(
    svs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    source = tmp_path / "a.svs"
    source.write_bytes(svs.read_bytes())

    class Slow(SourceDigest):
        def identity(self) -> SourceIdentity | None:
            with source.open("ab") as file:
                file.write(b"more")
            return super().identity()

    monkeypatch.setattr("wsicodec.convert.pipeline.SourceDigest", Slow)
    with pytest.raises(SlideError, match=r"a\.svs: changed while"):
        convert(source, tmp_path / "a.ome.tiff", ConvertSettings(codec))
    nothing_left(tmp_path, "a.svs")


def test_a_change_that_no_sample_shows(svs: Path, tmp_path: Path) -> None:
    """What has another time is read whole where a digest can tell."""
    path = tmp_path / "large.svs"
    path.write_bytes(svs.read_bytes())
    os.truncate(path, 40 * 2**20)
    with open_slide(path) as slide:
        files, digest = Source(slide.info), SourceDigest(slide.info)
    identity = digest.identity()
    os.utime(path, ns=(1, 1))
    files.check_unchanged(identity)
    with path.open("r+b") as file:
        file.seek(39 * 2**20 // 17 * 3 - 100)
        file.write(b"!")
    assert Source(slide.info).content == files.content
    with pytest.raises(SlideError, match="changed while"):
        files.check_unchanged(identity)


def test_a_file_beside_the_slide_changes_where_no_sample_shows(svs: Path, tmp_path: Path) -> None:
    """The digest is of the file by which the slide is opened: of the others it says nothing."""
    path = tmp_path / "a.mrxs"
    path.write_bytes(b"index")
    (tmp_path / "a").mkdir()
    for name in ("Data0000.dat", "Slidedat.ini"):
        (tmp_path / "a" / name).write_bytes(b"x" * 40 * 2**20)
    with open_slide(svs) as slide:
        info = dataclasses.replace(slide.info, path=path, format="mirax")
    files, identity = Source(info), SourceDigest(info).identity()
    os.utime(path, ns=(1, 1))
    files.check_unchanged(identity)
    status = (tmp_path / "a" / "Data0000.dat").stat()
    with (tmp_path / "a" / "Data0000.dat").open("r+b") as file:
        file.seek(39 * 2**20 // 6 + 2 * 2**20)
        file.write(b"!")
    os.utime(tmp_path / "a" / "Data0000.dat", ns=(1, status.st_mtime_ns + 1000))
    assert Source(info).content == files.content
    with pytest.raises(SlideError, match="changed while"):
        files.check_unchanged(identity)


@pytest.mark.parametrize("codec", ["jpeg", "copy"])
def test_a_source_that_changes_meanwhile(svs: Path, tmp_path: Path, codec: str) -> None:
    source = tmp_path / "a.svs"
    source.write_bytes(svs.read_bytes())

    def change(_: ConvertProgress) -> None:
        with source.open("ab") as file:
            file.write(b"more")

    with pytest.raises(SlideError, match=r"a\.svs: changed while"):
        convert(source, tmp_path / "a.ome.tiff", ConvertSettings(codec), change)
    nothing_left(tmp_path, "a.svs")


def test_what_is_taken_over_counts_as_done_but_not_as_speed(svs: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.ome.tiff"
    settings = ConvertSettings("jpeg", tile_size=64, block_size=64, resume=True, jobs=1)
    first: list[ConvertProgress] = []

    def stop(progress: ConvertProgress) -> None:
        first.append(progress)
        if len(first) == 20:
            raise Stopped

    with pytest.raises(Stopped):
        convert(svs, target, settings, stop)
    assert {progress.pixels_resumed for progress in first} == {0}
    seen: list[ConvertProgress] = []
    report = convert(svs, target, settings, seen.append)
    assert {progress.pixels_resumed for progress in seen} == {first[-1].pixels_done}
    assert seen[0].bytes_done > first[-1].bytes_done
    last = seen[-1]
    assert last.bytes_done == sum(level.coded_bytes for level in report.levels)
    assert last.bytes_saved == svs.stat().st_size - last.bytes_done
    assert (last.tiles_done, last.pixels_done) == (last.tiles, last.pixels)


def test_assembling_is_told_apart_from_coding(svs: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.ome.tiff"
    settings = ConvertSettings("jpeg", tile_size=64, block_size=64, resume=True, jobs=1)
    seen: list[ConvertProgress] = []

    def stop(progress: ConvertProgress) -> None:
        seen.append(progress)
        if progress.assembling:
            assert not (work_folder(target) / "target.part").exists()
            raise Stopped

    with pytest.raises(Stopped):
        convert(svs, target, settings, stop)
    assert not target.exists()
    assert [progress.assembling for progress in seen] == [False] * (len(seen) - 1) + [True]
    assert seen[-1] == dataclasses.replace(seen[-2], assembling=True)
    # nothing is left to code
    again: list[ConvertProgress] = []
    convert(svs, target, settings, again.append)
    assert [progress.assembling for progress in again] == [True]
    assert again[0].tiles_done == again[0].tiles


def test_without_resume_an_earlier_run_is_of_no_interest(svs: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.ome.tiff"
    settings = {"codec": "jpeg", "tile_size": 64, "block_size": 64}
    with pytest.raises(Stopped):
        convert(svs, target, ConvertSettings(**settings, resume=True), stop_after(20))
    assert work_folder(target).is_dir()
    assert convert(svs, target, ConvertSettings(**settings)).resumed == 0
    nothing_left(tmp_path, "a.ome.tiff")


@pytest.mark.parametrize("codec", ["jpeg", "learned"])
def test_processes_and_threads_write_the_same(svs: Path, tmp_path: Path, codec: str) -> None:
    files = []
    for here in (True, False):
        folder = tmp_path / str(here)
        folder.mkdir()
        settings = ConvertSettings(
            codec,
            tile_size=64,
            levels=4,
            block_size=128,
            jobs=2,
            in_process=here,
            glass="drop",
            tissue="otsu",
        )
        convert(svs, folder / "a.ome.tiff", settings)
        files.append((folder / "a.ome.tiff").read_bytes())
    assert files[0] == files[1]


@pytest.fixture
def coded_by_tiny(svs: Path, tmp_path: Path, tiny_installed: str, monkeypatch) -> Path:
    """A slide whose tiles need a model that is not installed."""
    monkeypatch.setattr(store, "_store", store._Store())
    source = tmp_path / "source" / "a.ome.tiff"
    source.parent.mkdir()
    convert(
        svs,
        source,
        ConvertSettings(model=tiny_installed, tile_size=64, levels=1, embed_model=False),
    )
    monkeypatch.setenv("WSICODEC_MODELS", str(tmp_path / "none"))
    monkeypatch.setattr(store, "_store", store._Store())
    return source


def test_processes_decode_with_the_models_that_this_one_may(
    coded_by_tiny: Path, tmp_path: Path, tiny_file: bytes
) -> None:
    settings = ConvertSettings("jpeg", tile_size=64, block_size=128, jobs=2, in_process=False)
    target = tmp_path / "a.ome.tiff"
    with pytest.raises(UnknownModelError, match="not installed"):
        convert(coded_by_tiny, target, settings)
    store.allow_model(tiny_file)
    convert(coded_by_tiny, target, settings)
    content = target.read_bytes()
    convert(coded_by_tiny, target, dataclasses.replace(settings, in_process=True, overwrite=True))
    assert target.read_bytes() == content


def test_batches_decode_with_the_models_that_this_process_may(
    coded_by_tiny: Path, tmp_path: Path, tiny_file: bytes
) -> None:
    settings = BatchSettings(ConvertSettings("jpeg", tile_size=64), retries=0)
    store.allow_model(tiny_file)
    report = convert_batch(coded_by_tiny.parent, tmp_path / "out", settings)
    assert report.ok, report.rows


def test_a_model_that_is_another_one_than_was_said(tiny_file: bytes, monkeypatch) -> None:
    monkeypatch.setattr(store, "_store", store._Store())
    with pytest.raises(ModelError, match="another model"):
        store.take_over([("00" * 32, tiny_file)])
    assert store.allowed_models() == ()
    store.allow_model(tiny_file)
    store.take_over(store.allowed_models())
    ((digest, data),) = store.allowed_models()
    assert (digest, data) == (hashlib.sha256(tiny_file).hexdigest(), tiny_file)


def test_a_worker_that_dies_is_named(svs: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.ome.tiff"
    before = _children()

    def kill(_: ConvertProgress) -> None:
        for child in _children() - before:
            with contextlib.suppress(ProcessLookupError):  # one that was killed and is gone
                os.kill(child, signal.SIGKILL)

    settings = ConvertSettings("jpeg", tile_size=32, block_size=32, jobs=2, in_process=False)
    with pytest.raises(SlideError, match=r"a\.svs: level 0.*signal 9"):
        convert(svs, target, settings, kill)
    nothing_left(tmp_path)
    assert not _children() - before
    assert not [t for t in threading.enumerate() if t.name.startswith("wsicodec")]


def test_no_process_can_be_started(
    svs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    settings = ConvertSettings("jpeg", jobs=2, in_process=False)
    with pytest.raises(SlideError, match=r"a\.svs: no process .* can be started: No such file"):
        convert(svs, tmp_path / "a.ome.tiff", settings)
    nothing_left(tmp_path)


def _children() -> set[int]:
    """Processes that this one started."""
    found = set()
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid() and fields[0] != "Z":
                found.add(int(path.name))
    return found


def test_two_at_once_on_one_target(svs: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.ome.tiff"

    def second(_: ConvertProgress) -> None:
        done = subprocess.run(
            [*COMMAND, str(svs), str(target), "--codec", "jpeg"],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "is being written by another process" in done.stderr

    convert(svs, target, ConvertSettings("jpeg"), second)
    nothing_left(tmp_path, "a.ome.tiff")


def whole_run(folder: Path, options: list[str]) -> tuple[bytes, float]:
    """What one run writes, and the seconds that it takes."""
    started = time.monotonic()
    subprocess.run(
        [*COMMAND, str(CMU), "a.ome.tiff", *options],
        cwd=folder,
        env=ENVIRONMENT,
        check=True,
        capture_output=True,
    )
    return (folder / "a.ome.tiff").read_bytes(), time.monotonic() - started


def kill_and_resume(folder: Path, moments: list[float], options: list[str]) -> int:
    """Kill a conversion after each of these shares of a second; the number that were killed."""
    command = [*COMMAND, str(CMU), "a.ome.tiff", "--resume", *options]
    killed = 0
    for moment in moments:
        process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
    if not (folder / "a.ome.tiff").exists():
        subprocess.run(command, cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)
    return killed


def test_killed_at_random_moments(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """kill -9, whatever the process is doing; the last run writes what one run would have."""
    options = ["--codec", "jpeg", "--levels", "4", "--tile-size", "64"]
    whole, _ = whole_run(tmp_path_factory.mktemp("whole"), options)
    moments = random.Random(0)
    assert kill_and_resume(tmp_path, [moments.uniform(0.3, 2.0) for _ in range(4)], options) >= 2
    assert (tmp_path / "a.ome.tiff").read_bytes() == whole
    nothing_left(tmp_path, "a.ome.tiff")


SLOW_OPTIONS = ["--jobs", "2", "--levels", "4", "--glass", "drop", "--floor-ssim", "0.97"]
SLOW_OPTIONS += ["--tile-size", "128"]  # more tiles than a single process would code


@pytest.fixture(scope="module")
def learned_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, float]:
    return whole_run(tmp_path_factory.mktemp("whole"), SLOW_OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_twenty_random_moments(
    tmp_path: Path, learned_run: tuple[bytes, float], seed: int
) -> None:
    """The learned codec in worker processes, killed once somewhere and resumed."""
    whole, seconds = learned_run
    kill_and_resume(tmp_path, [random.Random(seed).uniform(0.2, seconds)], SLOW_OPTIONS)
    assert (tmp_path / "a.ome.tiff").read_bytes() == whole
    nothing_left(tmp_path, "a.ome.tiff")


@pytest.fixture
def plan(svs: Path, tmp_path: Path) -> ConvertPlan:
    with open_slide(svs) as slide:
        chosen = ConvertSettings("jpeg", tile_size=64, levels=4, block_size=64)
        return make_plan(slide.info, tmp_path / "a.tiff", chosen)


class TestWork:
    """The journal of finished blocks."""

    @staticmethod
    def block(number: int) -> CodedBlock:
        rng = np.random.default_rng(number)
        glass = number % 3 == 0
        data = None if glass else rng.bytes(int(rng.integers(1, 300)))
        tile = CodedTile(0, number // 8, number % 8, data, GLASS if glass else 255, 70, 40.5, 0.97)
        piece = rng.integers(0, 256, (32, 32, 3), np.uint8)
        return CodedBlock(Block(0, number // 8, number % 8), (tile,), piece)

    @given(cut=st.integers(1, 2**20), flip=st.none() | st.integers(0, 2**20))
    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_what_is_whole_is_kept(self, plan, cut: int, flip: int | None) -> None:
        """Cut anywhere, changed anywhere: blocks before that place are there, others are not."""
        ends = []
        with pytest.raises(Stopped), Work(plan, {"a": 1}, keep=True) as work:
            for number in range(5):
                work.add(self.block(number))
                ends.append((work.folder / "blocks.bin").stat().st_size)
            raise Stopped
        path = work.folder / "blocks.bin"
        content = bytearray(path.read_bytes())
        cut = cut % len(content)
        whole = sum(end <= cut for end in ends)
        content = content[:cut]
        if flip is not None and content:
            flip %= len(content)
            content[flip] ^= 4
            whole = min(whole, sum(end <= flip for end in ends))
        path.write_bytes(content)
        with Work(plan, {"a": 1}, keep=True) as work:
            assert len(work.blocks) == whole
            for number in range(whole):
                block = self.block(number)
                tile, piece = block.tiles[0], block.piece
                assert piece is not None
                assert next(itertools.islice(work.tiles(0), number, None)) == tile.data
                np.testing.assert_array_equal(work.piece(block.block), piece)
            work.add(self.block(7))
            assert Block(0, 0, 7) in work.blocks
        assert not work.folder.exists()

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
    def test_an_interrupt_while_blocks_are_looked_through_loses_none(
        self, plan, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
    ) -> None:
        with pytest.raises(Stopped), Work(plan, {"a": 1}, keep=True) as work:
            for number in range(5):
                work.add(self.block(number))
            raise Stopped
        take = Work._take

        def interrupted(self: Work, block: Block, *rest: Any) -> None:
            if len(self.blocks) == 3:
                raise error
            take(self, block, *rest)

        monkeypatch.setattr(Work, "_take", interrupted)
        with pytest.raises((error, SlideError)), Work(plan, {"a": 1}, keep=True):
            raise AssertionError
        monkeypatch.undo()
        with Work(plan, {"a": 1}, keep=True) as work:
            assert len(work.blocks) == 5

    def test_a_disk_that_is_away_for_a_moment_costs_no_block(
        self, plan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(Stopped), Work(plan, {"a": 1}, keep=True) as work:
            work.add(self.block(1))
            raise Stopped

        def away(*_: object) -> str:
            raise OSError(errno.ESTALE, "Stale file handle")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", away)
            with pytest.raises(SlideError, match="Stale"), Work(plan, {"a": 1}, keep=True):
                raise AssertionError
        with Work(plan, {"a": 1}, keep=True) as work:
            assert len(work.blocks) == 1

    @pytest.mark.parametrize("content", [b"", b"mask", None])
    def test_blocks_of_a_mask_that_is_damaged_are_forgotten(
        self, plan, content: bytes | None
    ) -> None:
        with pytest.raises(Stopped), Work(plan, {"a": 1}, keep=True) as work:
            work.keep_mask(b"a mask")
            work.add(self.block(1))
            raise Stopped
        with pytest.raises(Stopped), Work(plan, {"a": 1}, keep=True) as work:
            assert work.mask() == b"a mask"
            assert len(work.blocks) == 1
            raise Stopped
        path = work.folder / "mask.bin"
        path.unlink() if content is None else path.write_bytes(content)
        with Work(plan, {"a": 1}, keep=True) as work:
            assert work.mask() is None
            work.keep_mask(b"another")
            assert not work.blocks
            assert work.coded_bytes(0) == 0
            work.add(self.block(2))
            np.testing.assert_array_equal(work.piece(Block(0, 0, 2)), self.block(2).piece)

    def test_a_lock_in_a_folder_that_was_just_removed(
        self, plan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another run ends between the opening of the lock and the locking."""
        real, calls = fcntl.flock, []

        def flock(file: Any, how: int) -> None:
            if not calls:
                shutil.rmtree(work_folder(plan.target))
            calls.append(how)
            real(file, how)

        monkeypatch.setattr(fcntl, "flock", flock)
        with Work(plan, {"a": 1}, keep=False) as work:
            work.add(self.block(1))
            with pytest.raises(SlideError, match="another process"):
                Work(plan, {"a": 1}, keep=False).__enter__()
        assert len(calls) == 3

    def test_another_plan_is_not_gone_on_with(self, plan) -> None:
        with pytest.raises(Stopped), Work(plan, {"a": 1}, keep=True) as work:
            work.add(self.block(1))
            work.keep_mask(b"mask")
            raise Stopped
        with Work(plan, {"a": 2}, keep=True) as work:
            assert not work.blocks
            assert work.mask() is None

    @pytest.mark.parametrize("content", [b"", b"{", b"null", json.dumps({"a": 1}).encode()[:-1]])
    def test_a_torn_plan_is_none(self, plan, content: bytes) -> None:
        with pytest.raises(Stopped), Work(plan, {"a": 1}, keep=True) as work:
            work.add(self.block(1))
            raise Stopped
        (work.folder / "plan.json").write_bytes(content)
        with Work(plan, {"a": 1}, keep=True) as work:
            assert not work.blocks

    def test_foreign_files_are_left_alone(self, plan) -> None:
        work = Work(plan, {"a": 1}, keep=False)
        work.folder.mkdir()
        (work.folder / "thesis.doc").write_text("mine")
        with work:
            work.add(self.block(1))
        assert [p.name for p in work.folder.iterdir()] == ["thesis.doc"]
        (work.folder / "thesis.doc").unlink()
        work.folder.rmdir()
