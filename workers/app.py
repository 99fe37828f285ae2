"""The one Celery app, embedded or distributed, and the few things that cross it.

Messages are wake-ups; the catalog's row is the truth (DESIGN section 3). So messages are acknowledged early, and one
that is lost or repeated does no harm. Threads, never prefork: libvirt, libnbd and several native libraries misbehave
after a fork. Progress and cancellation travel through the result backend, which for the embedded form is a folder, so
that another process (`stillframe job watch`, `job cancel`) sees them too.

A broker that is away is waited for: an event that a worker has to tell is told until somebody has it. What gets lost
all the same, with a process that is killed or a Redis that forgets, shows as silence, and the reconciler acts on that.
"""

from __future__ import annotations

import logging
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from workers.contract.errors import ConfigError
from workers.contract.messages import SILENT_SECONDS, Beat, Command, Event, Progress

if TYPE_CHECKING:
    from celery import Celery

log = logging.getLogger(__name__)

ADVANCE = "stillframe.advance"
CONTROL = "control"
DISPATCH = "stillframe.dispatch"
BEAT = "stillframe.beat"
_WAKE = "stillframe.wake"
_DAY = 24 * 3600
THREADS = 64
"""Commands that one worker performs at once; the threads are made when they are needed. Many: a transfer that waits
for its turn (`max_transfers`) has one."""


def host_queue(hypervisor: str) -> str:
    return f"host.{hypervisor}"


def rescue_queue(hypervisor: str) -> str:
    """For thaws alone: served by a thread of its own, never behind a transfer."""
    return f"rescue.{hypervisor}"


def _queue(app: Celery, name: str) -> str:
    return f"{app.main}.{name}"


def is_embedded(broker_url: str) -> bool:
    return broker_url.startswith("memory")


def without_password(url: str) -> str:
    """For people's eyes."""
    return re.sub(r"//[^/@]*@", "//…@", url)


def make_app(*, broker_url: str = "memory://", backend_url: str) -> Celery:
    """`backend_url`: `file:///folder` (embedded; the folder is made) or `redis://…`."""
    if backend_url.startswith("file://"):
        folder = Path(backend_url.removeprefix("file://"))
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot be made: {error.strerror}",
                hint="set `runtime` under [paths] to a folder that you may write",
            ) from None
    # The memory broker is one for the whole process: the app's name, which begins its queues' names, keeps two apart.
    main = f"stillframe-{secrets.token_hex(4)}" if is_embedded(broker_url) else "stillframe"
    return _configured(main, broker_url, backend_url)


_REDIS = {
    "visibility_timeout": _DAY,
    "socket_keepalive": True,
    "socket_timeout": 10,
    "socket_connect_timeout": 5,
    "retry_policy": {"max_retries": 1, "interval_start": 0, "timeout": 2},
}


