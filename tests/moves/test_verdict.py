"""What a point is worth follows from what was counted (invariant 7), and a frozen guest is always thawed.

The guest here is a model of one: a handful of file systems that are frozen or not. The real agent is held to the same
seam in `tests/contracts/`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from workers import snapshot
from workers.contract.errors import GuestError, HypervisorError
from workers.contract.machines import Power
from workers.contract.points import Consistency


class ModelGuest:
    """Three file systems. `trouble` maps a call to what goes wrong with it, once each."""

    def __init__(self, file_systems: int = 3, **trouble: str) -> None:
        self.file_systems = file_systems
        self.is_frozen = False
        self.trouble = trouble
        self.note: Path | None = None

    def _goes_wrong(self, call: str) -> str:
        return self.trouble.pop(call, "")

    def ping(self) -> bool:
        return True

    def freeze(self) -> int:
        assert self.note is not None
        assert self.note.exists(), "noted before it is done"
        wrong = self._goes_wrong("freeze")
        self.is_frozen = wrong != "refused"
        if wrong:
            raise GuestError(wrong)
        return self.file_systems

    def thaw(self) -> int:
        if self._goes_wrong("thaw"):
            raise GuestError("no reply")
        thawed = self.file_systems if self.is_frozen else 0
        self.is_frozen = "stuck" in self.trouble and self.is_frozen
        return thawed

    def frozen(self) -> bool:
        return self.is_frozen


class ModelPoint:
    """The one call to the hypervisor; notes whether the guest was frozen then."""

    def __init__(self, guest: ModelGuest, meanwhile: Callable[[ModelGuest], None] = lambda _guest: None) -> None:
        self._guest = guest
        self._meanwhile = meanwhile
        self.made_frozen: bool | None = None

    def make(self) -> None:
        self.made_frozen = self._guest.is_frozen
        self._meanwhile(self._guest)


def verdict(
    guest: ModelGuest, point: ModelPoint, goal: Consistency = Consistency.FILESYSTEM, power: Power = Power.RUNNING
) -> snapshot.Quiesced:
    with TemporaryDirectory() as folder:
        note = Path(folder) / "frozen"
        guest.note = note
        try:
            return snapshot._quiesced(point, guest, power, goal, note)  # type: ignore[arg-type]  # the model of a point
        finally:
            assert note.exists() is guest.is_frozen, "the note goes with the confirmed thaw"


def test_counted_on_both_sides_is_filesystem() -> None:
    guest = ModelGuest()
    point = ModelPoint(guest)
    got = verdict(guest, point)
    assert (got.consistency, point.made_frozen, guest.is_frozen) == (Consistency.FILESYSTEM, True, False)
    assert got.frozen_ms is not None


def test_application_was_asked_for_but_is_not_what_was_measured() -> None:
    guest = ModelGuest()
    assert verdict(guest, ModelPoint(guest), Consistency.APPLICATION).consistency is Consistency.FILESYSTEM


def test_a_freeze_that_somebody_broke_is_crash() -> None:
    guest = ModelGuest()
    got = verdict(guest, ModelPoint(guest, lambda it: setattr(it, "is_frozen", False)))
    assert got.consistency is Consistency.CRASH
    assert "3 file systems frozen, 0 thawed" in got.reason


def test_a_guest_without_file_systems_is_crash() -> None:
    guest = ModelGuest(file_systems=0)
    assert verdict(guest, ModelPoint(guest)).consistency is Consistency.CRASH


@pytest.mark.parametrize("trouble", ["refused", "timed out, but it landed"])
def test_a_freeze_that_fails_is_crash_and_thawed(trouble: str) -> None:
    guest = ModelGuest(freeze=trouble)
    point = ModelPoint(guest)
    got = verdict(guest, point)
    assert (got.consistency, point.made_frozen, guest.is_frozen) == (Consistency.CRASH, False, False)
    assert trouble in got.reason


def test_a_point_that_fails_thaws_all_the_same() -> None:
    guest = ModelGuest()

    def fail(_guest: ModelGuest) -> None:
        raise HypervisorError("no")

    with pytest.raises(HypervisorError):
        verdict(guest, ModelPoint(guest, fail))
    assert not guest.is_frozen


def test_a_lost_reply_to_the_thaw_is_asked_again() -> None:
    guest = ModelGuest(thaw="lost")
    assert verdict(guest, ModelPoint(guest)).consistency is Consistency.FILESYSTEM
    assert not guest.is_frozen


@pytest.mark.parametrize(
    ("goal", "power"), [(Consistency.CRASH, Power.RUNNING), (Consistency.FILESYSTEM, Power.PAUSED)]
)
def test_nothing_is_frozen_where_that_is_not_wanted_or_not_possible(goal: Consistency, power: Power) -> None:
    guest = ModelGuest()
    point = ModelPoint(guest)
    got = verdict(guest, point, goal, power)
    assert (got.consistency, point.made_frozen, got.frozen_ms) == (Consistency.CRASH, False, None)


def test_a_guest_that_stays_silent_after_the_freeze_keeps_its_note(tmp_path: Path) -> None:
    guest = ModelGuest(stuck="an agent that has lost its way")
    note = tmp_path / "frozen"
    note.touch()
    guest.is_frozen = True
    with pytest.raises(GuestError, match="still says that it is frozen"):
        snapshot.thaw(guest, note)
    assert note.exists()
