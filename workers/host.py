"""A worker of the distributed form: performs commands for some hypervisors, and shows that it lives.

It knows the broker, its hypervisors, the vaults and their keys, and nothing else: no database, no policy. Started
beside a hypervisor, or on it.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Self

from workers.app import THREADS, ThreadWorkers, plans_for, post_beat
from workers.context import Context
from workers.contract.messages import BEAT_SECONDS, Beat, Running
from workers.tasks import Tasks

if TYPE_CHECKING:
    from celery import Celery

log = logging.getLogger(__name__)

YIELD_SECONDS = 10.0
"""For how long transfers that are ended with the worker have time to say so."""


class HostWorker:
    """Use as a context manager: it works as long as it is open."""

    def __init__(
        self,
        app: Celery,
        context: Context,
        hypervisors: Sequence[str],
        *,
        beat_seconds: float = BEAT_SECONDS,
        tasks: Callable[[Celery, Context], Tasks] = Tasks,
    ) -> None:
        self._app = app
        self._hypervisors = list(hypervisors)
        self._beat_seconds = beat_seconds
        self._started = datetime.now(UTC).isoformat()
        self.name = f"{'+'.join(hypervisors)}@{socket.gethostname()}.{secrets.token_hex(2)}"
        self._desk = tasks(app, context).desk
        self._workers = ThreadWorkers(app, plans_for(hypervisors, control=False))
        self._ending = False
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._beat_on, name="beats", daemon=True)

    def __enter__(self) -> Self:
        self._workers.__enter__()
        self._beats.start()
        return self

    def _beat_on(self) -> None:
        heard = True
        while True:
            before, heard = heard, post_beat(self._app, self.beat())
            if before and not heard:
                log.warning("the broker does not answer: nothing is heard of this worker; it goes on trying")
            elif heard and not before:
                log.info("the broker answers again")
            if self._over.wait(self._beat_seconds):
                return

    def beat(self) -> Beat:
        running = self._desk.running()
        return Beat(
            worker=self.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=self._started,
            hypervisors=self._hypervisors,
            running=running,
            free=max(0, THREADS - len(running)),
            ending=self._ending,
        )

    def finish(self, grace: float) -> list[Running]:
        """Take no more commands, finish what is being performed, at most for `grace` seconds; then transfers end
        themselves and say so. What is still performed after that: nobody waits for it."""
        self._ending = True
        post_beat(self._app, self.beat())
        self._workers.take_no_more()
        if not self._desk.wait_until_idle(grace):
            self._desk.ending = True
            self._desk.wait_until_idle(YIELD_SECONDS)
        return self._desk.running()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._workers.__exit__(kind, error, trace)
        self._beats.join(5)