def _configured(main: str, broker_url: str, backend_url: str) -> Celery:
    from celery import Celery

    app = Celery(main, broker=broker_url, backend=backend_url, set_as_current=False)
    if is_embedded(broker_url):
        app.conf.update(broker_url="", broker_transport="workers.memory_broker:Transport")
    else:
        app.conf.update(broker_transport_options=_REDIS, result_backend_transport_options=_REDIS)
    app.conf.update(
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=5,
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


def send(app: Celery, command: Command, queue: str, *, patience: float = 0.0) -> None:
    """Ask for `command` to be performed by a worker that serves `queue`; a broker that is away is waited for, at most
    `patience` seconds."""
    _post(app, f"stillframe.{command.kind}", [command.model_dump_json()], queue, time.monotonic() + patience)


def post_event(app: Celery, job: str, event: Event) -> None:
    """Report `event` to the controller; waits for a broker that is away, however long that is."""
    _post(app, ADVANCE, [job, event.model_dump_json()], CONTROL, float("inf"))


def _post(app: Celery, task: str, arguments: list[str], queue: str, until: float) -> None:
    pause = 0.2
    while True:
        try:
            app.send_task(task, args=arguments, queue=_queue(app, queue), ignore_result=True)
        except _unreachable():
            if time.monotonic() >= until:
                raise
            _never.wait(pause)
            pause = min(2 * pause, 5.0)
        else:
            return


_never = threading.Event()
"""To wait on."""


def _unreachable() -> tuple[type[Exception], ...]:
    from kombu.exceptions import OperationalError

    found: tuple[type[Exception], ...] = (OperationalError, OSError)
    with suppress(ImportError):
        from redis.exceptions import RedisError

        found = (*found, RedisError)
    return found


def wake(app: Celery) -> bool:
    """Tell the controllers that a job waits. False: nobody can be told now; they look by themselves, a little later."""
    try:
        app.send_task(DISPATCH, queue=_queue(app, CONTROL), retry=False, expires=60, ignore_result=True)
    except _unreachable():
        return False
    return True


def post_beat(app: Celery, beat: Beat) -> bool:
    """Tell the controllers that a worker lives; False if the broker is away: the next one will do."""
    try:
        app.send_task(
            BEAT,
            args=[beat.model_dump_json()],
            queue=_queue(app, CONTROL),
            retry=False,
            expires=SILENT_SECONDS,
            ignore_result=True,
        )
    except _unreachable():
        return False
    return True


def broker_answers(app: Celery) -> bool:
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=5)
            connection.default_channel.queue_declare(_queue(app, CONTROL), passive=False)
    except _unreachable():
        return False
    return True


# --- progress and cancellation ---------------------------------------------------------------------------------


def _progress_id(job: str, target: str) -> str:
    return f"{job}.{target}.progress"


def _cancel_id(job: str) -> str:
    return f"{job}.cancel"


def publish_progress(app: Celery, job: str, progress: Progress) -> None:
    """Nobody has to see it: a backend that is away is no reason to end a transfer."""
    with suppress(*_away(app)):
        app.backend.store_result(_progress_id(job, progress.target), progress.model_dump(mode="json"), "PROGRESS")


def read_progress(app: Celery, job: str, target: str) -> Progress | None:
    """None before the first report, or where one is just being written."""
    found = _meta(app, _progress_id(job, target))
    result = found.get("result")
    return Progress.model_validate(result) if isinstance(result, dict) else None


def request_cancel(app: Celery, job: str) -> None:
    """Workers look every half second. A backend that is away forgets it: the job ends as it would have."""
    with suppress(*_away(app)):
        app.backend.store_result(_cancel_id(job), None, "REVOKED")


def cancel_requested(app: Celery, job: str) -> bool:
    return _meta(app, _cancel_id(job)).get("status") == "REVOKED"


def _meta(app: Celery, id: str) -> dict[str, Any]:
    from kombu.exceptions import DecodeError

    try:
        found: dict[str, Any] = app.backend.get_task_meta(id)
    except (DecodeError, ValueError):  # the folder backend writes in place: half a file may be read
        return {}
    except _away(app):
        return {}
    return found


def _away(app: Celery) -> tuple[type[Exception], ...]:
    """Errors of a backend that cannot be reached; of a folder there are none to be expected."""
    return () if app.conf.result_backend.startswith("file:") else _unreachable()


def forget(app: Celery, job: str, targets: Iterable[str]) -> None:
    """Remove what a job that has ended left in the result backend."""
    for id in [_cancel_id(job), *(_progress_id(job, target) for target in targets)]:
        with suppress(FileNotFoundError, *_away(app)):
            app.backend.forget(id)


# --- workers on threads ------------------------------------------------------------------------------------------


def _nothing() -> None:
    """A message to wake a consumer with."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One consumer: its queues, and how many of their messages it works on at once."""

    name: str
    queues: list[str]
    threads: int


