"""A cap on the bytes per second that a worker reads from a hypervisor and writes to it: backups share the wire with
whatever else the host is for.

One bucket for all transfers of a hypervisor, and a thin wrapper around their sources and targets. A piece is paid for
before it is asked for; the bucket may go into debt for one, which who comes next waits off, so that large pieces pass
however small the cap is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from threading import Lock

from workers.contract.extents import Extent
from workers.contract.seams import BlockSource, BlockTarget

BURST_SECONDS = 0.25
"""How much of what was not used is kept."""


class Bucket:
    """Thread-safe. `rate` in bytes per second."""

    def __init__(
        self,
        rate: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        self.rate = rate
        self._clock, self._wait = clock, wait
        self._lock = Lock()
        self._held = 0.0
        self._since = clock()

    def take(self, count: int) -> None:
        """Return when `count` bytes may pass."""
        with self._lock:
            now = self._clock()
            self._held = min(self._held + (now - self._since) * self.rate, BURST_SECONDS * self.rate)
            self._since = now
            debt = -self._held
            self._held -= count
        if debt > 0:
            self._wait(debt / self.rate)


class PacedSource:
    """A `BlockSource` that reads no faster than its bucket fills."""

    def __init__(self, source: BlockSource, bucket: Bucket) -> None:
        self._source, self._bucket = source, bucket
        self.size = source.size

    def extents(self, *, trust_changes: bool = True) -> Iterator[Extent]:
        return self._source.extents(trust_changes=trust_changes)

    def read(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
        return self._source.read(self._paid(ranges))

    def _paid(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        for offset, length in ranges:
            self._bucket.take(length)
            yield offset, length

    def close(self) -> None:
        self._source.close()


class PacedTarget:
    """A `BlockTarget` that is written no faster than its bucket fills."""

    def __init__(self, target: BlockTarget, bucket: Bucket) -> None:
        self._target, self._bucket = target, bucket
        self.size = target.size

    def write(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        self._target.write(self._paid(pieces))

    def _paid(self, pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        for offset, data in pieces:
            self._bucket.take(len(data))
            yield offset, data

    def close(self) -> None:
        self._target.close()


def paced_source(source: BlockSource, bucket: Bucket | None) -> BlockSource:
    """`source` itself where there is no cap."""
    return source if bucket is None else PacedSource(source, bucket)
