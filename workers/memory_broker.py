"""Celery's broker inside one process, with a bell: who puts a message wakes who waits for one.

kombu's own memory transport polls: every 10 ms it costs an idle service some percent of a core, every second it costs
a job seconds. Waiting on a condition costs nothing and hops in well under a millisecond.
"""

from __future__ import annotations

import threading
import time
from queue import Empty
from typing import Any

from kombu.transport import memory

TRANSPORT = "workers.memory_broker:Transport"
_LOOK_AGAIN = 1.0
"""Seconds: in case that something becomes possible without the bell."""

_bell = threading.Condition()
_rung = 0


def _ring() -> None:
    global _rung
    with _bell:
        _rung += 1
        _bell.notify_all()


def _wait(seen: int, seconds: float) -> None:
    with _bell:
        _bell.wait_for(lambda: _rung != seen, seconds)


class Channel(memory.Channel):
    """Rings whenever somebody who waits may find something to do."""

    def _put(self, queue: str, message: Any, **options: Any) -> None:
        super()._put(queue, message, **options)  # type: ignore[no-untyped-call]
        _ring()

    def basic_ack(self, delivery_tag: Any, multiple: bool = False) -> None:
        super().basic_ack(delivery_tag, multiple)  # type: ignore[no-untyped-call]
        _ring()  # a consumer at its prefetch limit may take the next one now


class Transport(memory.Transport):
    Channel = Channel

    def drain_events(self, connection: Any, timeout: float | None = None, **_options: Any) -> None:  # noqa: ARG002
        """Deliver one message. Raises TimeoutError after `timeout` seconds without one."""
        end = None if timeout is None else time.monotonic() + timeout
        cycle: Any = self.cycle
        while True:
            seen = _rung
            try:
                cycle.get(self._deliver, timeout=timeout)
            except Empty:
                left = _LOOK_AGAIN if end is None else min(_LOOK_AGAIN, end - time.monotonic())
                if left <= 0:
                    raise TimeoutError from None
                _wait(seen, left)
            else:
                return
