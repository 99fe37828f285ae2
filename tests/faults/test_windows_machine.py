"""Whole backups of a machine that libvirt takes for one with Windows: only the agent in it is a stand-in."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults import world
from tests.faults.conftest import NewPlace
from tests.faults.place import Place
from tests.guests.fake_windows import FakeWindowsAgent
from tests.guests.windows_relay import FakeWindowsGuest, MakeFakeWindows, fake_windows_guest

__all__ = ["fake_windows_guest"]

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]
MIB = 1 << 20


def backup(place: Place, guest: FakeWindowsGuest, *, code: int, options: tuple[str, ...] = ()) -> dict[str, Any]:
    ran = place.run("backup", "run", guest.name, "--consistency", "application", *options)
    assert ran.code == code, ran
    return ran.line("backup")


def test_backups_of_a_windows_machine(new_place: NewPlace, fake_windows_guest: MakeFakeWindows) -> None:
    place = new_place(extension="")
    guest = fake_windows_guest(disks={"vda": 32 * MIB, "vdb": 16 * MIB})
    agent: FakeWindowsAgent = guest.agent

    first = backup(place, guest, code=0)
    assert (first["consistency"], agent.windows.vss.kinds) == ("application", [5])
    assert "VSS" in first["consistency_reason"]
    shown = place.good("vm", "show", guest.name).line("machine")
    assert shown["extension"]["os"] == "windows"

    agent.windows.vss.failing["SqlServerWriter"] = (8, "Timed out")
    failed = backup(place, guest, code=3)
    assert failed["consistency"] == "filesystem"
    assert "SqlServerWriter" in failed["consistency_reason"]
    agent.windows.vss.failing.clear()

    agent.windows.vss.hold_seconds = 0.0  # it has let go before the point is made, and says so at the thaw
    expired = backup(place, guest, code=3)
    assert expired["consistency"] == "crash"
    agent.windows.vss.hold_seconds = 10.0

    agent.trouble.lost_replies.append("guest-fsfreeze-thaw")
    assert backup(place, guest, code=3)["consistency"] == "crash"
    assert not agent.frozen

    assert backup(place, guest, code=0)["consistency"] == "application"
    assert world.strays(place, guest) == []
    assert place.good("extension", "uninstall", guest.name, "--yes").code == 0
