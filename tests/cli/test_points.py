"""`point delete|undelete|pin|unpin` and `policy`, on points that were put into a vault without a machine."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, write_configuration
from tests.vault.pictures import point_of, store_disk
from workers.vault import Vault, open_store, read_key_file

POLICIES = """
    [policies.gold]
    schedule = "daily at 02:00"
    timezone = "Europe/Berlin"
    retention = { daily = 2, monthly = 12 }
    [policies.silent]
    [protect.web]
    machines = ["web"]
    policy = "gold"
"""


def stock(folder: Path) -> Cli:
    """The command, with the points p1 … p5 of machine web in its vault, one a day; p1 is locked."""
    cli = write_configuration(Cli(folder))
    cli.configure(cli.file.read_text() + POLICIES)
    assert cli.run("init").code == 0
    store = open_store(f"file://{folder}/vault")
    vault = Vault.open(store, key=read_key_file(folder / "main.key"), cache_dir=folder / "other-cache")
    disk = store_disk(vault, "vda", "AB", None)
    for number in range(1, 6):
        made = {"time": datetime(2026, 6, 10 + number, 2, tzinfo=UTC)}
        if number == 1:
            made["locked_until"] = datetime.now(UTC) + timedelta(days=100)
        vault.commit(point_of(f"p{number}", [disk]).model_copy(update=made))
    vault.close()
    assert cli.run("vault", "rebuild-catalog").code == 0
    return cli


@pytest.fixture
def stocked(tmp_path: Path) -> Cli:
    return stock(tmp_path)


def listed(cli: Cli, *options: str) -> list[str]:
    ran = cli.run("point", "list", "web", "--json", *options)
    assert ran.code == 0, ran.err
    return [line["id"] for line in ran.lines]


def test_deleted_and_taken_back(stocked: Cli) -> None:
    asked = stocked.run("point", "delete", "p5")
    assert asked.code == 2
    assert "nobody is there to answer: Delete 1 point?" in asked.err
    assert stocked.run("point", "delete", "p5", "--dry-run", "--json").line("deleted")["dry_run"]
    assert listed(stocked) == ["p1", "p2", "p3", "p4", "p5"]
    done = stocked.run("point", "delete", "web@latest", "--yes", "--reason", "a mistake")
    assert done.code == 0, done.err
    assert "back with: stillframe point undelete p5" in done.out
    assert listed(stocked) == ["p1", "p2", "p3", "p4"]
    assert listed(stocked, "--deleted") == ["p5"]
    assert listed(stocked, "--all") == ["p1", "p2", "p3", "p4", "p5"]
    assert stocked.run("point", "show", "web@latest").out.startswith("point p4")
    shown = stocked.run("point", "show", "p5").out
    assert "it can be taken back: a mistake" in shown
    assert "deleted until " in stocked.run("point", "list", "--all").out
    assert stocked.run("vault", "rebuild-catalog").code == 0
    assert listed(stocked, "--deleted") == ["p5"]
    assert stocked.run("point", "undelete", "p5").out.startswith("undeleted p5 of web")
    assert "it was not deleted" in stocked.run("point", "undelete", "p5").out
    assert listed(stocked) == ["p1", "p2", "p3", "p4", "p5"]


def test_pins_and_locks(stocked: Cli) -> None:
    assert stocked.run("point", "pin", "p2", "--reason", "audit", "--json").line("pinned")["point"]["pinned"] == "audit"
    refused = stocked.run("point", "delete", "p2", "--yes")
    assert refused.code == 1
    assert "point p2 is pinned: audit" in refused.err
    assert "try: stillframe point unpin p2" in refused.err
    assert stocked.run("point", "unpin", "p2").out.startswith("unpinned p2 of web")
    refused = stocked.run("point", "delete", "p1", "--now", "--yes", "--json")
    assert refused.line("error")["code"] == "Locked"
    assert "locked       until " in stocked.run("point", "show", "p1").out
    assert listed(stocked) == ["p1", "p2", "p3", "p4", "p5"]


def test_at_once_is_for_good(stocked: Cli) -> None:
    assert stocked.run("point", "delete", "p3", "--now", "--yes").code == 0
    assert listed(stocked, "--all") == ["p1", "p2", "p4", "p5"]
    assert stocked.run("point", "undelete", "p3").code == 2
    assert not (stocked.folder / "vault/points/p3").exists()
    assert stocked.run("point", "verify", "p4").code == 0


def test_expiry_tells_and_then_does(stocked: Cli) -> None:
    told = stocked.run("policy", "expire", "--dry-run", "--json")
    assert told.code == 0, told.err
    assert {line["point"]: line["reasons"] for line in told.lines} == {
        "p1": ["no rule keeps it"],
        "p2": ["no rule keeps it"],
        "p3": ["no rule keeps it"],
        "p4": ["daily: the newest of 2026-06-14"],
        "p5": ["daily: the newest of 2026-06-15", "monthly: the newest of 2026-06"],
    }
    assert listed(stocked) == ["p1", "p2", "p3", "p4", "p5"]
    refused = stocked.run("policy", "expire")
    assert refused.code == 2
    assert "no rule keeps it" in refused.err
    done = stocked.run("policy", "expire", "--yes")
    assert done.code == 0, done.err
    assert "3 of 5 points deleted" in done.out
    assert listed(stocked, "--deleted") == ["p1", "p2", "p3"]
    assert stocked.run("policy", "expire", "--vault", "none").code == 2
    again = stocked.run("policy", "expire")
    assert again.code == 0
    assert "0 of 2 points deleted" in again.out


def test_a_sweep_expires_first_and_forgets_what_it_removed(stocked: Cli) -> None:
    kept = stocked.run("vault", "sweep", "--no-expire", "--json")
    assert kept.code == 0, kept.err
    assert listed(stocked) == ["p1", "p2", "p3", "p4", "p5"]
    told = stocked.run("vault", "sweep", "--dry-run")
    assert "would expire 3 points that no rule of a policy keeps: p1, p2, p3" in told.out
    assert listed(stocked) == ["p1", "p2", "p3", "p4", "p5"]
    assert "expired   3 points" in stocked.run("vault", "sweep").out
    assert listed(stocked, "--deleted") == ["p1", "p2", "p3"]
    assert stocked.run("point", "undelete", "p2", "p3").code == 0
    stocked.configure(stocked.file.read_text().replace("[vaults.main]", "[vaults.main]\nsoft_delete_days = 0"))
    swept = stocked.run("vault", "sweep")
    assert swept.code == 0, swept.err
    assert listed(stocked, "--all") == ["p1", "p4", "p5"]


def test_policies_are_listed_and_shown(ready: Cli, stocked: Cli) -> None:
    assert "No policy is configured" in ready.run("policy", "list").out
    listing = stocked.run("policy", "list")
    assert "daily at 02:00" in listing.out
    assert "2 daily, 12 monthly" in listing.out
    assert [line["name"] for line in stocked.run("policy", "list", "--json").lines] == ["gold", "silent"]
    assert "protect      web: web" in stocked.run("policy", "show", "gold").out
    unknown = stocked.run("policy", "show", "glod")
    assert unknown.code == 2
    assert "did you mean gold?" in unknown.err


def test_a_simulation(stocked: Cli) -> None:
    simulate = ("policy", "simulate", "gold", "--days", "100", "--from", "2026-11-02")
    lines = stocked.run(*simulate, "--json").lines
    summary, *points = lines
    assert (summary["type"], summary["made"], summary["kept"], summary["peak"]) == ("simulation", 100, 5, 6)
    assert [point["time"] for point in points] == [
        "2026-11-30T02:00:00+01:00",
        "2026-12-31T02:00:00+01:00",
        "2027-01-31T02:00:00+01:00",
        "2027-02-08T02:00:00+01:00",
        "2027-02-09T02:00:00+01:00",
    ]
    assert points[-1]["reasons"] == ["daily: the newest of 2027-02-09", "monthly: the newest of 2027-02"]
    shown = stocked.run(*simulate).out
    assert "Mon 2026-11-30 02:00  monthly: the newest of 2026-11" in shown
    assert "100 points made in 100 days (daily at 02:00); 5 kept in the end, at most 6 at a time" in shown
    assert "every point is kept" in stocked.run("policy", "simulate", "silent").out
    assert stocked.run("policy", "simulate", "gold", "--from", "soon").code == 2
