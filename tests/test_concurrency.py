"""Threads and processes: the same pixels whoever decodes, and nobody waits for ever."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import wsicodec
from wsicodec import settings
from wsicodec.codec import _share_out
from wsicodec.errors import SettingsError
from wsicodec.forking import renewed_after_fork
from wsicodec.models.decoder import load_decoder

FOLDER = Path(__file__).parent / "conformance"
TILES = tuple(sorted(FOLDER.glob("decode/*.tile")))
PATIENCE = 120  # seconds until a test counts as hanging

METHODS = [
    m for m in ("fork", "forkserver", "spawn") if m in multiprocessing.get_all_start_methods()
]


def pixels_digest(path: Path) -> str:
    """SHA-256 of a tile's pixels."""
    return hashlib.sha256(wsicodec.decode(path.read_bytes())).hexdigest()


def decode_all(repeat: int = 1) -> list[str]:
    """What a worker process does: load the tiny model, decode all vectors."""
    from wsicodec.models.store import allow_model

    allow_model((FOLDER / "tiny.wscm").read_bytes())
    return [pixels_digest(path) for _ in range(repeat) for path in TILES]


def decode_with_what_is_loaded(_: int = 0) -> list[str]:
    """A forked worker's share: the parent's model, no loading."""
    return [pixels_digest(path) for path in TILES]


@pytest.fixture(scope="module")
def expected(tiny) -> list[str]:
    """Digests of the vectors' pixels, decoded by one thread."""
    return [pixels_digest(path) for path in TILES]


@pytest.fixture
def watchdog() -> Iterator[None]:
    """Ends the process with all stacks shown when a test hangs: a deadlock must not stop CI."""
    import faulthandler

    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Lets a test set WSICODEC_NUM_THREADS; the budget is read anew before and after."""
    settings._budget.reset()
    yield monkeypatch
    settings._budget.reset()


pytestmark = pytest.mark.usefixtures("watchdog")


@pytest.mark.parametrize("threads", [1, 8])
def test_threads_give_the_same_pixels(threads: int, expected: list[str]) -> None:
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(pixels_digest, TILES * 8))
    assert found == expected * 8


@pytest.mark.parametrize("threads", [1, 8, None])
def test_decode_batch_gives_the_same_pixels(threads: int | None, expected: list[str]) -> None:
    images = wsicodec.decode_batch([path.read_bytes() for path in TILES], threads=threads)
    assert [hashlib.sha256(image).hexdigest() for image in images] == expected


def test_decode_batch_fails_by_name_from_its_threads(tiny) -> None:
    good = (FOLDER / "decode/learned-64x48-gain90.tile").read_bytes()
    bad = (FOLDER / "refuse/words-end-early.tile").read_bytes()
    with pytest.raises(wsicodec.TruncatedError):
        wsicodec.decode_batch([good, good, bad, good], threads=3)


def test_a_slow_group_holds_up_no_other() -> None:
    done: list[int] = []
    others_done = threading.Event()

    def run(group: list[int]) -> None:
        if group == [0]:
            assert others_done.wait(PATIENCE)
        done.append(group[0])
        if len(done) == 9:
            others_done.set()

    _share_out([[i] for i in range(10)], run, 2)
    assert done[-1] == 0 and sorted(done) == list(range(10))


@pytest.mark.parametrize("workers", [1, 3])
def test_no_group_is_begun_after_a_failure(workers: int) -> None:
    begun: list[int] = []

    def run(group: list[int]) -> None:
        begun.append(group[0])
        raise KeyboardInterrupt(group[0])

    with pytest.raises(KeyboardInterrupt, match=r"[012]"):
        _share_out([[i] for i in range(100)], run, workers)
    assert len(begun) <= workers


def test_threads_encode_the_same_bytes(tiny_installed: str, tissue) -> None:
    image = tissue(70, 90)
    one = wsicodec.encode(image, model=tiny_installed)
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(wsicodec.encode, image, model=tiny_installed) for _ in range(24)]
        assert {job.result(PATIENCE) for job in jobs} == {one}


def test_first_use_from_many_threads_at_once(expected: list[str]) -> None:
    """A fresh process whose eight threads all decode first: one load, no double registration."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_concurrency as t
