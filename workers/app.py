"""The one Celery app, embedded or distributed, and the few things that cross it.

Messages are wake-ups; the catalog's row is the truth (DESIGN section 3). So messages are acknowledged early, and one
that is lost or repeated does no harm. Threads, never prefork: libvirt, libnbd and several native libraries misbehave
after a fork. Progress and cancellation travel through the result backend, which for the embedded form is a folder, so
that another process (`stillframe job watch`, `job cancel`) sees them too.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from workers.contract.errors import ConfigError
from workers.contract.messages import Command, Event, Progress

if TYPE_CHECKING:
    from celery import Celery

ADVANCE = "stillframe.advance"
CONTROL = "control"
RESCUE = "rescue"
_WAKE = "stillframe.wake"
_DAY = 24 * 3600


def host_queue(hypervisor: str) -> str:
    return f"host.{hypervisor}"


def _queue(app: Celery, name: str) -> str:
    return f"{app.main}.{name}"


def make_app(*, broker_url: str = "memory://", backend_url: str) -> Celery:
    """`backend_url`: `file:///folder` (embedded; the folder is made) or `redis://…`."""
    from celery import Celery

    if backend_url.startswith("file://"):
        folder = Path(backend_url.removeprefix("file://"))
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot be made: {error.strerror}",
                hint="set `runtime` under [paths] to a folder that you may write",
            ) from None
    options: dict[str, Any] = {"visibility_timeout": _DAY}
    if broker_url.startswith("memory"):
        options = {"polling_interval": 0.01}  # measured: 11 ms a hop; the default of 1 s would be seconds a job
    # The memory broker is one for the whole process: the app's name, which begins its queues' names, keeps two apart.
    main = f"stillframe-{secrets.token_hex(4)}" if broker_url.startswith("memory") else "stillframe"
    app = Celery(main, broker=broker_url, backend=backend_url, set_as_current=False)
    app.conf.update(
        broker_transport_options=options,
        broker_connection_retry_on_startup=True,
        task_default_queue=_queue(app, CONTROL),
        task_create_missing_queues=True,
        task_ignore_result=True,
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
        event_queue_ttl=_DAY,
        result_expires=_DAY,
    )
    return app


def send(app: Celery, command: Command, queue: str) -> None:
    """Ask for `command` to be performed by a worker that serves `queue`."""
    app.send_task(f"stillframe.{command.kind}", args=[command.model_dump_json()], queue=_queue(app, queue))


def post_event(app: Celery, job: str, event: Event) -> None:
    """Report `event` to the controller."""
    app.send_task(ADVANCE, args=[job, event.model_dump_json()], queue=_queue(app, CONTROL))


# --- progress and cancellation ---------------------------------------------------------------------------------


def _progress_id(job: str, target: str) -> str:
    return f"{job}.{target}.progress"


def _cancel_id(job: str) -> str:
    return f"{job}.cancel"


def publish_progress(app: Celery, job: str, progress: Progress) -> None:
    app.backend.store_result(_progress_id(job, progress.target), progress.model_dump(mode="json"), "PROGRESS")


def read_progress(app: Celery, job: str, target: str) -> Progress | None:
    """None before the first report, or where one is just being written."""
    found = _meta(app, _progress_id(job, target))
    result = found.get("result")
    return Progress.model_validate(result) if isinstance(result, dict) else None


def request_cancel(app: Celery, job: str) -> None:
    """Workers look every half second."""
    app.backend.store_result(_cancel_id(job), None, "REVOKED")


def cancel_requested(app: Celery, job: str) -> bool:
    return _meta(app, _cancel_id(job)).get("status") == "REVOKED"


def _meta(app: Celery, id: str) -> dict[str, Any]:
    from kombu.exceptions import DecodeError

    try:
        found: dict[str, Any] = app.backend.get_task_meta(id)
    except (DecodeError, ValueError):  # the folder backend writes in place: half a file may be read
        return {}
    return found


def forget(app: Celery, job: str, targets: Iterable[str]) -> None:
    """Remove what a job that has ended left in the result backend."""
    for id in [_cancel_id(job), *(_progress_id(job, target) for target in targets)]:
        with suppress(FileNotFoundError):
            app.backend.forget(id)


# --- the embedded worker ---------------------------------------------------------------------------------------


def _nothing() -> None:
    """A message to wake a consumer with."""


class EmbeddedWorker:
    """Workers inside this process, on threads: one for control and hosts, one of its own for rescue (a thaw never
    waits behind a transfer). Use as a context manager."""

    def __init__(self, app: Celery, hypervisors: Iterable[str], *, concurrency: int = 8) -> None:
        self._app = app
        queues = [_queue(app, name) for name in (CONTROL, *map(host_queue, hypervisors))]
        app.task(_nothing, name=_WAKE, shared=False)
        self._plans = [("main", queues, concurrency), (RESCUE, [_queue(app, RESCUE)], 1)]
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> EmbeddedWorker:
        for name in ("celery", "kombu", "celery.worker"):
            logging.getLogger(name).setLevel(logging.ERROR)
        for name, queues, concurrency in self._plans:
            # One after the other: which queues a consumer takes is kept on the app until it has connected.
            ready = threading.Event()
            worker = self._worker(name, queues, concurrency, ready)
            thread = threading.Thread(target=worker.start, name=f"worker-{name}", daemon=True)
            thread.start()
            self._threads.append(thread)
            ready.wait(10)
        return self

    def _worker(self, name: str, queues: list[str], concurrency: int, ready: threading.Event) -> Any:
        from concurrent.futures import ThreadPoolExecutor

        from celery.concurrency.thread import TaskPool

        app = self._app

        class Pool(TaskPool):  # type: ignore[misc]
            # Celery looks a task up in the current app of the thread that runs it. Without this, that is the default
            # app of the process, which knows but the first worker's tasks, and through them a context long closed.
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                self.executor = ThreadPoolExecutor(max_workers=self.limit, initializer=app.set_current)

        class Worker(self._app.WorkController):  # type: ignore[misc, name-defined]
            def on_consumer_ready(self, consumer: object) -> None:  # noqa: ARG002 - Celery's own signature
                ready.set()

        return Worker(
            app=self._app,
            hostname=f"{name}@embedded",
            pool_cls=Pool,
            concurrency=concurrency,
            queues=queues,
            without_heartbeat=True,
            without_mingle=True,
            without_gossip=True,
            loglevel="ERROR",
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from celery.worker import state

        state.should_stop = 0  # the consumers' loops look at it; zero is the exit code
        for _, queues, _ in self._plans:
            for _ in range(2):  # the loop that wakes up, and the one more that it makes before it ends: 2 s each else
                self._app.send_task(_WAKE, queue=queues[0])
        for thread in self._threads:
            thread.join(10)
        state.should_stop = None
