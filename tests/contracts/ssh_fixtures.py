"""Fixtures around a real sshd (see sshd.py): `pytest_plugins = ["tests.contracts.ssh_fixtures"]`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contracts.sshd import UUID, OpenSsh, SshGuest, Wire
from workers.guests.host_keys import HostKeyPolicy, PinnedKey
from workers.guests.ssh import SshChannel


@pytest.fixture(scope="module", params=["dash", "busybox"])
def ssh_guest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshGuest]:
    made = SshGuest(tmp_path_factory.mktemp("sshd"), request.param)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def other_guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshGuest]:
    """Another server, with other keys."""
    made = SshGuest(tmp_path_factory.mktemp("other"), host_kind="rsa")
    yield made
    made.stop()


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    return tmp_path / "state" / "guest_host_keys"


@pytest.fixture
def open_ssh(ssh_guest: SshGuest, pins: Path) -> Iterator[OpenSsh]:
    """`open_ssh(ssh_guest, port=…, user=…, key=…, host_key=…)`; all are closed, and the guest thawed, afterwards."""
    opened: list[SshChannel] = []

    def make(
        to: SshGuest = ssh_guest,
        *,
        port: int | None = None,
        user: str = "root",
        key: Path | bytes | None = None,
        host_key: HostKeyPolicy | None = None,
        seconds: float = 30.0,
        freeze_seconds: float = 30.0,
    ) -> SshChannel:
        policy = host_key if host_key is not None else PinnedKey(pins, UUID)
        channel = SshChannel(
            address="127.0.0.1",
            port=port or to.port,
            user=user,
            key=key or to.key,
            host_key=policy,
            connect_seconds=seconds,
            freeze_seconds=freeze_seconds,
        )
        opened.append(channel)
        return channel

    try:
        yield make
    finally:
        for channel in opened:
            channel.close()


@pytest.fixture
def ssh(open_ssh: OpenSsh) -> SshChannel:
    return open_ssh()


@pytest.fixture
def wire(ssh_guest: SshGuest) -> Iterator[Wire]:
    made = Wire(ssh_guest.port)
    yield made
    made.close()
