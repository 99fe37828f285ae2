"""The cap on a hypervisor's bytes per second, against a clock that only waiting moves."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.disks.memory import MemoryDisk
from workers.disks.pace import BURST_SECONDS, Bucket, PacedSource, PacedTarget, paced_source


@dataclass
class Clock:
    now: float = 0.0
    waits: list[float] = field(default_factory=list)

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


def bucket(rate: int, clock: Clock) -> Bucket:
    return Bucket(rate, clock=lambda: clock.now, wait=clock.wait)


@given(
    st.lists(st.tuples(st.integers(0, 1 << 22), st.floats(0, 3)), min_size=1, max_size=40),
    st.integers(1 << 10, 1 << 24),
)
def test_never_faster_than_its_rate_and_never_slower_than_it_must(steps: list[tuple[int, float]], rate: int) -> None:
    clock = Clock()
    paced = bucket(rate, clock)
    passed = 0
    for count, pause in steps:
        before = clock.now
        paced.take(count)
        assert passed <= rate * (clock.now + BURST_SECONDS) + 1, "what had passed before this piece was within the rate"
        if clock.now > before:
            assert passed > 0
        passed += count
        clock.now += pause
    assert sum(clock.waits) <= passed / rate + 1e-6


def test_an_idle_time_gives_no_more_than_a_short_burst() -> None:
    clock = Clock()
    paced = bucket(1000, clock)
    clock.now = 3600
    for _ in range(10):
        paced.take(1000)
    assert clock.now - 3600 == pytest.approx(9 - BURST_SECONDS)


def test_a_piece_larger_than_a_second_of_it_passes() -> None:
    clock = Clock()
    paced = bucket(1000, clock)
    paced.take(10_000)
    paced.take(1)
    assert clock.now == pytest.approx(10)


def test_reads_are_paced_and_are_the_same() -> None:
    clock = Clock()
    data = os.urandom(1 << 20)
    source = MemoryDisk(data)
    paced = PacedSource(source, bucket(1 << 18, clock))
    ranges = [(offset, 1 << 16) for offset in range(0, 1 << 20, 1 << 16)]
    got = {offset: bytes(piece) for offset, piece in paced.read(iter(ranges))}
    assert b"".join(got[offset] for offset, _ in ranges) == data
    assert clock.now == pytest.approx(4, abs=0.3)
    assert [*paced.extents()] == [*source.extents()]
    assert paced.size == source.size
    assert paced_source(source, None) is source


def test_writes_are_paced_and_are_the_same() -> None:
    clock, target = Clock(), MemoryDisk(bytes(4096))
    pieces = [(offset, bytes([1 + (offset >> 10)]) * 1024) for offset in range(0, 4096, 1024)]
    paced = PacedTarget(target, bucket(1024, clock))
    paced.write(iter(pieces))
    paced.close()
    assert bytes(target.content) == b"".join(data for _, data in pieces)
    assert clock.now == pytest.approx(3)


def test_threads_share_one_bucket() -> None:
    paced = Bucket(1_000_000)
    started = time.monotonic()
    threads = [threading.Thread(target=lambda: [paced.take(20_000) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started >= 0.37