from concurrent.futures import ThreadPoolExecutor
from wsicodec.models.store import allow_model
allow_model((t.FOLDER / "tiny.wscm").read_bytes())
with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda _: t.decode_with_what_is_loaded(), range(8)))
import json
print(json.dumps(found))
"""
    child = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=False, timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(FOLDER.parents[1])},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    assert json.loads(child.stdout) == [expected] * 8


@pytest.mark.parametrize("method", METHODS)
def test_four_processes_at_once(method: str, expected: list[str]) -> None:
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(4, mp_context=context) as pool:
        jobs = [pool.submit(decode_all) for _ in range(4)]
        assert [job.result(PATIENCE) for job in jobs] == [expected] * 4


@pytest.mark.skipif("fork" not in METHODS, reason="no fork on this platform")
def test_fork_after_the_parent_has_decoded(expected: list[str]) -> None:
    """Sessions and locks of the parent are of no use in a child; it must build its own."""
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(4, mp_context=context) as pool:
        assert list(pool.map(decode_with_what_is_loaded, range(8))) == [expected] * 8
    # and the parent goes on
    assert decode_with_what_is_loaded() == expected


@pytest.mark.skipif("fork" not in METHODS, reason="no fork on this platform")
def test_fork_while_other_threads_decode(expected: list[str]) -> None:
    """Whatever lock another thread holds at the fork, the child has to live without its owner."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            decode_with_what_is_loaded()

    workers = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for worker in workers:
        worker.start()
    context = multiprocessing.get_context("fork")
    try:
        for _ in range(4):
            receive, send = context.Pipe(duplex=False)
            child = context.Process(target=_send_digests, args=(send,))
            child.start()
            assert receive.poll(60), "the child hangs"
            assert receive.recv() == expected
            child.join(60)
            assert child.exitcode == 0
    finally:
        stop.set()
        for worker in workers:
            worker.join(60)


def _send_digests(connection) -> None:
    connection.send(decode_with_what_is_loaded())


@pytest.mark.skipif("fork" not in METHODS, reason="no fork on this platform")
def test_fork_of_a_fork(expected: list[str]) -> None:
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_fork_again, args=(send,))
    child.start()
    assert receive.poll(60)
    assert receive.recv() == expected
    child.join(60)


def _fork_again(connection) -> None:
    decode_with_what_is_loaded()
    child = multiprocessing.get_context("fork").Process(target=_send_digests, args=(connection,))
    child.start()
    child.join(60)


