"""The distributed form with real processes, Redis and PostgreSQL: peaks, kills, two controllers at once."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlmodel import col, select

from orchestrator.catalog.alerts import standing
from orchestrator.catalog.jobs import RESTORE, Ticket, add_job
from orchestrator.catalog.owner import NOBODY
from orchestrator.catalog.schema import EventRow, JobRow
from orchestrator.jobs.restore import RestoreJob
from orchestrator.leases import Lease, holder_of
from tests.distributed.place import Place, make_place, wait_until
from tests.servers.postgres import Postgres
from tests.servers.redis import Redis

MINUTE = datetime(2026, 11, 22, 2, tzinfo=UTC)
MakePlace = Callable[..., Place]


@pytest.fixture
def place_with(tmp_path: Path, postgres: Postgres, redis: Redis) -> Iterator[MakePlace]:
    places: list[Place] = []

    def make(more: str = "") -> Place:
        redis.forget_all()
        places.append(make_place(tmp_path, postgres.new_database(), redis.url, more))
        return places[-1]

    yield make
    for place in places:
        place.close()


def ended(place: Place, jobs: list[str]) -> bool:
    return set(place.states(jobs).values()) <= {"succeeded", "failed", "cancelled"}


@pytest.mark.timeout(300)
def test_two_hundred_machines_due_at_the_same_minute(place_with: MakePlace) -> None:
    place = place_with()
    jobs = [place.queue(f"m{n:03}", f"lab{1 + n % 2}", due=MINUTE + timedelta(milliseconds=n)) for n in range(200)]
    place.start("worker", "lab1")
    place.start("worker", "lab2")
    place.start("controller")
    place.start("controller")
    wait_until(lambda: place.states(["j-m000"])["j-m000"] == "succeeded", 60)
    restore = RestoreJob(
        id="restore", vault="main", point="point-m000", hypervisor="lab1", name="new", uuid="uuid-new", directory="/x"
    )
    with place.catalog.write() as session:
        ticket = Ticket(RESTORE)
        add_job(session, restore, NOBODY, machine=("uuid-new", "new"), lock="machine:uuid-new", ticket=ticket)
    wait_until(lambda: ended(place, [*jobs, "restore"]), 200, lambda: place.states(jobs))
    assert set(place.states([*jobs, "restore"]).values()) == {"succeeded"}
    with place.catalog.read() as session:
        rows = {row.id: row for row in session.exec(select(JobRow)).all()}
        begun = session.exec(select(EventRow).where(EventRow.kind == "started").order_by(col(EventRow.id))).all()
    assert len(begun) == 201, "each began once"
    for host in ("lab1", "lab2"):
        order = [event for event in begun if rows[event.job].hypervisor == host and event.job != "restore"]
        assert [event.job for event in order] == sorted(event.job for event in order), "in the order of their moments"
        for event in order:
            beside = [one for one in order if one.time <= event.time < rows[one.job].updated]
            assert len(beside) <= 3, "max_jobs = 2, and one beside a restore's own slot"
    [restored] = [event for event in begun if event.job == "restore"]
    overtaken = [one for one in begun if rows["restore"].created < one.time < restored.time]
    assert len([one for one in overtaken if rows[one.job].hypervisor == "lab1"]) <= 2, "it did not wait its turn"


TICKING = """
[policies.often]
cron = "* * * * *"
[protect.all]
machines = ["tick*"]
policy = "often"
"""


@pytest.mark.timeout(120)
def test_the_leader_is_killed_and_the_other_one_goes_on(place_with: MakePlace) -> None:
    """With what was due while nobody led: once, whoever leads."""
    place = place_with(TICKING)
    first = place.start("controller")
    wait_until(lambda: leads(place) != "", 20)
    second = place.start("controller")
    assert str(first.pid) in leads(place).split()
    first.send_signal(signal.SIGKILL)
    first.wait()
    wait_until(lambda: str(second.pid) in leads(place).split(), 30, lambda: leads(place))
    place.queue("after", "lab1")
    place.start("worker", "lab1")
    wait_until(lambda: ended(place, ["j-after"]), 30)
    assert place.states(["j-after"]) == {"j-after": "succeeded"}
    second.terminate()
    assert second.wait(60) == 0
    assert leads(place) == "", "it has given its lease up"


def leads(place: Place) -> str:
    with place.catalog.read() as session:
        return holder_of(session)


def test_a_lease_has_one_holder(place_with: MakePlace) -> None:
    place = place_with()
    one, two = Lease(place.catalog, "x", seconds=2), Lease(place.catalog, "x", seconds=2)
    assert (one.claim(), two.claim(), one.claim()) == (True, False, True)
    wait_until(two.claim, 10)
    assert not one.held(), "it stopped to believe in it before another one could have it"
    assert not one.claim()
    two.give_up()
    assert one.claim()


@pytest.mark.timeout(120)
def test_a_worker_that_is_killed_gives_its_jobs_away(place_with: MakePlace) -> None:
    place = place_with()
    place.start("controller")
    worker = place.start("worker", "lab1")
    jobs = [place.queue(f"w{n}", "lab1") for n in range(8)]
    wait_until(lambda: "succeeded" in place.states(jobs).values(), 30)
    worker.kill()
    wait_until(lambda: "releasing" in place.states(jobs).values(), 40, lambda: place.states(jobs))
    with place.catalog.read() as session:
        told = standing(session, "no-worker hypervisor:lab1")
    assert told is None or "no worker of hypervisor lab1" in told.text
    place.start("worker", "lab1")
    wait_until(lambda: ended(place, jobs), 60, lambda: place.states(jobs))
    states = list(place.states(jobs).values())
    assert 1 <= states.count("failed") <= 2, "those that were under way; the others waited"
    assert states.count("succeeded") == len(jobs) - states.count("failed")
    with place.catalog.read() as session:
        texts = [event.text for event in session.exec(select(EventRow).where(EventRow.kind == "worker_lost")).all()]
    assert set(texts) == {"no worker was heard to work on it for 8 seconds"}


@pytest.mark.timeout(180)
def test_redis_and_postgresql_are_killed_in_the_middle(tmp_path: Path) -> None:
    redis = Redis(tmp_path / "redis")
    folder = Path(tempfile.mkdtemp(prefix="stillframe-test-postgres-"))  # its user cannot enter a test's own folder
    folder.chmod(0o755)
    postgres = Postgres(folder / "postgres")
    redis.start()
    postgres.start()
    place = make_place(tmp_path, postgres.new_database(), redis.url)
    try:
        jobs = [place.queue(f"k{n:02}", "lab1") for n in range(30)]
        place.start("controller")
        place.start("controller")
        place.start("worker", "lab1")
        wait_until(lambda: list(place.states(jobs).values()).count("succeeded") > 3, 60)
        postgres.kill()
        postgres.start()
        wait_until(lambda: list(place.states(jobs).values()).count("succeeded") > 8, 60, lambda: place.states(jobs))
        redis.kill()
        redis.start()
        wait_until(lambda: ended(place, jobs), 120, lambda: place.states(jobs))
        states = list(place.states(jobs).values())
        assert states.count("failed") <= 2, "those whose message Redis has forgotten"
    finally:
        place.close()
        redis.kill()
        postgres.remove()
        folder.rmdir()
