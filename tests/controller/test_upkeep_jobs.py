"""Upkeep of a real vault as jobs: by hand, by the clock, cancelled, killed, and by two controllers at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from orchestrator.alarms import Topic, of_vault
from orchestrator.catalog import owner
from orchestrator.catalog.alerts import standing
from orchestrator.catalog.audit import recent
from orchestrator.catalog.jobs import add_job, events_of, load_job
from orchestrator.catalog.owner import Owner
from orchestrator.catalog.schema import DutyRow, JobRow
from orchestrator.catalog.store import Catalog
from orchestrator.config import Config, parse_config
from orchestrator.jobs.states import JobState
from orchestrator.jobs.upkeep import UpkeepJob
from orchestrator.lock_desk import LockView
from orchestrator.service import Service
from orchestrator.upkeep_jobs import UpkeepJobs
from orchestrator.upkeep_runner import Check, Done, UpkeepRunner
from tests.controller.test_reconciler import dead
from workers.contract.errors import Busy, Cancelled, NotFound, UsageError, VaultError

HOUR = timedelta(hours=1)
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = f"""
        [vaults.main]
        url = "file://{tmp_path}/vault"
        key_file = "{tmp_path}/main.key"
        [vaults.second]
        url = "file://{tmp_path}/second"
        key_file = "{tmp_path}/main.key"
        replica_of = "main"
        [upkeep]
        sweep = "sundays at 04:00"
        verify = "daily at 06:00"
        replicate = "every 4 hours"
        lock = "daily at 05:00"
        timezone = "UTC"
        [paths]
        state = "{tmp_path}/state"
        runtime = "{tmp_path}/run"
    """
    return parse_config(text, tmp_path / "stillframe.toml")


@pytest.fixture
def service(config: Config) -> Iterator[Service]:
    with Service.open(config) as service:
        service.init_vault("main")
        yield service


def job_of(catalog: Catalog, job_id: str) -> UpkeepJob:
    with catalog.read() as session:
        job = load_job(session, job_id)[1]
    assert isinstance(job, UpkeepJob)
    return job


def rows(catalog: Catalog) -> list[JobRow]:
    from sqlmodel import select

    with catalog.read() as session:
        return list(session.exec(select(JobRow)).all())


# --- by hand -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("sweep", "nothing to give back"),
        ("verify", "nothing wrong"),
        ("replicate", "second: 0 new points"),
        ("lock", "nothing is locked"),
    ],
)
def test_each_kind_does_its_work(service: Service, what: str, line: str) -> None:
    view = service.wait(service.upkeep_jobs.start(what, None))
    assert (view.kind, view.state, view.machine) == ("upkeep", JobState.SUCCEEDED, f"{what} of vault main")
    assert line in view.result["lines"][0]
    assert [event.kind for event in view.events] == ["started", "finished"]
    assert service.jobs()[0].id == view.id


def test_the_audit_log_knows_who(service: Service) -> None:
    service.wait(service.upkeep_jobs.start("sweep", "main"))
    with service.catalog.read() as session:
        said = [(row.action, row.subject) for row in recent(session, 9)]
    assert said[::-1] == [
        ("vault.init", "main"),
        ("upkeep.run", "sweep of vault main"),
        ("policy.expire", "main"),
        ("vault.sweep", "main"),
    ]


def test_what_cannot_be_meant(service: Service) -> None:
    for what, vault, error in (
        ("swep", None, UsageError),
        ("sweep", "second", UsageError),
        ("replicate", "second", UsageError),
        ("verify", "nowhere", NotFound),
    ):
        with pytest.raises(error):
            service.upkeep_jobs.start(what, vault)
    assert rows(service.catalog) == []


def test_a_vault_that_is_away_fails_the_job_with_its_reason_and_an_alert(service: Service, tmp_path: Path) -> None:
    service.close()
    (tmp_path / "vault").rename(tmp_path / "unmounted")
    with Service.open(service.config) as fresh:
        view = fresh.wait(fresh.upkeep_jobs.start("verify", None))
        assert view.error is not None
        assert (view.state, view.error.code) == (JobState.FAILED, "VaultMissing")
        with fresh.catalog.read() as session:
            alert = standing(session, of_vault(Topic.UPKEEP_FAILED, "main", "verify"))
        assert alert is not None
        (tmp_path / "unmounted").rename(tmp_path / "vault")
        assert fresh.wait(fresh.upkeep_jobs.start("verify", None)).state is JobState.SUCCEEDED
        with fresh.catalog.read() as session:
            assert standing(session, of_vault(Topic.UPKEEP_FAILED, "main", "verify")) is None


def test_damage_fails_a_verification(service: Service, tmp_path: Path) -> None:
    pack = tmp_path / "vault" / "packs" / "00" / ("00" * 32)
    pack.parent.mkdir(parents=True, exist_ok=True)
    pack.write_bytes(b"nothing of the kind")
    from workers.vault.findings import Level

    report = service.verify_vault("main", Level.PACKS)
    assert report.findings, "the test must damage something"
    from orchestrator.upkeep_work import UpkeepWork

    work = UpkeepWork(service.point_desk, service.upkeep, service.integrity, service.replicas, service.locks)
    share = datetime.now().astimezone().date().toordinal() % 30
    name = f"{share:08x}" + "00" * 28
    pack.rename(pack.with_name(name))
    with pytest.raises(Exception, match=name):
        work.perform(UpkeepJob(id="u", what="verify", vault="main"), lambda _: None)


# --- a bench of its own: work that waits for the test --------------------------------------------------------------


class Bench:
    """Upkeep whose work goes on until it is let go."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.catalog = service.catalog
        self.began = threading.Event()
        self.go = threading.Event()
        self.ended: list[str] = []
        self.error: Exception | None = None
        self.jobs = self.controller()

    def controller(self, locks: Any = None) -> UpkeepJobs:
        """One more process, as far as that can be had in one."""
        return UpkeepJobs(
            lambda: self.service.config,
            self.catalog,
            locks or self.service.locks,
            lambda: self.service.engine.onlooker(owner.this_process()),
            self.perform,
        )

    def perform(self, job: UpkeepJob, check: Check) -> Done:
        self.began.set()
        try:
            while not self.go.wait(0.05):
                check(None)
        except Cancelled:
            self.ended.append(job.id)
            raise
        if self.error is not None:
            raise self.error
        return Done(lines=["done"])

    def wait(self, job: str) -> UpkeepJob:
        self.service.wait(job)
        return job_of(self.catalog, job)


