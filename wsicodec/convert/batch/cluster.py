"""The processes of a Dask cluster as workers of a batch.

Each slide is one task. Sources and outputs are read and written where the task runs, under the same
paths as here: a cluster shares its file system. The journal stays with the process that runs the
batch; workers tell it what they do through events of the scheduler.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import queue
import time
from collections.abc import Sequence
from typing import Any

import wsicodec
from wsicodec.convert.batch.jobs import Advanced, Event, Failed, Job, Started, Succeeded, run_job
from wsicodec.convert.batch.rows import LOST
from wsicodec.errors import RuntimeMissingError, SettingsError
from wsicodec.models.store import allowed_models, take_over
from wsicodec.settings import thread_budget

CONNECT_SECONDS = 20
INSTALL = 'pip install "wsicodec[dask]"'


class DaskWorkers:
    """The workers of a running cluster.

    address: of the scheduler, ``tcp://host:port``; what else a connection needs (TLS) comes from
    Dask's own configuration. jobs: slides at once; None for as many as the workers have threads.

    Dask begins the task of a worker that died again elsewhere, which shows as another ``Started``.
    Raises RuntimeMissingError without Dask, SettingsError for a scheduler that does not answer.
    """

    def __init__(self, address: str, jobs: int | None = None) -> None:
        try:
            distributed: Any = importlib.import_module("distributed")
        except ImportError as error:
            raise RuntimeMissingError(
                f"--scheduler needs Dask distributed ({error}): {INSTALL}"
            ) from error
        try:
            self._client = distributed.Client(
                address, timeout=CONNECT_SECONDS, set_as_default=False, name="wsicodec"
            )
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise SettingsError(f"scheduler {address}: does not answer: {error}") from error
        self._jobs = jobs
        self._topic = f"wsicodec-{os.getpid()}-{time.time_ns()}"
        self._number = 0
        self._tasks: dict[int, tuple[int, Any]] = {}
        self._heard: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        self._client.subscribe_topic(self._topic, self._told)

    def free(self) -> int:
        # without a worker one task is handed over all the same: adaptive clusters wait for it
        most = max(1, sum(map(int, self._client.nthreads().values())))
        return min(most, self._jobs or most) - len(self._tasks)

    def submit(self, job: Job) -> None:
        self._number += 1
        number = self._number
        key = f"{self._topic}-{number}"
        version = wsicodec.__version__
        future = self._client.submit(
            _task, job, number, self._topic, version, allowed_models(), key=key, pure=False
        )
        self._tasks[job.id] = (number, future)
        future.add_done_callback(lambda done: self._heard.put((number, _outcome(job, done))))

    def events(self, seconds: float) -> list[Event]:
        found: list[Event] = []
        deadline = time.monotonic() + seconds
        while True:
            try:
                wait = 0.0 if found else max(0.0, deadline - time.monotonic())
                number, event = self._heard.get(timeout=wait) if wait else self._heard.get_nowait()
            except queue.Empty:
                return found
            task = self._tasks.get(event.id)
            if task is None or task[0] != number:
                continue  # of a task that was given up
            if isinstance(event, Succeeded | Failed):
                del self._tasks[event.id]
            found.append(event)

    def abandon(self, identity: int) -> None:
        _, future = self._tasks.pop(identity)
        future.cancel(force=True)

    def close(self) -> None:
        """Cancel what is under way: those tasks notice within a second or two and tidy up."""
        with contextlib.suppress(Exception):
            self._client.cancel([future for _, future in self._tasks.values()], force=True)
        self._client.close()

    def _told(self, event: Any) -> None:
        """A worker's message; called in a thread of Dask's."""
        with contextlib.suppress(TypeError, ValueError, KeyError):
            number, identity, kind, *values = event[1]
            known = {"started": Started, "advanced": Advanced}
            self._heard.put((number, known[kind](identity, *values)))


def _outcome(job: Job, future: Any) -> Event:
    """What became of a task; errors of the conversion itself come as its result."""
    if future.status == "finished":
        try:
            result = future.result()
        except Exception as error:  # the result was on a worker that has gone
            return Failed(job.id, LOST, f"{job.source}: the result was lost: {error}", lost=True)
        assert isinstance(result, Succeeded | Failed)
        return result
    if future.status == "error":
        problem = future.exception()
        kind = type(problem).__name__
        lost = kind == "KilledWorker"
        return Failed(job.id, LOST if lost else kind, f"{job.source}: {problem}", lost=lost)
    return Failed(
        job.id, LOST, f"{job.source}: the cluster gave the task up ({future.status})", lost=True
    )


def _task(
    job: Job, number: int, topic: str, version: str, models: Sequence[tuple[str, bytes]]
) -> Succeeded | Failed:
    """Body of a task, on a worker of the cluster."""
    if version != wsicodec.__version__:
        message = f"{job.source}: a worker has wsicodec {wsicodec.__version__}, not {version}"
        return Failed(job.id, "UnsupportedError", message)
    take_over(models)
    module: Any = importlib.import_module("distributed.worker")
    worker = module.get_worker()
    key = getattr(module.thread_state, "key", None)

    def emit(event: Event) -> None:
        if isinstance(event, Advanced):
            state = worker.state.tasks.get(key)
            if key is not None and (state is None or state.state == "cancelled"):
                raise TaskCancelled("the batch has ended, or given this task up")
            worker.log_event(
                topic,
                [number, job.id, "advanced", event.pixels_done, event.pixels, event.bytes_done],
            )

    worker.log_event(topic, [number, job.id, "started", f"{worker.address}"])
    settings = dict(job.settings)
    if settings.get("jobs") is None:
        settings["jobs"] = max(1, thread_budget() // max(1, worker.state.nthreads))
    return run_job(dataclasses.replace(job, settings=settings), emit)


class TaskCancelled(Exception):
    """Ends a conversion on a worker whose batch no longer wants it."""
