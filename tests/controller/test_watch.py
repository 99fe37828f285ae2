"""What is looked for because nobody would report it: over a catalog made for the purpose and a real vault."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlmodel import select

from orchestrator.alarms import Severity
from orchestrator.catalog.alerts import raise_alert, standing_alerts
from orchestrator.catalog.health import KEPT, growth
from orchestrator.catalog.points import mark_damaged, put_point, see_machine
from orchestrator.catalog.schema import CheckRow, MachineRow, VaultLookRow
from orchestrator.config import Config, parse_config
from orchestrator.config_file import Policy
from orchestrator.service import Service
from orchestrator.watch_desk import Sparing, longest_pause
from tests.controller.test_service import made
from tests.jobs.world import MACHINE

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
GIB = 1 << 30


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = f"""
        [vaults.main]
        url = "file://{tmp_path}/vault"
        key_file = "{tmp_path}/main.key"
        [policies.gold]
        schedule = "daily at 02:00"
        timezone = "UTC"
        [policies.idle]
        [protect.web]
        machines = ["web*"]
        policy = "gold"
        [protect.db]
        machines = ["db*"]
        policy = "idle"
        [paths]
        state = "{tmp_path}/state"
    """
    return parse_config(text, tmp_path / "stillframe.toml")


@pytest.fixture
def service(config: Config) -> Iterator[Service]:
    with Service.open(config) as service:
        service.init_vault("main")
        yield service


def alerts(service: Service) -> dict[str, str]:
    with service.catalog.read() as session:
        return {row.key.replace(MACHINE.uuid, "WEB"): row.text for row in standing_alerts(session)}


def add(service: Service, number: int = 1) -> datetime:
    """A machine with a point; when that was made."""
    point = made(number)
    with service.catalog.write() as session:
        put_point(session, "main", point)
        see_machine(session, point.machine)
    return point.time


# --- machines ------------------------------------------------------------------------------------------------------


def test_a_point_that_is_too_old_is_told_once_and_only_where_there_is_a_schedule(service: Service) -> None:
    made_at = add(service)
    service.watch.machines(made_at + 2 * DAY)
    assert alerts(service) == {}
    for _ in range(2):
        service.watch.machines(made_at + 2 * DAY + HOUR)
    assert alerts(service) == {
        "backup-overdue machine:WEB": "its last point is 2 days old, and its schedule makes one in 24 hours"
    }
    with service.catalog.read() as session:
        assert [row.count for row in standing_alerts(session)] == [1]


@pytest.mark.parametrize("changes", [{"name": "db1"}, {"name": "other"}, {"gone": datetime(2026, 11, 1, tzinfo=UTC)}])
def test_of_whom_nothing_is_due(service: Service, changes: dict[str, object]) -> None:
    made_at = add(service)
    with service.catalog.write() as session:
        session.get_one(MachineRow, MACHINE.uuid).sqlmodel_update(changes)
    service.watch.machines(made_at + 100 * DAY)
    assert alerts(service) == {}


def test_a_machine_that_is_no_longer_protected_is_nobodys_worry(service: Service) -> None:
    made_at = add(service)
    service.watch.machines(made_at + 3 * DAY)
    assert alerts(service) != {}
    with service.catalog.write() as session:
        session.get_one(MachineRow, MACHINE.uuid).name = "scratch"
    service.watch.machines(made_at + 3 * DAY)
    assert alerts(service) == {}


@pytest.mark.parametrize(
    ("words", "hours"),
    [
        ({"schedule": "hourly"}, 1),
        ({"schedule": "daily at 02:00"}, 24),
        ({"schedule": "daily at 02:00", "spread": 7200}, 26),
        ({"schedule": "weekdays at 22:30"}, 72),
        ({"schedule": "every 4 hours from 08:00 to 20:00"}, 12),
        ({"schedule": "every 5 minutes"}, 1 / 12),
        ({"schedule": "hourly", "blackout": ["08:00 to 18:00"]}, 11),
        ({"schedule": "sundays at 04:00"}, 7 * 24),
        ({"cron": "0 3 1 * *"}, 31 * 24),
        ({}, None),
    ],
)
def test_the_longest_pause_of_a_schedule(words: dict[str, object], hours: float | None) -> None:
    policy = Policy.model_validate({"timezone": "UTC", **words})
    found = longest_pause(policy, datetime(2026, 11, 24, 12, tzinfo=UTC))
    assert found == (None if hours is None else timedelta(hours=hours))


# --- vaults --------------------------------------------------------------------------------------------------------


def test_a_vault_that_is_well(service: Service) -> None:
    now = datetime.now(UTC)
    look = service.watch.vault("main", now)
    assert (look.problem, look.used_bytes) == ("", 0)
    assert look.free_bytes
    assert alerts(service) == {}


@pytest.mark.usefixtures("service")
def test_a_vault_that_is_away_and_comes_back(config: Config, tmp_path: Path) -> None:
    (tmp_path / "vault").rename(tmp_path / "unmounted")
    with Service.open(config) as fresh:
        fresh.watch.vaults(datetime.now(UTC))
        [(key, text)] = alerts(fresh).items()
        assert key == "vault-away vault:main"
        assert "no vault" in text
        (tmp_path / "unmounted").rename(tmp_path / "vault")
        fresh.watch.vaults(datetime.now(UTC))
        assert alerts(fresh) == {}


def test_a_vault_that_fills_up_is_seen_by_its_growth(service: Service) -> None:
    now = datetime.now(UTC)
    look = service.watch.look("main", now)
    assert look.free_bytes is not None
    with service.catalog.write() as session:
        # So much less was in it two days ago that the rest is gone in four days.
        rate = look.free_bytes // 4
        session.add(VaultLookRow(vault="main", time=now - 2 * DAY, used_bytes=-2 * rate, free_bytes=GIB))
    service.watch.vault("main", now)
    assert "at this rate it is full in 4 days" in alerts(service)["vault-full vault:main"]


def test_growth_needs_a_day_and_old_looks_go(service: Service) -> None:
    now = datetime.now(UTC)
    with service.catalog.write() as session:
        session.add(VaultLookRow(vault="main", time=now - KEPT - DAY, used_bytes=7, free_bytes=7))
        session.add(VaultLookRow(vault="main", time=now - 23 * HOUR, used_bytes=7, free_bytes=7))
    service.watch.vault("main", now)
    with service.catalog.read() as session:
        assert growth(session, "main", now) is None
        assert len(session.exec(select(VaultLookRow)).all()) == 2


def test_damage_and_its_end(service: Service) -> None:
    add(service)
    with service.catalog.write() as session:
        mark_damaged(session, "01" * 16, "a pack is lost")
        session.add(check(datetime.now(UTC)))
    service.watch.vault("main", datetime.now(UTC))
    assert alerts(service) == {"vault-damaged vault:main": "1 points cannot be restored whole"}
    with service.catalog.write() as session:
        mark_damaged(session, "01" * 16, "")
    service.watch.vault("main", datetime.now(UTC))
    assert alerts(service) == {}


def check(time: datetime) -> CheckRow:
    return CheckRow(
        vault="main", time=time, level="ids", packs=0, blocks=0, read_bytes=0, seconds=0.0, findings=0, share="1/30"
    )


def test_verification_that_is_overdue(service: Service) -> None:
    made_at = add(service)
    service.watch.vault("main", made_at + 3 * DAY)
    assert alerts(service) == {}
    service.watch.vault("main", made_at + 4 * DAY)
    assert "nothing of it was verified for 4 days" in alerts(service)["vault-unverified vault:main"]
    with service.catalog.write() as session:
        session.add(check(made_at + 4 * DAY))
    service.watch.vault("main", made_at + 4 * DAY)
    assert alerts(service) == {}


# --- news ----------------------------------------------------------------------------------------------------------


def test_what_costs_much_is_not_brought_forward_by_news() -> None:
    turns: list[datetime] = []
    now = datetime(2026, 11, 24, 12, tzinfo=UTC)
    sparing = Sparing(300, turns.append)
    for seconds in (0, 1, 298, 299, 300, 500, 598):
        sparing(now + timedelta(seconds=seconds))
    assert [(turn - now).seconds for turn in turns] == [0, 299, 598]
    sparing(now)
    assert len(turns) == 4, "a clock that was set back does not stop it"


def test_a_failure_that_stands_becomes_critical_with_time(service: Service) -> None:
    made_at = add(service)
    with service.catalog.write() as session:
        raise_alert(session, f"backup-failed machine:{MACHINE.uuid}", Severity.WARNING, "web", "no space", event=True)
    service.watch.machines(made_at + 3 * DAY)
    with service.catalog.read() as session:
        [row] = standing_alerts(session)
    assert (row.severity, row.count) == ("critical", 1)
    assert row.text.startswith("no space; its last point is 3 days old")
