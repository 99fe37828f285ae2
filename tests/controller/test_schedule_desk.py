"""Schedules on a real catalog: a job and its moment in one transaction, and one job whoever else decides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlmodel import select

from orchestrator.catalog import owner
from orchestrator.catalog.alerts import standing_alerts
from orchestrator.catalog.jobs import Ticket, load_job
from orchestrator.catalog.points import put_point, see_machine
from orchestrator.catalog.schema import DutyRow, JobRow, MachineRow
from orchestrator.config import parse_config
from orchestrator.jobs.backup_job import BackupJob
from orchestrator.schedule_desk import ScheduleDesk
from orchestrator.scheduler import Run
from orchestrator.service import Service
from tests.jobs.test_backup import run_backup
from tests.jobs.world import MACHINE, World
from workers.contract.errors import Busy, NotFound, UsageError
from workers.contract.machines import MachineRef
from workers.contract.points import Consistency

DB = MachineRef(hypervisor="lab", uuid="99999999-2222-3333-4444-555555555555", name="db")
LAB = MachineRef(hypervisor="lab", uuid=MACHINE.uuid, name="web")
NIGHT = datetime(2026, 11, 24, 1, tzinfo=UTC)
TEXT = """
[paths]
state = "{folder}/state"
runtime = "{folder}/run"
[vaults.main]
url = "file://{folder}/vault"
key_file = "{folder}/main.key"
[vaults.far]
url = "file://{folder}/far"
key_file = "{folder}/far.key"
[backup]
vault = "main"
[extension]
install = false
[hypervisors.lab]
uri = "qemu:///system?socket=/nowhere/libvirt-sock"
[policies.gold]
schedule = "daily at 02:00"
timezone = "UTC"
consistency = "crash"
priority = 2
deadline = "4 hours"
[policies.plain]
timezone = "UTC"
[protect.web]
machines = ["web"]
policy = "gold"
vault = "far"
[protect.marked]
tags = ["gold"]
exclude = ["web"]
policy = "gold"
[protect.rest]
machines = ["file-*"]
policy = "plain"
"""


class Place:
    """A catalog with machines, and desks that decide by the same configuration: `begun` are told to begin."""

    def __init__(self, folder: Path) -> None:
        self.config = parse_config(TEXT.format(folder=folder), folder / "stillframe.toml")
        self.service = Service.open(self.config)
        self.catalog = self.service.catalog
        self.begun: list[str] = []
        self.desk = self.another()

    def another(self) -> ScheduleDesk:
        return ScheduleDesk(
            lambda: self.config, self.catalog, self.service._jobs, self.begun.extend, since=NIGHT - timedelta(days=9)
        )

    def sees(self, machine: MachineRef, tags: str = "", **more: object) -> None:
        with self.catalog.write() as session:
            see_machine(session, machine)
            row = session.get(MachineRow, machine.uuid)
            assert row is not None
            row.sqlmodel_update({"tags": tags, "power": "running", **more})

    def ends(self, job: str) -> None:
        with self.catalog.write() as session:
            row = session.get(JobRow, job)
            assert row is not None
            row.sqlmodel_update({"active": False, "state": "succeeded"})

    def outcomes(self) -> dict[str, str]:
        with self.catalog.read() as session:
            return {f"{row.subject[8:16]} {row.section}": row.outcome for row in session.exec(select(DutyRow))}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    with place.service:
        place.sees(LAB)
        yield place


def test_a_due_backup_becomes_a_queued_job_into_the_section_s_vault(place: Place) -> None:
    assert place.desk.tick(NIGHT) == []
    [id] = place.desk.tick(NIGHT + timedelta(hours=1))
    assert place.begun == [id]
    with place.catalog.read() as session:
        row, job = load_job(session, id)
    assert isinstance(job, BackupJob)
    assert (row.section, row.priority, row.asked_by, row.vault) == ("web", 8, "schedule", "far")
    assert (row.due, row.deadline) == (NIGHT + timedelta(hours=1), NIGHT + timedelta(hours=5))
    assert (job.goal, job.goal_asked, job.vault) == (Consistency.CRASH, True, "far")
    assert place.desk.tick(NIGHT + timedelta(hours=1, seconds=10)) == []


def test_what_still_goes_on_is_left_out_and_somebody_is_told(place: Place) -> None:
    place.desk.tick(NIGHT)
    [id] = place.desk.tick(NIGHT + timedelta(hours=1))
    assert place.desk.tick(NIGHT + timedelta(hours=25)) == []
    assert place.desk.tick(NIGHT + timedelta(hours=26)) == []
    with place.catalog.read() as session:
        [alert] = standing_alerts(session)
    assert alert.key == f"backup-overdue machine:{LAB.uuid}"
    assert alert.count == 1
    assert f"backup {id} of the moment before still goes on (queued)" in alert.text
    _, left = place.desk.agenda(NIGHT + timedelta(hours=26), "web")
    assert left[0].why == f"the one of Wed 2026-11-25 02:00 was left out: {alert.text.partition(': ')[2]}"


def test_another_job_is_waited_for_and_that_is_told_when_it_takes_too_long(place: Place) -> None:
    place.desk.tick(NIGHT)
    with place.catalog.write() as session:
        policy = place.config.policies["plain"]
        manual = place.service._jobs.queue_backup(session, LAB, "main", policy, Ticket())
    for hours in (1, 2, 6, 7):
        assert place.desk.tick(NIGHT + timedelta(hours=hours)) == []
    with place.catalog.read() as session:
        [alert] = standing_alerts(session)
    assert f"waits: backup {manual} works on it" in alert.text
    place.ends(manual)
    assert len(place.desk.tick(NIGHT + timedelta(hours=8))) == 1


def test_tags_and_hypervisors_that_are_not_configured(place: Place) -> None:
    place.sees(DB, tags="blue\ngold")
    place.sees(DB.model_copy(update={"uuid": "8" * 8, "name": "old"}), tags="gold", gone=NIGHT)
    place.sees(DB.model_copy(update={"uuid": "7" * 8, "name": "elsewhere", "hypervisor": "x"}), tags="gold")
    place.sees(DB.model_copy(update={"uuid": "6" * 8, "name": "unseen"}), tags="gold", power="")
    place.sees(DB.model_copy(update={"uuid": "5" * 8, "name": "bare"}))
    place.sees(DB.model_copy(update={"uuid": "4" * 8, "name": "file-1"}))
    place.desk.tick(NIGHT)
    assert sorted(place.outcomes()) == ["11111111 web", "44444444 rest", "99999999 marked"]
    coming, left = place.desk.agenda(NIGHT)
    assert {one.machine.name for one in coming} == {"web", "db"}
    assert {one.machine.name: one.why for one in left} == {
        "old": "it is gone since 2026-11-24 01:00 UTC",
        "elsewhere": "its hypervisor x is not configured",
        "unseen": "no hypervisor has listed it yet",
        "bare": "no [protect.*] section covers it",
        "file-1": "policy plain has no schedule",
    }
    assert place.desk.next_runs(NIGHT) == dict.fromkeys((LAB.uuid, DB.uuid), NIGHT + timedelta(hours=1))
    with pytest.raises(NotFound, match="no machine 'wbe' is known") as unknown:
        place.desk.agenda(NIGHT, "wbe")
    assert unknown.value.hint == "did you mean web?"
    place.sees(DB.model_copy(update={"uuid": "3" * 8, "name": "web"}))
    with pytest.raises(UsageError, match="several machines"):
        place.desk.agenda(NIGHT, "web")


def at_once(acts: list[Callable[[], None]]) -> None:
    barrier = threading.Barrier(len(acts))

    def do(act: Callable[[], None]) -> None:
        barrier.wait()
        act()

    threads = [threading.Thread(target=do, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_two_controllers_at_once_make_one_job_of_each_moment(place: Place) -> None:
    for number in range(20):
        place.sees(DB.model_copy(update={"uuid": f"{number:032x}", "name": f"m{number}"}), tags="gold")
    desks = [place.desk, place.another(), place.another()]
    for day in range(3):
        now, made = NIGHT + timedelta(days=day, hours=1), list[str]()
        if day == 0:
            place.desk.tick(NIGHT)
        at_once([lambda desk=desk, now=now, made=made: made.extend(desk.tick(now)) for desk in desks])  # type: ignore[misc]
        assert len(made) == len(set(made)) == 21
        for job in made:
            place.ends(job)
    with place.catalog.read() as session:
        assert len({(row.machine_uuid, row.due) for row in session.exec(select(JobRow))}) == 63


def test_a_job_that_cannot_be_made_leaves_its_moment_undecided(place: Place) -> None:
    place.desk.tick(NIGHT)
    now = NIGHT + timedelta(hours=1)
    runs = place.desk.decide(now)
    with place.catalog.write() as session:
        other = place.service._jobs.queue_backup(session, LAB, "main", place.config.policies["plain"], Ticket())
        with pytest.raises(Busy):
            place.service._jobs.queue_backup(session, LAB, "main", place.config.policies["plain"], Ticket())
    assert place.desk._make(runs) == []  # type: ignore[arg-type]
    place.ends(other)
    assert len(place.desk.tick(now)) == 1


def test_a_backup_goes_on_from_the_base_in_its_own_vault(place: Place) -> None:
    world = World()
    run_backup(world, "p")
    point = world.points["p"].model_copy(update={"machine": LAB})
    with place.catalog.write() as session:
        put_point(session, "main", point)
    place.desk.tick(NIGHT)
    [id] = place.desk.tick(NIGHT + timedelta(hours=1))
    with place.catalog.read() as session:
        _, job = load_job(session, id)
    assert isinstance(job, BackupJob)
    assert job.base is None
    assert not job.earlier
    assert owner.this_process() == place.service.engine.owner("lab")


def test_a_decision_that_is_out_of_date_makes_no_job(place: Place) -> None:
    place.desk.tick(NIGHT)
    now = NIGHT + timedelta(hours=1)
    stale = [one for one in place.another().decide(now) if isinstance(one, Run)]
    [id] = place.desk.tick(now)
    place.ends(id)
    assert place.another()._make(stale) == [], "another controller has begun it, and it has ended already"
    with place.catalog.read() as session:
        assert len(session.exec(select(JobRow)).all()) == 1
