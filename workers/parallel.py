"""A few threads that share one iterator of work. No queue: memory is bounded because nobody runs ahead.

The first error ends the iterator for all, and is raised once every thread has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from threading import Lock
from typing import TypeVar

T = TypeVar("T")


class Shared(Iterator[T]):
    """`items`, to be pulled from several threads; ends early after `stop`."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._lock = Lock()
        self._stopped = False

    def __next__(self) -> T:
        with self._lock:
            if self._stopped:
                raise StopIteration
            return next(self._items)

    def stop(self) -> None:
        self._stopped = True


def share_out(items: Iterator[T], work: Callable[[Iterator[T]], None], threads: int) -> None:
    """Run `work` on `threads` threads, each pulling from the same `items`; raises the first error of any."""
    shared = Shared(items)

    def guarded() -> None:
        try:
            work(shared)
        except BaseException:
            shared.stop()
            raise

    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="transfer") as pool:
        # Each in a copy of the caller's context: what is written down there names the job, too.
        running = [pool.submit(copy_context().run, guarded) for _ in range(threads)]
    for done in running:
        done.result()
