"""The life of points as the catalog sees it: deleted and taken back, pinned, expired by policies, gone for good."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from orchestrator.catalog.fleet import newest_points
from orchestrator.catalog.points import mark_damaged, newest_base, put_point, see_machine
from orchestrator.catalog.schema import PointRow
from orchestrator.catalog.store import Catalog
from orchestrator.config import Config, parse_config
from orchestrator.point_desk import PointDesk
from orchestrator.service import Service
from orchestrator.views import ExpiryView
from tests.controller.scripted import add_backup
from tests.controller.test_service import DB, made
from tests.jobs.world import MACHINE
from workers.contract.errors import Busy, Locked, NotFound, UsageError, WrongClock
from workers.contract.machines import MachineRef
from workers.contract.points import Point
from workers.vault import Vault, trash

DAY = timedelta(days=1)
LATELY = datetime(2026, 6, 15, 10, tzinfo=UTC)
"""In the middle of a month and a year, so that days before it are in the same."""
PLAIN = """
    [policies.gold]
    timezone = "Europe/Berlin"
    retention = { daily = 2 }
    [protect.web]
    machines = ["web*"]
    policy = "gold"
"""


def configuration(folder: Path, more: str = PLAIN) -> Config:
    text = f"""
        [vaults.main]
        url = "file://{folder}/vault"
        key_file = "{folder}/main.key"
        [hypervisors.lab]
        uri = "qemu:///system?socket=/nowhere/libvirt-sock"
        [paths]
        state = "{folder}/state"
        runtime = "{folder}/run"
        cache = "{folder}/cache"
        {more}
    """
    return parse_config(text, folder / "stillframe.toml")


class Lab:
    """A service with a vault; points are put there without a machine."""

    def __init__(self, service: Service, catalog: Catalog) -> None:
        self.service = service
        self.catalog = catalog
        service.init_vault("main")
        self.vault: Vault = service._desk.open("main")

    @property
    def desk(self) -> PointDesk:
        return self.service.point_desk

    def has(self, *points: Point) -> None:
        for point in points:
            self.vault.commit(point)
            with self.catalog.write() as session:
                put_point(session, "main", point)
                see_machine(session, point.machine)

    def row(self, point: str) -> PointRow | None:
        with self.catalog.read() as session:
            return session.get(PointRow, point)

    def base(self) -> str | None:
        with self.catalog.read() as session:
            base = newest_base(session, MACHINE.uuid, "main")
        return base.id[:2] if base else None

    def listed(self, **which: bool) -> list[str]:
        return [point.id[:2] for point in self.desk.points(**which)]

    def past(self, point: str, days: int = 1) -> None:
        """Delete it by hand, so that its time has been over for some days."""
        then = datetime.now(UTC) - days * DAY
        trash.delete(self.vault, point, now=then, until=then, by="us", reason="")


@pytest.fixture
def open_lab(tmp_path: Path) -> Iterator[Callable[[str], Lab]]:
    """Open with what else is configured."""
    labs: list[Lab] = []

    def make(more: str = PLAIN) -> Lab:
        config = configuration(tmp_path, more)
        labs.append(Lab(Service.open(config), Catalog.open(config.catalog_url)))
        return labs[-1]

    yield make
    for lab in labs:
        lab.service.close()
        lab.catalog.close()


@pytest.fixture
def lab(open_lab: Callable[[str], Lab]) -> Lab:
    return open_lab(PLAIN)


def aged(number: int, days: float, machine: MachineRef = MACHINE, **changes: object) -> Point:
    """Point `number`, made so many days before `LATELY`, with a checkpoint of its own."""
    point = made(number, machine)
    disks = [disk.model_copy(update={"checkpoint": f"sf-{number}"}) for disk in point.disks]
    return point.model_copy(update={"time": LATELY - days * DAY, "disks": disks, **changes})


# --- deleting ------------------------------------------------------------------------------------------------------


def test_a_deleted_point_is_out_of_sight_and_comes_back(lab: Lab) -> None:
    lab.has(aged(1, 3), aged(2, 2))
    deleted = lab.desk.delete("web@latest", reason="a mistake")
    assert deleted.deleted_until is not None
    assert timedelta(days=13.9) < deleted.deleted_until - datetime.now(UTC) < timedelta(days=14.1)
    assert (lab.listed(), lab.listed(live=False, deleted=True), lab.listed(deleted=True)) == (
        ["01"],
        ["02"],
        ["01", "02"],
    )
    assert lab.desk.point("web@latest").id[:2] == "01"
    assert lab.desk.point("02").deleted_reason == "a mistake"
    with lab.catalog.read() as session:
        assert newest_points(session)[MACHINE.uuid].id[:2] == "01"
    assert lab.desk.undelete("02").deleted_until is None
    assert lab.desk.undelete("02").note == "it was not deleted"
    assert lab.listed() == ["01", "02"]


def test_a_machine_whose_points_are_all_deleted(lab: Lab) -> None:
    lab.has(aged(1, 1))
    lab.desk.delete("01")
    for ref in ("web@latest", "web@2030-01-01"):
        with pytest.raises(NotFound) as caught:
            lab.desk.point(ref)
        assert caught.value.hint == "stillframe point list web --deleted"


def test_a_deleted_base_keeps_its_checkpoint_until_it_is_gone(lab: Lab) -> None:
    """Invariants 1 and 2: while it can come back, the next backup goes on from it."""
    lab.has(aged(1, 3), aged(2, 2))
    assert lab.desk.delete("02").note == ""
    assert lab.base() == "02"
    assert lab.desk.finish_deletions("main") == ([], [])
    lab.desk.undelete("02")
    lab.past("02" * 16)
    [removal], [note] = lab.desk.finish_deletions("main")
    assert removal == trash.Removal(point="02" * 16)
    assert note.startswith("the next backup of web will be full: it was the base; its checkpoint sf-2 stays on lab")
    assert lab.base() == "01"
    assert lab.row("02" * 16) is None


def test_a_point_that_is_no_base_goes_without_a_word(lab: Lab) -> None:
    lab.has(aged(1, 3), aged(2, 2))
    lab.past("01" * 16)
    removals, notes = lab.desk.finish_deletions("main")
    assert (len(removals), notes) == (1, [])


def test_a_point_that_somebody_reads_keeps_its_row(lab: Lab) -> None:
    """So that a backup that takes it for its base finds out by itself, and drops its checkpoint."""
    lab.has(aged(1, 1))
    lab.vault.announce("job", reads=["01" * 16])
    lab.past("01" * 16)
    [removal], notes = lab.desk.finish_deletions("main")
    assert removal.waits
    assert notes == []
    assert lab.base() == "01"
    assert not lab.vault.readable("01" * 16)
    assert lab.service.rebuild_catalog() == 1
    assert lab.listed() == []
    assert lab.desk.point("01").deleted_reason == "gone for good"
    with pytest.raises(NotFound, match="gone for good"):
        lab.desk.undelete("01")


def test_at_once(lab: Lab) -> None:
    lab.has(aged(1, 2), aged(2, 1))
    assert lab.desk.delete("01", days=0).note == ""
    assert lab.desk.delete("02", days=0).note.startswith("the next backup of web will be full: it was the base")
    assert lab.listed(deleted=True) == []
    assert lab.service.rebuild_catalog() == 0


def test_what_a_job_reads_does_not_go_at_once(lab: Lab) -> None:
    lab.has(aged(1, 1))
    add_backup(lab.catalog, "one")
    with pytest.raises(Busy) as caught:
        lab.desk.delete("01", days=0)
    assert caught.value.hint == "stillframe job watch one"
    assert lab.listed() == ["01"]
    assert lab.desk.delete("01").deleted_until


def test_only_telling_changes_nothing_and_tells_of_pins_and_locks(lab: Lab) -> None:
    lab.has(aged(1, 2), aged(2, 1, locked_until=datetime.now(UTC) + 30 * DAY))
    assert lab.desk.delete("01", dry_run=True).deleted_until is None
    lab.desk.pin("01", "audit")
    with pytest.raises(Locked, match="pinned: audit"):
        lab.desk.delete("01", dry_run=True)
    with pytest.raises(Locked, match="locked until"):
        lab.desk.delete("02", days=0, dry_run=True)
    assert trash.standing(lab.vault.store) == {}


def test_a_locked_point_stays_until_its_lock_ends(lab: Lab) -> None:
    until = datetime.now(UTC) + 30 * DAY
    lab.has(aged(1, 1, locked_until=until))
    assert lab.desk.point("01").locked_until == until
    assert lab.desk.delete("01").deleted_until == until
    with pytest.raises(Locked):
        lab.desk.delete("01", days=0)


def test_a_pin_brings_back_and_holds(lab: Lab) -> None:
    lab.has(aged(1, 1))
    lab.desk.delete("01")
    assert lab.desk.pin("01").pinned == "pinned"
    assert lab.desk.point("01").deleted_until is None
    with pytest.raises(Locked):
        lab.desk.delete("01")
    assert lab.desk.unpin("01").pinned == ""
    assert lab.desk.unpin("01").note == "it was not pinned"


def test_what_is_known_of_a_point_is_read_back_from_the_vault(lab: Lab, tmp_path: Path) -> None:
    lab.has(aged(1, 4), aged(2, 3), aged(3, 2, locked_until=datetime.now(UTC) + DAY))
    lab.desk.delete("01", reason="a test")
    lab.desk.pin("02", "audit")
    before = lab.desk.points(deleted=True)
    with lab.catalog.write() as session:
        put_point(session, "main", lab.vault.point("01" * 16))
    assert lab.desk.points(deleted=True) == before, "registering again changes nothing"
    with Catalog.open(f"sqlite:///{tmp_path}/other.db") as catalog:
        service = Service(configuration(tmp_path), catalog)
        assert service.rebuild_catalog() == 3
        assert service.point_desk.points(deleted=True) == before
        service.point_desk.undelete("01")
        service.point_desk.unpin("02")
        service.close()
    lab.service.rebuild_catalog()
    assert lab.listed() == ["01", "02", "03"]
    assert lab.desk.point("02").pinned == ""


# --- clocks --------------------------------------------------------------------------------------------------------


def test_a_clock_that_was_set_back_deletes_nothing(lab: Lab) -> None:
    """Seen from there, the points were made in a year's time."""
    lab.has(aged(1, 1, time=datetime.now(UTC) + 365 * DAY), aged(2, 1))
    with pytest.raises(WrongClock):
        lab.desk.delete("01")
    lab.past("02" * 16)
    with pytest.raises(WrongClock, match="no deletion becomes final"):
        lab.desk.finish_deletions("main")
    assert lab.desk.undelete("02").note == ""
    lab.past("02" * 16)
    assert len(lab.desk.finish_deletions("main", trust_clock=True)[0]) == 1


