"""What somebody is told when a job ends: rules in memory, and the controller that applies them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from orchestrator import alarms
from orchestrator.alarms import Before, Raise, Resolve, Severity, Topic, Watched, job_ended, of_machine, of_vault
from orchestrator.catalog.alerts import raise_alert, recent_alerts, resolve_alert, standing_alerts
from orchestrator.catalog.schema import AlertRow
from orchestrator.catalog.store import Catalog
from orchestrator.jobs.backup_job import BackupJob
from orchestrator.jobs.states import JobState
from orchestrator.jobs.upkeep import UpkeepJob
from tests.controller.scripted import Bench, add_backup, run_backup
from tests.jobs.world import MACHINE, disk, failed
from workers.contract.errors import Cancelled, ErrorInfo, VaultMissing
from workers.contract.messages import CancelRequested, Command, Event
from workers.contract.points import Consistency, NotIncluded

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
FAILED = of_machine(Topic.BACKUP_FAILED, MACHINE.uuid)
OVERDUE = of_machine(Topic.BACKUP_OVERDUE, MACHINE.uuid)
DEGRADED = of_machine(Topic.BACKUP_DEGRADED, MACHINE.uuid)


def standing(catalog: Catalog) -> dict[str, AlertRow]:
    with catalog.read() as session:
        return {row.key: row for row in standing_alerts(session)}


def fails(kind: str) -> Callable[[Bench], Callable[[Command], Event]]:
    def of(bench: Bench) -> Callable[[Command], Event]:
        return lambda command: failed(command) if command.kind == kind else bench.world.perform(command)

    return of


def attempt(bench: Bench, job: str, perform: Callable[[Command], Event] | None = None) -> None:
    add_backup(bench.catalog, job)
    bench.controller.start(job)
    bench.run(perform)


# --- through the controller ----------------------------------------------------------------------------------------


def test_failures_are_one_alert_that_is_counted_grows_and_recovers(bench: Bench) -> None:
    for number in range(3):
        attempt(bench, f"bad{number}", fails("prepare")(bench))
        [row] = standing(bench.catalog).values()
        assert (row.key, row.count, row.subject) == (FAILED, number + 1, "web")
        assert row.severity == ("critical" if number == 2 else "warning")
        times = f" {number + 1} times in a row" if number else ""
        assert row.text == f"its backup failed{times}: it did not work"
        with bench.catalog.write() as session:
            row.told, row.acknowledged = NOW, "anna@host"
            session.merge(row)
    run_backup(bench, "good")
    assert standing(bench.catalog) == {}
    with bench.catalog.read() as session:
        [row] = recent_alerts(session, 9)
    assert (row.ending, row.told) == ("point point-go was made", None)
    assert row.resolved is not None


def test_worse_is_told_again_and_the_same_is_not(catalog: Catalog) -> None:
    with catalog.write() as session:
        raise_alert(session, "k", Severity.WARNING, "web", "bad")
        row = session.get_one(AlertRow, 1)
        row.told, row.acknowledged = NOW, "anna@host"
        raise_alert(session, "k", Severity.WARNING, "web", "bad still", event=True)
        assert (row.told, row.acknowledged, row.text, row.count) == (NOW, "anna@host", "bad still", 2)
        raise_alert(session, "k", Severity.WARNING, "web", "a state")
        assert (row.text, row.count) == ("a state", 2)
        raise_alert(session, "k", Severity.CRITICAL, "web", "worse", event=True)
        assert (row.told, row.acknowledged, row.count) == (None, "", 3)
        assert resolve_alert(session, "k", "over")
        assert not resolve_alert(session, "k", "over")
        raise_alert(session, "k", Severity.INFO, "web", "again")
    assert standing(catalog)["k"].count == 1


def test_a_person_who_cancels_is_no_alert(bench: Bench) -> None:
    add_backup(bench.catalog, "one")
    bench.controller.start("one")
    bench.controller.advance("one", CancelRequested(by="anna"))
    bench.run()
    assert standing(bench.catalog) == {}


def test_cancellations_do_not_hide_that_it_failed_in_a_row(bench: Bench) -> None:
    for number in range(3):
        attempt(bench, f"bad{number}", fails("prepare")(bench))
        add_backup(bench.catalog, f"ended{number}")
        bench.controller.advance(f"ended{number}", CancelRequested(by="anna"))
    assert standing(bench.catalog)[FAILED].severity == "critical"


def test_a_disk_that_drops_out_is_told_until_it_is_back_or_gone(bench: Bench) -> None:
    run_backup(bench, "one")
    whole = list(bench.world.disks)
    key = of_machine(Topic.DISK_LEFT_OUT, MACHINE.uuid, "vdb")
    bench.world.disks = [disk("vda"), disk("vdb", excluded="shared with another machine")]
    run_backup(bench, "two")
    assert standing(bench.catalog)[key].text == "vdb is no longer included: shared with another machine"
    run_backup(bench, "three")
    assert standing(bench.catalog)[key].count == 1, "it stands, and is not told anew by each backup"
    bench.world.disks = whole
    run_backup(bench, "four")
    assert standing(bench.catalog) == {}
    bench.world.disks = [disk("vda"), disk("vdb", excluded="shared with another machine")]
    run_backup(bench, "five")
    bench.world.disks = [disk("vda")]
    run_backup(bench, "six")
    assert standing(bench.catalog) == {}
    with bench.catalog.read() as session:
        assert [row.ending for row in recent_alerts(session, 9)] == ["vdb is gone", "vdb is included again"]


def test_a_release_that_failed_is_critical_and_counts_as_one_failure(bench: Bench) -> None:
    calls = 0

    def perform(command: Command) -> Event:
        nonlocal calls
        if command.kind in ("take_snapshot", "release") and calls < 3:
            calls += 1
            return failed(command)
        return bench.world.perform(command)

    attempt(bench, "one", perform)
    alerts = standing(bench.catalog)
    assert alerts["unreleased job:one"].severity == "critical"
    assert alerts[FAILED].count == 1
    bench.controller.retry_release("one")
    bench.run(perform)
    assert standing(bench.catalog)["unreleased job:one"].count == 2
    bench.controller.retry_release("one")
    bench.run(perform)
    alerts = standing(bench.catalog)
    assert [(key, row.count) for key, row in alerts.items()] == [(FAILED, 1)]


# --- rules ---------------------------------------------------------------------------------------------------------


def ended(bench: Bench, **changes: object) -> BackupJob:
    from orchestrator.catalog.jobs import load_job

    run_backup(bench, "good")
    with bench.catalog.read() as session:
        _, job = load_job(session, "good")
    assert isinstance(job, BackupJob)
    assert job.committed is not None
    got = changes.pop("got", Consistency.CRASH)
    point = job.committed.model_copy(update={"consistency": got, "consistency_reason": "no agent"})
    return job.model_copy(update={"committed": point, "goal": Consistency.APPLICATION, **changes})


@pytest.mark.parametrize(
    ("got", "asked", "best", "told"),
    [
        ("crash", False, None, ""),
        ("crash", True, None, "not application as asked"),
        ("filesystem", True, "crash", "not application as asked"),
        ("crash", False, "filesystem", "not filesystem as points before it"),
        ("filesystem", False, "filesystem", ""),
        ("application", True, "crash", ""),
    ],
)
def test_consistency_below_what_was_asked_or_usual(
    bench: Bench, got: str, asked: bool, best: str | None, told: str
) -> None:
    job = ended(bench, got=Consistency(got), goal_asked=asked)
    verdicts = job_ended(job, Before(best=Consistency(best) if best else None, standing=frozenset({DEGRADED})))
    [verdict] = [verdict for verdict in verdicts if verdict.key == DEGRADED]
    if told:
        assert isinstance(verdict, Raise)
        assert told in verdict.text
    else:
        assert verdict == Resolve(DEGRADED, f"point {job.point[:8]} is {got}")


def test_a_goal_that_was_lowered_on_purpose_is_no_alert(bench: Bench) -> None:
    """Points were application consistent; now the policy wants crash only."""
    job = ended(bench, goal=Consistency.CRASH, goal_asked=True)
    assert [one for one in job_ended(job, Before(best=Consistency.APPLICATION)) if isinstance(one, Raise)] == []


def test_a_disk_that_was_left_out_by_name_is_no_alert(bench: Bench) -> None:
    out = [NotIncluded(target="vdb", reason="left out as asked")]
    before = Before(included=frozenset({"vda", "vdb"}))
    assert job_ended(ended(bench, not_included=out, exclude=["vdb"]), before) == []
    [verdict] = job_ended(ended_again(bench).model_copy(update={"not_included": out}), before)
    assert verdict.key.endswith(" vdb")


def test_change_tracking_that_lied(bench: Bench) -> None:
    key = of_machine(Topic.TRACKING_WRONG, MACHINE.uuid)
    [verdict] = job_ended(ended(bench, alerts={"vda": "3 blocks differ"}), Before())
    assert isinstance(verdict, Raise)
    assert (verdict.key, verdict.text) == (key, "vda: 3 blocks differ")
    [resolved] = job_ended(ended_again(bench), Before(standing=frozenset({key})))
    assert resolved == Resolve(key, "changes were tracked rightly")


def ended_again(bench: Bench) -> BackupJob:
    from orchestrator.catalog.jobs import load_job

    with bench.catalog.read() as session:
        _, job = load_job(session, "good")
    assert isinstance(job, BackupJob)
    return job


def test_upkeep_that_fails_and_recovers() -> None:
    key = of_vault(Topic.UPKEEP_FAILED, "main", "sweep")
    error: ErrorInfo = VaultMissing("no vault there").info()
    job = UpkeepJob(id="u", what="sweep", vault="main", state=JobState.FAILED, error=error)
    [first] = job_ended(job, Before())
    [third] = job_ended(job, Before(failures=2))
    assert isinstance(first, Raise)
    assert isinstance(third, Raise)
    assert (first.severity, third.severity) == (Severity.WARNING, Severity.CRITICAL)
    well = job.model_copy(update={"state": JobState.SUCCEEDED, "error": None})
    assert job_ended(well, Before(standing=frozenset({key}))) == [Resolve(key, "sweep succeeded")]
    gone = job.model_copy(update={"state": JobState.CANCELLED, "error": Cancelled("x").info()})
    assert job_ended(gone, Before(standing=frozenset({key}))) == []


DAY = timedelta(days=1)
WEB = Watched(MACHINE.uuid, "web", DAY, NOW - 3 * DAY)


def test_a_last_point_older_than_twice_the_schedule() -> None:
    [verdict] = alarms.stale(WEB, {}, NOW)
    assert isinstance(verdict, Raise)
    assert (verdict.key, verdict.severity) == (OVERDUE, Severity.CRITICAL)
    assert verdict.text == "its last point is 3 days old, and its schedule makes one in 24 hours"
    assert alarms.stale(replace(WEB, last=NOW - 2 * DAY), {}, NOW) == []
    assert alarms.stale(replace(WEB, last=None), {}, NOW) == []


def test_a_failure_that_stands_for_so_long_becomes_critical_once() -> None:
    [verdict] = alarms.stale(WEB, {FAILED: (Severity.WARNING, "no space")}, NOW)
    assert isinstance(verdict, Raise)
    assert (verdict.key, verdict.severity, verdict.event) == (FAILED, Severity.CRITICAL, False)
    assert verdict.text.startswith("no space; its last point is 3 days old")
    assert alarms.stale(WEB, {FAILED: (Severity.CRITICAL, verdict.text)}, NOW) == []


def test_past_its_deadline() -> None:
    job = alarms.Late("one", MACHINE.uuid, "web", "queued", NOW)
    assert alarms.late(job, NOW - timedelta(seconds=1)) is None
    verdict = alarms.late(job, NOW + timedelta(minutes=5))
    assert verdict is not None
    assert verdict.text == "backup one still waits to begin, 5 minutes after its deadline"
    verdict = alarms.late(replace(job, state="transferring"), NOW + timedelta(hours=5))
    assert verdict is not None
    assert verdict.text == "backup one is still transferring, 5 hours after its deadline"


GIB = 1 << 30


@pytest.mark.parametrize(
    ("used", "free", "growth", "severity"),
    [
        (50 * GIB, 50 * GIB, None, None),
        (95 * GIB, 5 * GIB, None, Severity.WARNING),
        (98 * GIB, 2 * GIB, None, Severity.CRITICAL),
        (GIB, GIB - 1, None, Severity.CRITICAL),
        (50 * GIB, 50 * GIB, 5 * GIB, Severity.WARNING),
        (50 * GIB, 50 * GIB, 30 * GIB, Severity.CRITICAL),
        (50 * GIB, 50 * GIB, -5 * GIB, None),
        (50 * GIB, None, GIB, None),
        (None, None, None, None),
    ],
)
def test_vault_that_fills_up(used: int | None, free: int | None, growth: float | None, severity: object) -> None:
    verdict = alarms.vault_space("main", used, free, growth)
    assert (verdict.severity if isinstance(verdict, Raise) else None) == severity


def test_a_small_vault_tells_what_is_left() -> None:
    verdict = alarms.vault_space("main", 0, 20 << 20, None)
    assert isinstance(verdict, Raise)
    assert verdict.text == "only 20 MiB free, 100% of its space"


def test_vault_that_nobody_verifies_or_that_is_damaged() -> None:
    late = alarms.vault_unverified("main", NOW - 4 * DAY, DAY, NOW)
    assert isinstance(late, Raise)
    assert late.text == "nothing of it was verified for 4 days"
    for since, period in ((NOW - 3 * DAY, DAY), (None, DAY), (NOW - 400 * DAY, None)):
        assert isinstance(alarms.vault_unverified("main", since, period, NOW), Resolve)
    damaged = alarms.vault_damage("main", 2, 1)
    assert isinstance(damaged, Raise)
    assert damaged.severity is Severity.CRITICAL
    assert isinstance(alarms.vault_damage("main", 0, 0), Resolve)


def test_machines_that_nobody_protects_any_more() -> None:
    key = of_machine(Topic.BACKUP_FAILED, "gone")
    assert alarms.over([key, FAILED, "vault-full vault:main"], {MACHINE.uuid}) == [
        Resolve(key, "nobody asks for its backups any more")
    ]


def test_words() -> None:
    shown = [alarms.ago(timedelta(minutes=minutes)) for minutes in (1, 40, 119, 120, 47 * 60, 48 * 60)]
    assert shown == ["1 minute", "40 minutes", "119 minutes", "2 hours", "47 hours", "2 days"]