@pytest.fixture
def bench(service: Service) -> Iterator[Bench]:
    bench = Bench(service)
    yield bench
    bench.go.set()
    bench.jobs.close()


def test_one_at_a_time_and_the_same_not_twice(bench: Bench) -> None:
    first = bench.jobs.start("sweep", None)
    assert bench.began.wait(10)
    second = bench.jobs.start("verify", None)
    with pytest.raises(Busy):
        bench.jobs.start("sweep", None)
    assert job_of(bench.catalog, second).state is JobState.QUEUED
    bench.go.set()
    assert bench.wait(first).state is JobState.SUCCEEDED
    assert bench.wait(second).state is JobState.SUCCEEDED


def test_cancelled_while_it_runs_and_while_it_waits(bench: Bench) -> None:
    first, second = bench.jobs.start("sweep", None), bench.jobs.start("verify", None)
    assert bench.began.wait(10)
    bench.service.cancel(second)
    assert job_of(bench.catalog, second).state is JobState.CANCELLED
    bench.service.cancel(first)
    assert bench.wait(first).state is JobState.CANCELLED
    assert bench.ended == [first]


def test_errors_of_any_kind_become_the_jobs(bench: Bench) -> None:
    bench.go.set()
    for error, code in ((VaultError("full"), "VaultError"), (ZeroDivisionError("oh"), "Internal")):
        bench.error = error
        job = bench.wait(bench.jobs.start("sweep", None))
        assert job.error is not None
        assert (job.state, job.error.code) == (JobState.FAILED, code)


def test_given_up_by_another_it_ends_itself_and_changes_nothing(bench: Bench) -> None:
    job = bench.jobs.start("sweep", None)
    assert bench.began.wait(10)
    from workers.contract.messages import WorkerLost

    bench.service.engine.onlooker(owner.this_process()).advance(job, WorkerLost(detail="it seemed dead"))
    bench.jobs.close()
    assert bench.ended == [job]
    assert job_of(bench.catalog, job).state is JobState.FAILED
    with bench.catalog.read() as session:
        assert [event.effective for event in events_of(session, job)] == [True, True, False]


def test_at_the_end_of_the_process_it_is_cancelled(bench: Bench) -> None:
    job = bench.jobs.start("sweep", None)
    assert bench.began.wait(10)
    bench.jobs.close()
    assert job_of(bench.catalog, job).state is JobState.CANCELLED


# --- by the clock --------------------------------------------------------------------------------------------------


def duties(catalog: Catalog) -> dict[tuple[str, str], DutyRow]:
    from sqlmodel import select

    with catalog.read() as session:
        return {(row.subject, row.section): row for row in session.exec(select(DutyRow)).all()}


def test_first_seen_nothing_is_due(bench: Bench) -> None:
    bench.jobs.turn(NOW)
    assert rows(bench.catalog) == []
    assert set(duties(bench.catalog)) == {
        ("vault:main", "sweep"),
        ("vault:main", "verify"),
        ("vault:main", "replicate"),
        ("vault:main", "lock"),
        ("vault:second", "verify"),
    }


def test_a_moment_is_handled_once_by_whoever_comes_first(bench: Bench) -> None:
    bench.go.set()
    other = bench.controller()
    bench.jobs.turn(NOW)
    for minutes in range(0, 8 * 60, 30):
        for jobs in (bench.jobs, other):
            jobs.turn(NOW + timedelta(minutes=minutes))
    due = sorted((row.section, row.due) for row in rows(bench.catalog))
    assert due == [("replicate", NOW + 4 * HOUR)], "and not at 12:00, before anything was known"
    assert {row.asked_by for row in rows(bench.catalog)} == {"schedule"}