# --- policies ------------------------------------------------------------------------------------------------------


def kept(views: list[ExpiryView]) -> dict[str, bool]:
    return {view.point[:2]: view.keep for view in views}


def test_expiry_deletes_what_no_rule_keeps(lab: Lab) -> None:
    lab.has(aged(1, 4), aged(2, 3), aged(3, 2), aged(4, 1), aged(5, 9, DB))
    told = lab.desk.expire(dry_run=True)
    assert kept(told) == {"01": False, "02": False, "03": True, "04": True, "05": True}
    reasons = {view.point[:2]: view.reasons for view in told}
    assert reasons["01"] == ["no rule keeps it"]
    assert reasons["04"][0].startswith("daily: the newest of ")
    assert reasons["05"] == ["no policy is for it in this vault"]
    assert lab.listed() == ["05", "01", "02", "03", "04"], "only told"
    assert kept(lab.desk.expire()) == kept(told)
    assert lab.listed() == ["05", "03", "04"]
    assert lab.desk.point("01").deleted_reason == "policy gold: no rule keeps it"
    assert kept(lab.desk.expire()) == {"03": True, "04": True, "05": True}
    assert lab.desk.undelete("01").deleted_until is None


def test_pins_and_damage_count_in_expiry(lab: Lab) -> None:
    """The pin by another controller, whose catalog is not ours."""
    lab.has(aged(1, 4), aged(2, 3), aged(3, 2), aged(4, 1))
    trash.pin(lab.vault, "01" * 16, now=datetime.now(UTC), by="another", reason="audit")
    with lab.catalog.write() as session:
        mark_damaged(session, "04" * 16, "a block is corrupt")
    assert kept(lab.desk.expire()) == {"01": True, "02": True, "03": True, "04": True}
    assert lab.desk.point("01").pinned == "audit"


