"""What a worker performs at this moment: told in its signs of life, waited for at its end, limited per hypervisor.

Transfers that wait for their turn (`max_transfers`) are being performed, too: their job is not lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from workers.contract.messages import Running

LOOK = 0.5
"""Seconds between looks whether a transfer that waits is still wanted."""


class WorkDesk:
    """Thread-safe."""

    def __init__(self, max_transfers: Mapping[str, int | None]) -> None:
        self._turns = {name: threading.Semaphore(limit) for name, limit in max_transfers.items() if limit is not None}
        self._change = threading.Condition()
        self._running: list[Running] = []
        self.ending = False
        """The process ends: moves end themselves."""

    @contextmanager
    def performing(self, command: Running) -> Iterator[None]:
        with self._change:
            self._running.append(command)
        try:
            yield
        finally:
            with self._change:
                self._running.remove(command)
                self._change.notify_all()

    def running(self) -> list[Running]:
        with self._change:
            return list(self._running)

    def wait_until_idle(self, seconds: float) -> bool:
        """Wait until nothing is performed; False: something still is."""
        with self._change:
            return self._change.wait_for(lambda: not self._running, seconds)

    @contextmanager
    def turn(self, hypervisor: str, look: Callable[[], None]) -> Iterator[None]:
        """Wait until one more disk of `hypervisor` may be in flight. `look` raises if it is not wanted any more."""
        turns = self._turns.get(hypervisor)
        if turns is None:
            yield
            return
        while not turns.acquire(timeout=LOOK):
            look()
        try:
            yield
        finally:
            turns.release()
