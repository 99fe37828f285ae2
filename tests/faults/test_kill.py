"""`kill -9` at every step of a backup, in the middle of its calls, and at every step of the clean-up (invariant 8).

The other walks are in `test_kill_elsewhere.py`: two processes can share them.
"""

from __future__ import annotations

import pytest

from tests.faults.steps import chosen
from tests.faults.walk import Walked, walk

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]


def test_every_step_of_an_incremental_backup(walked: Walked) -> None:
    assert walk(walked, "backup", "run", walked.guest.name, last=True) > 60
    walked.change()
    point = walked.place.backed_up(walked.guest.name)
    assert [disk["mode"] for disk in point["disks"]] == ["incremental", "incremental"]
    walked.remember()
    walked.check_points()


@pytest.mark.parametrize(
    "begun",
    [
        "agent fsfreeze-freeze",
        "virDomainBackupBegin begin_backup",
        "agent fsfreeze-thaw",
        "virDomainAbortJob end_backup",
    ],
)
def test_in_the_middle_of_a_call(walked: Walked, begun: str) -> None:
    """libvirt goes on with a call whose caller is dead: a freeze or a backup may begin after its process has ended."""
    for late in (0.002, 0.02, 0.1):
        walked.change()
        ran = walked.place.run("backup", "run", walked.guest.name, at=(f"before {begun}", 1), late=late)
        assert ran.code in (-9, 0), ran
        walked.settle((f"during {begun}, after {late} s", 1))
    walked.change()
    walked.place.backed_up(walked.guest.name)
    walked.settle((begun, 0))
    walked.check_points()


def test_every_step_of_settling_what_a_kill_has_left(walked: Walked) -> None:
    """Who cleans up can be killed as well; the next one goes on. Here it finds a frozen guest and a running backup."""
    left_at = "after virDomainBackupBegin begin_backup"
    place, record = walked.place, walked.place.folder / "settling"
    backup = ("backup", "run", walked.guest.name)
    walked.change()
    assert place.run(*backup, at=(left_at, 1)).code == -9
    record.unlink(missing_ok=True)
    assert place.run("job", "list", count=record).code == 0
    walked.settle((left_at, 1))
    steps = chosen(record.read_text().splitlines(), last=True)
    assert len(steps) > 15
    for at in steps:
        assert place.run(*backup, at=(left_at, 1)).code == -9
        assert place.run("job", "list", at=at).code in (-9, 0)
        walked.settle(at)
    walked.check_points()
