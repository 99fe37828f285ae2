"""Consumers go on, and leave a process as they found it."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

from workers import app as celery
from workers.app import Plan, ThreadWorkers, make_app


class Short:
    def start(self) -> None:
        """Ends at once, as one whose connection was lost in the wrong moment."""


class FirstEnds(ThreadWorkers):
    made = 0

    def _worker(self, plan: Plan, ready: threading.Event) -> Any:
        self.made += 1
        return Short() if self.made == 1 else super()._worker(plan, ready)


def test_a_consumer_that_ends_by_itself_begins_anew(tmp_path: Path) -> None:
    app = make_app(backend_url=f"file://{tmp_path}")
    done = threading.Event()
    app.task(done.set, name="test.done", shared=False)
    plans = [Plan("main", ["control"], 1)]
    with FirstEnds(app, plans) as workers:
        app.send_task("test.done", queue=celery._queue(app, "control"))
        assert done.wait(20)
        assert workers.made == 2


def test_the_time_limit_of_sockets_is_what_it_was(tmp_path: Path) -> None:
    for number in range(5):
        app = make_app(backend_url=f"file://{tmp_path}/{number}")
        with ThreadWorkers(app, [Plan(f"p{n}", [f"q{n}"], 1) for n in range(4)]):
            pass
        assert socket.getdefaulttimeout() is None