def test_a_row_without_a_manifest_takes_no_points_place(lab: Lab) -> None:
    lab.has(aged(1, 3), aged(2, 2))
    for number in (3, 4):
        with lab.catalog.write() as session:
            put_point(session, "main", aged(number, 1))
    assert kept(lab.desk.expire()) == {"01": True, "02": True}


def test_a_machine_is_covered_by_the_name_that_it_has_now(lab: Lab) -> None:
    renamed = MACHINE.model_copy(update={"name": "archive"})
    lab.has(aged(1, 4), aged(2, 3), aged(3, 2), aged(4, 1, renamed))
    assert all(kept(lab.desk.expire()).values())


def test_several_policies_keep_what_one_of_them_keeps(open_lab: Callable[[str], Lab]) -> None:
    lab = open_lab(
        PLAIN
        + """
        [policies.long]
        retention = { yearly = 9 }
        [policies.silent]
        [protect.more]
        machines = ["*"]
        exclude = ["db"]
        policy = "long"
        [protect.db]
        machines = ["db"]
        policy = "silent"
        """
    )
    lab.has(aged(1, 800), aged(2, 3.01), aged(3, 3), aged(4, 2), aged(5, 1), aged(6, 9, DB), aged(7, 8, DB))
    views = lab.desk.expire(dry_run=True)
    assert kept(views) == {"01": True, "02": False, "03": False, "04": True, "05": True, "06": True, "07": True}
    reasons = {view.point[:2]: view.reasons for view in views}
    assert reasons["01"][0].startswith("long: yearly: the newest of ")
    assert reasons["06"] == ["policy silent has no retention"]