def plans_for(hypervisors: Iterable[str], *, control: bool, threads: int = THREADS) -> list[Plan]:
    """A consumer for control and hosts, and one of its own for rescue: a thaw never waits behind a transfer."""
    names = list(hypervisors)
    main = [CONTROL] * control + [host_queue(name) for name in names]
    plans = [Plan("main", main, threads)]
    return [*plans, Plan("rescue", [rescue_queue(name) for name in names], 1)] if names else plans


def _same(app: Celery) -> Celery:
    """Another app with the same settings, queues and tasks."""
    twin = _configured(app.main, app.conf.broker_url or "memory://", app.conf.result_backend)
    twin.tasks.update({name: task for name, task in app.tasks.items() if not name.startswith("celery.")})
    return twin


RESTART_SECONDS = 1.0


class ThreadWorkers:
    """Consumers inside this process, on threads. Use as a context manager."""

    def __init__(self, app: Celery, plans: Iterable[Plan]) -> None:
        self._app = app
        self._plans = [Plan(one.name, [_queue(app, name) for name in one.queues], one.threads) for one in plans]
        app.task(_nothing, name=_WAKE, shared=False)
        self._threads: list[threading.Thread] = []
        self._over = threading.Event()
        self._default_timeout = socket.getdefaulttimeout()

    def __enter__(self) -> ThreadWorkers:
        for name in ("celery", "kombu", "celery.worker"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        for plan in self._plans:
            ready = threading.Event()
            arguments = (plan, ready)
            thread = threading.Thread(target=self._consume, args=arguments, name=f"worker-{plan.name}", daemon=True)
            thread.start()
            self._threads.append(thread)
            ready.wait(10)
        return self

    def _consume(self, plan: Plan, ready: threading.Event) -> None:
        """A consumer, and another one whenever it ends by itself: a connection that is lost in the wrong moment ends it
        with an error of the client library (seen with redis-py), and nobody would take its queues any more."""
        while True:
            self._worker(plan, ready).start()
            if self._over.wait(0 if self._over.is_set() else RESTART_SECONDS):
                return
            log.warning("the consumer of %s ended by itself: it begins anew", ", ".join(plan.queues))

    def _worker(self, plan: Plan, ready: threading.Event) -> Any:
        from concurrent.futures import ThreadPoolExecutor

        from celery.concurrency.thread import TaskPool

        # Which queues a consumer takes is kept on the app, and read again at each new connection: one that it shared
        # would have the consumer take the queues of another one when Redis is back.
        app = _same(self._app)

        class Pool(TaskPool):  # type: ignore[misc]
            # Celery looks a task up in the current app of the thread that runs it. Without this, that is the default
            # app of the process, which knows but the first worker's tasks, and through them a context long closed.
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                self.executor = ThreadPoolExecutor(max_workers=self.limit, initializer=app.set_current)

        class Worker(app.WorkController):  # type: ignore[misc, name-defined]
            def on_consumer_ready(self, consumer: object) -> None:  # noqa: ARG002 - Celery's own signature
                ready.set()

        return Worker(
            app=app,
            hostname=f"{plan.name}@{socket.gethostname()}",
            pool_cls=Pool,
            concurrency=plan.threads,
            queues=plan.queues,
            without_heartbeat=True,
            without_mingle=True,
            without_gossip=True,
            loglevel="CRITICAL",
        )

    def take_no_more(self) -> None:
        """Begin nothing from now on; what has begun goes on."""
        from celery.worker import state

        self._over.set()
        state.should_stop = 0  # the consumers' loops look at it; zero is the exit code
        for plan in self._plans:
            for _ in range(2):  # the loop that wakes up, and the one more that it makes before it ends: 2 s each else
                with suppress(*_unreachable()):
                    self._app.send_task(_WAKE, queue=plan.queues[0], retry=False, ignore_result=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from celery.worker import state

        self.take_no_more()
        for thread in self._threads:
            thread.join(10)
        state.should_stop = None
        # Celery changes it while it closes a connection, and puts back what it found: of two that close at once, the
        # second one finds what the first one has changed.
        socket.setdefaulttimeout(self._default_timeout)
