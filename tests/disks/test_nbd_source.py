"""A reader that fails leaves no connection behind, even while its error is being looked at.

QEMU waits in nbd-server-stop, with the guest, for as long as a client leaves a reply in the socket; so how a transfer
ends decides whether the guest goes on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.disks.images import create, export_readonly, stop_exports
from workers.disks.nbd_source import NbdSource
from workers.hosts.local import LOCAL

MIB = 1 << 20


@pytest.fixture
def source(tmp_path: Path) -> Iterator[NbdSource]:
    image = tmp_path / "disk.qcow2"
    create(LOCAL, image, "qcow2", 16 * MIB)
    export_readonly(LOCAL, image, "qcow2", tmp_path / "s", bitmap=None)
    try:
        yield NbdSource(tmp_path / "s", "")
    finally:
        stop_exports(LOCAL, tmp_path)


def accepted(socket: Path) -> int:
    """Connections that the server at `socket` has; the kernel names both it and them after its path."""
    names = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()]
    return names.count(str(socket)) - 1


def require_alone(socket: Path) -> None:
    deadline = time.monotonic() + 10
    while accepted(socket) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert accepted(socket) == 0


def test_work_that_fails_while_reads_are_in_flight_ends_the_connection(source: NbdSource, tmp_path: Path) -> None:
    def work() -> Iterator[tuple[int, int]]:
        yield 0, MIB
        yield MIB, MIB
        assert accepted(tmp_path / "s") == 1
        raise InterruptedError("cancelled")

    with pytest.raises(InterruptedError) as caught:
        list(source.read(work()))
    require_alone(tmp_path / "s")
    assert caught.tb is not None  # what kept it open


def test_a_consumer_that_fails_ends_the_connection(source: NbdSource, tmp_path: Path) -> None:
    def consume() -> None:
        for _offset, _data in source.read(iter([(0, MIB), (MIB, MIB), (2 * MIB, MIB), (3 * MIB, MIB)])):
            assert accepted(tmp_path / "s") == 1
            raise InterruptedError("no space left in the vault")

    with pytest.raises(InterruptedError):
        consume()
    require_alone(tmp_path / "s")