def test_of_two_controllers_in_the_same_moment_one_decides(bench: Bench) -> None:
    """The other one has read what is due, and comes second."""
    bench.go.set()
    later = NOW + timedelta(days=1)

    class Locks:
        def show(self, _name: str) -> LockView:
            bench.jobs.turn(later)
            for row in rows(bench.catalog):
                bench.wait(row.id)
            return LockView(vault="main", days=7, number=1, approvers=[], own=[], new=[], wrong=[])

    second = bench.controller(Locks())
    second.turn(NOW)
    second.turn(later)
    assert sorted(row.section for row in rows(bench.catalog)) == ["replicate", "verify", "verify"]


def test_what_was_missed_is_done_once(bench: Bench) -> None:
    bench.go.set()
    bench.jobs.turn(NOW)
    later = NOW + timedelta(days=40)
    bench.jobs.turn(later)
    bench.jobs.turn(later)
    found = sorted((row.section, row.vault) for row in rows(bench.catalog))
    assert found == [("replicate", "main"), ("sweep", "main"), ("verify", "main"), ("verify", "second")]
    assert duties(bench.catalog)["vault:main", "lock"].outcome == "left out: the vault has no lock"
    for row in rows(bench.catalog):
        bench.wait(row.id)


def test_a_due_turn_while_the_last_one_runs_is_left_out(bench: Bench) -> None:
    bench.jobs.turn(NOW)
    bench.jobs.turn(NOW + 5 * HOUR)
    assert bench.began.wait(10)
    bench.jobs.turn(NOW + 9 * HOUR)
    [row] = rows(bench.catalog)
    assert duties(bench.catalog)["vault:main", "replicate"].outcome.startswith(f"left out: upkeep {row.id} works on")
    bench.go.set()
    bench.wait(row.id)
    bench.jobs.turn(NOW + 13 * HOUR)
    assert len(rows(bench.catalog)) == 2


def lost(bench: Bench, of: Owner, *, heard: datetime | None) -> str:
    job = UpkeepJob(id="lost", what="sweep", vault="main", state=JobState.WORKING)
    with bench.catalog.write() as session:
        add_job(session, job, of, machine=("", "sweep of vault main"), lock="upkeep:sweep:main")
        session.get_one(JobRow, "lost").heard = heard
    return "lost"


def test_what_a_killed_process_left_is_settled_and_comes_again(bench: Bench) -> None:
    bench.go.set()
    bench.jobs.turn(NOW)
    job = lost(bench, dead(), heard=NOW + timedelta(days=6))
    bench.jobs.turn(NOW + timedelta(days=6))
    settled = job_of(bench.catalog, job)
    assert (settled.state, settled.error and settled.error.code) == (JobState.FAILED, "WorkerLost")
    again = [row for row in rows(bench.catalog) if row.lock == "upkeep:sweep:main" and row.id != job]
    assert [row.section for row in again] == ["sweep"]
    assert bench.wait(again[0].id).state is JobState.SUCCEEDED


def test_what_another_host_does_is_given_up_when_it_is_silent(bench: Bench) -> None:
    job = lost(bench, Owner("another-host", "b", 7, 7), heard=NOW)
    bench.jobs.turn(NOW + timedelta(seconds=60))
    assert job_of(bench.catalog, job).state is JobState.WORKING
    bench.jobs.turn(NOW + timedelta(seconds=61))
    assert job_of(bench.catalog, job).state is JobState.FAILED


def test_signs_of_life_while_it_runs(bench: Bench) -> None:
    def heard() -> datetime | None:
        with bench.catalog.read() as session:
            return session.get_one(JobRow, "alive").heard

    def perform(_job: UpkeepJob, _check: Check) -> Done:
        first, waited = heard(), threading.Event()
        for _ in range(1000):
            if heard() != first:
                return Done(lines=["it was heard of meanwhile"])
            waited.wait(0.01)
        return Done(lines=["silence"])

    job = UpkeepJob(id="alive", what="sweep", vault="main")
    with bench.catalog.write() as session:
        add_job(session, job, owner.this_process(), machine=("", "sweep of vault main"), lock="upkeep:sweep:main")
    onlooker = bench.service.engine.onlooker(owner.this_process())
    runner = UpkeepRunner(bench.catalog, lambda: onlooker, perform, beat_seconds=0.02)
    runner.submit("alive")
    assert bench.wait("alive").lines == ["it was heard of meanwhile"]
    runner.close()


def test_what_is_done_when(bench: Bench) -> None:
    views = {(one.vault, one.what): one for one in bench.jobs.views(NOW)}
    assert views["main", "sweep"].next == datetime(2026, 11, 29, 4, tzinfo=UTC)
    assert views["main", "replicate"].next == NOW
    assert views["second", "verify"].next == datetime(2026, 11, 25, 6, tzinfo=UTC)
    assert ("second", "sweep") not in views
