"""Packages of the Windows extension, and guests to put them into."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contracts.conftest import hypervisor, room  # noqa: F401 - fixtures
from tests.guests.agent_socket import SocketCommand
from tests.guests.fake_windows import FakeWindowsAgent
from tests.guests.fake_windows_shell import EXT
from tests.guests.windows_relay import fake_windows_guest  # noqa: F401 - a fixture
from workers.contract.guests import GuestOs
from workers.contract.seams import Package, PackageFile
from workers.guests.agent import AgentChannel
from workers.guests.windows import WindowsExtension


def package(
    version: str = "0.1.0+11111111",
    serial: int = 1000,
    content: bytes | None = None,
    *,
    os: GuestOs = GuestOs.WINDOWS,
    others: dict[str, bytes] | None = None,
) -> Package:
    """As `workers.guests.package` makes them; `content` in place of the real ext.ps1."""
    files = {"ext.ps1": EXT.read_bytes() if content is None else content, **(others or {})}
    listed = {name: PackageFile(data, hashlib.sha256(data).hexdigest(), 0o644) for name, data in files.items()}
    return Package("stillframe.snapshot", version, serial, os, 1, {}, listed)


@pytest.fixture
def kind() -> str:
    """Of hypervisor: the fake stands behind libvirt's channel."""
    return "libvirt"


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeWindowsAgent]:
    with FakeWindowsAgent(tmp_path / "ga.sock") as agent:
        yield agent


@pytest.fixture
def channel(agent: FakeWindowsAgent, tmp_path: Path) -> AgentChannel:  # noqa: ARG001 - it listens there
    return AgentChannel(SocketCommand(tmp_path / "ga.sock", longest=5.0))


@pytest.fixture
def extension(channel: AgentChannel) -> WindowsExtension:
    return WindowsExtension(channel)