def test_only_the_vault_that_a_section_backs_up_into_is_expired(open_lab: Callable[[str], Lab], tmp_path: Path) -> None:
    other = f"""
        [vaults.second]
        url = "file://{tmp_path}/second"
        key_file = "{tmp_path}/main.key"
        [vaults.away]
        url = "file://{tmp_path}/away"
        key_file = "{tmp_path}/main.key"
        replica_of = "main"
        [backup]
        vault = "second"
    """
    lab = open_lab(PLAIN + other)
    lab.service.init_vault("second")
    lab.has(aged(1, 4), aged(2, 3), aged(3, 2))
    assert all(kept(lab.desk.expire()).values()), "the section's backups go into the other one"
    assert lab.desk.expire("away") == [], "a replica that is not even there"
    with pytest.raises(UsageError):
        lab.desk.expire("none")


def test_points_of_a_replica_are_not_changed_by_people(open_lab: Callable[[str], Lab], tmp_path: Path) -> None:
    """Its original would bring them back, or take them away."""
    lab = open_lab(PLAIN)
    lab.has(aged(1, 1))
    config = configuration(tmp_path)
    original = config.worker.vaults["main"]
    vaults = {"main": original.model_copy(update={"replica_of": "original"}), "original": original}
    worker = config.worker.model_copy(update={"vaults": vaults})
    lab.desk.use(config.model_copy(update={"worker": worker}))
    for act in (lab.desk.delete, lab.desk.undelete, lab.desk.pin, lab.desk.unpin):
        with pytest.raises(UsageError, match="vault main is a replica of original"):
            act("01")
    assert lab.listed() == ["01"]
