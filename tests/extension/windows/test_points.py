"""Points of a Windows guest: what VSS and its writers did decides what they are worth. Quick, without a hypervisor; the
freeze governor, the driver and the verdict are real.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.extension.windows.conftest import package
from tests.guests.fake_windows import FakeWindowsAgent
from tests.guests.fake_windows_system import DISABLED, VSS_KEY
from workers.contract.guests import GuestOs
from workers.contract.points import Consistency
from workers.contract.seams import QuiesceRequest
from workers.guests import vss
from workers.guests.agent import AgentChannel
from workers.guests.windows import HOLD_SECONDS, WindowsExtension
from workers.quiesce import Guest, Held, Notes, make_point

UUID = "7c4b3c5e-0001-4000-8000-000000000001"


class Point:
    """`held(...)`: one point; what was seen of the guest at the moment of it is in `holding`."""

    def __init__(self, agent: FakeWindowsAgent, channel: AgentChannel, folder: Path) -> None:
        self.agent, self.channel, self.folder = agent, channel, folder
        self.holding: list[bool] = []
        self.seconds = 0.0

    def _make(self) -> None:
        time.sleep(self.seconds)  # how long the hypervisor takes
        self.holding.append(self.agent.windows.vss.holding)

    def held(self, *, seconds: float = HOLD_SECONDS, extension: bool = True, **options: str) -> Held:
        assert self.channel.info().os is GuestOs.WINDOWS
        guest = Guest(
            freezer=self.channel,
            extension=WindowsExtension(self.channel) if extension else None,
            os=GuestOs.WINDOWS,
            point_seconds=seconds,
            failed_writers=vss.failed_writers,
        )
        notes = Notes(self.folder / "frozen", self.folder / "held")
        request = QuiesceRequest("job1", UUID, Consistency.APPLICATION, 90, 120, options=options)
        found = make_point(guest, request, self._make, notes)
        assert not notes.frozen.exists()
        assert not self.channel.frozen()
        assert self.agent.windows.vss.held == 0
        return found


@pytest.fixture
def point(agent: FakeWindowsAgent, channel: AgentChannel, extension: WindowsExtension, tmp_path: Path) -> Point:
    extension.install(package(), UUID)
    return Point(agent, channel, tmp_path)


def test_all_writers_are_well(point: Point, agent: FakeWindowsAgent) -> None:
    found = point.held()
    assert found.verdict.consistency is Consistency.APPLICATION, found
    assert "VSS" in found.verdict.reason
    assert point.holding == [True]
    assert agent.windows.vss.kinds == [5]
    assert ["VssOption" in words for words in found.report.warnings] == [True]
    assert point.held(vss="primary").verdict.consistency is Consistency.APPLICATION
    assert agent.windows.vss.kinds == [5, 1]


def test_a_writer_that_failed(point: Point, agent: FakeWindowsAgent) -> None:
    agent.windows.vss.failing["SqlServerWriter"] = (8, "Non-retryable error")
    found = point.held()
    assert found.verdict.consistency is Consistency.FILESYSTEM
    assert "SqlServerWriter" in found.verdict.reason


def test_without_the_extension_nobody_asks_the_writers(point: Point) -> None:
    found = point.held(extension=False)
    assert found.verdict.consistency is Consistency.FILESYSTEM
    assert point.holding == [True]


def test_windows_let_go_before_the_point(point: Point, agent: FakeWindowsAgent) -> None:
    agent.windows.vss.hold_seconds, point.seconds = 0.05, 0.3
    found = point.held()
    assert point.holding == [False]
    assert found.verdict.consistency is Consistency.CRASH
    assert "limited up to 10 seconds" in found.verdict.reason


def test_a_point_later_than_the_host_allows(point: Point) -> None:
    """The host's own limit is the shorter one: it does not wait for Windows."""
    point.seconds = 0.6
    found = point.held(seconds=0.2)
    assert found.verdict.consistency is Consistency.CRASH
    assert "0.2 s" in found.verdict.reason or "after the freeze" in found.verdict.reason


def test_vss_is_disabled(point: Point, agent: FakeWindowsAgent) -> None:
    """It is not even tried."""
    agent.windows.registry[VSS_KEY]["Start"] = DISABLED
    found = point.held()
    assert found.verdict.consistency is Consistency.CRASH
    assert "disabled" in found.verdict.reason
    assert "guest-fsfreeze-freeze" not in agent.seen


def test_the_reply_of_the_freeze_is_lost(point: Point, agent: FakeWindowsAgent) -> None:
    agent.trouble.lost_replies.append("guest-fsfreeze-freeze")
    found = point.held()
    assert found.verdict.consistency is Consistency.CRASH
    assert "could not be frozen" in found.verdict.reason


def test_the_reply_of_the_thaw_is_lost(point: Point, agent: FakeWindowsAgent) -> None:
    agent.trouble.lost_replies.append("guest-fsfreeze-thaw")
    found = point.held()
    assert found.verdict.consistency is Consistency.CRASH, "how many were thawed is not known"