def _child_status(work: Callable[[], bool]) -> int:
    """Exit status of a forked child: 0 where ``work`` gives true, a signal's where it hangs."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        fine = False
        try:
            fine = work()
        finally:
            os._exit(0 if fine else 1)
    return os.waitpid(child, 0)[1]


@pytest.mark.skipif("fork" not in METHODS, reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_fork_while_a_thread_builds_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_decoder((FOLDER / "tiny.wscm").read_bytes())
    building, go_on, parent = threading.Event(), threading.Event(), os.getpid()

    def build(*given: object) -> None:
        if os.getpid() == parent:
            building.set()
            assert go_on.wait(60)

    monkeypatch.setattr("wsicodec.models.decoder.fused_model", build)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: model.fused)
        assert building.wait(20)
        status = _child_status(lambda: model.fused is None and model._fused_tried)
        go_on.set()
        assert running.result(20) is None
    assert status == 0


@pytest.mark.skipif("fork" not in METHODS, reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_fork_while_a_thread_installs_into_tifffile() -> None:
    from wsicodec.plugins import tifffile as plugin

    holding, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with plugin._guard.lock:
            holding.set()
            assert go_on.wait(60)

    def works() -> bool:
        plugin.install()
        return plugin.is_installed()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(hold)
        assert holding.wait(20)
        status = _child_status(works)
        go_on.set()
        running.result(20)
    assert status == 0


class _Thing:
    """renewed: how often."""

    def __init__(self, *, fails: bool) -> None:
        self.fails, self.renewed = fails, 0

    def renew(self) -> None:
        self.renewed += 1
        if self.fails:
            raise RuntimeError("cannot be renewed")


@pytest.mark.skipif("fork" not in METHODS, reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_what_cannot_be_renewed_keeps_nothing_else_from_it(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    things = [_Thing(fails=number % 2 == 0) for number in range(10)]
    for thing in things:
        renewed_after_fork(thing)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    assert _child_status(lambda: [thing.renewed for thing in things] == [1] * 10) == 0
    things.clear()  # other tests fork too
    del thing
    assert capfd.readouterr().err.count("RuntimeError: cannot be renewed") == 1


# -- WSICODEC_NUM_THREADS --


@pytest.mark.parametrize("value", ["1", "3", "1024"])
def test_thread_budget_is_what_the_variable_says(value: str, budget: pytest.MonkeyPatch) -> None:
    budget.setenv("WSICODEC_NUM_THREADS", value)
    assert settings.thread_budget() == int(value)


@pytest.mark.parametrize("value", ["0", "-1", "1025", "two", "1.5", " 2", "1e3", "9" * 30])
def test_improper_thread_budget_is_named(value: str, budget: pytest.MonkeyPatch, tiny) -> None:
    budget.setenv("WSICODEC_NUM_THREADS", value)
    with pytest.raises(SettingsError, match="WSICODEC_NUM_THREADS"):
        settings.thread_budget()
    with pytest.raises(SettingsError, match="WSICODEC_NUM_THREADS"):
        wsicodec.decode((FOLDER / "decode/learned-1x1-gain90.tile").read_bytes())


def test_thread_budget_without_the_variable(budget: pytest.MonkeyPatch) -> None:
    budget.delenv("WSICODEC_NUM_THREADS", raising=False)
    assert 1 <= settings.thread_budget() <= (os.cpu_count() or 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_no_more_threads_compute_than_the_budget(
    threads: int, budget: pytest.MonkeyPatch, tiny
) -> None:
    """Eight callers, one budget: counted where a tile's networks run."""
    budget.setenv("WSICODEC_NUM_THREADS", str(threads))
    lock, running, most = threading.Lock(), 0, 0
    cells = tiny.cells

    def counted(*shape):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        result = cells(*shape)
        with lock:
            running -= 1
        return result

    budget.setattr(tiny, "cells", counted)
    budget.setattr("wsicodec.codec.learned.decoder_of_prefix", lambda prefix: tiny)
    data = (FOLDER / "decode/learned-64x48-gain90.tile").read_bytes()
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(wsicodec.decode, [data] * 16))
    assert most == threads
    assert all(np.array_equal(image, images[0]) for image in images)


def test_a_failing_tile_gives_its_slot_back(budget: pytest.MonkeyPatch, tiny) -> None:
    budget.setenv("WSICODEC_NUM_THREADS", "1")
    bad = (FOLDER / "refuse/words-end-early.tile").read_bytes()
    for _ in range(5):
        with pytest.raises(wsicodec.TruncatedError):
            wsicodec.decode(bad)
    wsicodec.decode((FOLDER / "decode/learned-1x1-gain90.tile").read_bytes())


def test_one_thread_per_session_whatever_the_machine(expected: list[str]) -> None:
    """Decoding in one thread starts no other: no pool of onnxruntime's beside the budget."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_concurrency as t
import onnxruntime  # its import starts a thread of its own, which does not compute
from pathlib import Path
before = len(list(Path("/proc/self/task").iterdir()))
t.decode_all(2)
print(len(list(Path("/proc/self/task").iterdir())) - before)
"""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("no /proc")
    child = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=False, timeout=PATIENCE,
        env={
            **os.environ,
            "PYTHONPATH": str(FOLDER.parents[1]),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        },
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    assert int(child.stdout) == 0
