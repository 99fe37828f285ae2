"""The screen for the morning, and the commands about alerts and the audit log, over catalogs made for the purpose."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from orchestrator.alarms import Severity, Topic, of_machine
from orchestrator.catalog.alerts import raise_alert
from orchestrator.catalog.points import put_point, see_machine
from orchestrator.catalog.schema import JobRow, LeaseRow, MachineRow, VaultLookRow, WorkerRow
from orchestrator.catalog.store import Catalog
from orchestrator.cli.main import run
from tests.cli.conftest import Cli, Ran, write_configuration
from tests.jobs.test_backup import run_backup
from tests.jobs.world import World
from workers.contract.machines import MachineRef
from workers.contract.points import Point

HOSTILE = "x\x1b[31m\n../" + "y" * 300


def uuid(number: int) -> str:
    return f"{number:08x}-2222-3333-4444-555555555555"


def a_point() -> Point:
    world = World()
    run_backup(world, "p")
    return world.points["p"]


def fill(catalog: Catalog, machines: int, *, name: str = "web-{}", failing: int = 0, age: int = 6) -> None:
    """So many machines, each with a point of some hours ago, the first `failing` of them with an alert."""
    now, template = datetime.now(UTC), a_point()
    with catalog.write() as session:
        for number in range(machines):
            machine = MachineRef(hypervisor="lab1", uuid=uuid(number), name=name.format(number))
            see_machine(session, machine)
            session.get_one(MachineRow, machine.uuid).power = "running"
            changes = {"id": f"{number:032x}", "machine": machine, "time": now - timedelta(hours=age)}
            put_point(session, "main", template.model_copy(update=changes))
        for number in range(failing):
            key = of_machine(Topic.BACKUP_FAILED, uuid(number))
            severity = Severity.CRITICAL if number == 0 else Severity.WARNING
            raise_alert(
                session, key, severity, name.format(number), "no space left on " + "z" * 400, "stillframe job list"
            )
        session.add(LeaseRow(name="leader", holder="ctl1 4711", until=now + timedelta(minutes=5)))
        session.add(VaultLookRow(vault="main", time=now - timedelta(days=2), used_bytes=1 << 40, free_bytes=5 << 40))
        session.add(VaultLookRow(vault="main", time=now, used_bytes=(1 << 40) + (20 << 30), free_bytes=5 << 40))


@dataclass(frozen=True)
class Here(Cli):
    """The command, run in this process: a start of its own costs more than all that is looked at here."""

    capture: pytest.CaptureFixture[str]

    def run(self, *arguments: str | Path, stdin: str | None = None, env: dict[str, str] | None = None) -> Ran:  # noqa: ARG002
        self.capture.readouterr()
        code = run([*map(str, arguments), "--config", str(self.file)])
        shown = self.capture.readouterr()
        return Ran(code, shown.out, shown.err)


@pytest.fixture
def scheduled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Here:
    cli = Here(tmp_path, capsys)
    write_configuration(cli)
    with cli.file.open("a") as file:
        file.write('[policies.gold]\nschedule = "daily at 02:00"\n[protect.all]\nmachines = ["*"]\npolicy = "gold"\n')
    (cli.folder / "main.key").write_text("")
    return cli


def catalog_of(cli: Cli) -> Catalog:
    return Catalog.open(f"sqlite:///{cli.folder}/state/catalog.sqlite")


def width(text: str) -> int:
    return max(map(len, text.splitlines()))


def test_three_machines_that_are_well(scheduled: Here) -> None:
    with catalog_of(scheduled) as catalog:
        fill(catalog, 3)
    done = scheduled.run("status")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("all is well")
    assert "3 known, 3 with a point of the last 24 hours" in done.out
    assert done.out.count("web-") == 3
    assert "6 h" in done.out
    assert done.out.count("02:00") >= 3, "when the next one is due"
    assert "1.0 TiB" in done.out
    assert "+10.0 GiB" in done.out
    assert "controller ctl1 4711" in done.out
    assert width(done.out) <= 100


def test_three_hundred_machines_fit_one_screen(scheduled: Here) -> None:
    with catalog_of(scheduled) as catalog:
        fill(catalog, 300, failing=40)
    done = scheduled.run("status")
    assert done.code == 3
    assert done.out.startswith("1 critical, 39 warning")
    assert done.out.index("CRITICAL") < done.out.index("WARNING")
    assert "and 30 more: stillframe alert list" in done.out
    assert "and 290 more: stillframe status --all" in done.out
    assert "try: stillframe job list" in done.out
    assert width(done.out) <= 100
    assert len(done.out.splitlines()) < 75
    assert scheduled.run("status", "--all").out.count("\nweb-") == 300


def test_names_from_machines_do_not_steer_the_terminal(scheduled: Here) -> None:
    with catalog_of(scheduled) as catalog:
        fill(catalog, 2, name=HOSTILE + "{}", failing=1)
    done = scheduled.run("status")
    assert "\x1b" not in done.out
    assert width(done.out) <= 100


def test_nobody_who_runs_what_is_due_is_the_first_news(scheduled: Here) -> None:
    with catalog_of(scheduled) as catalog:
        fill(catalog, 1)
        with catalog.write() as session:
            session.get_one(LeaseRow, "leader").until = datetime.now(UTC) - timedelta(seconds=1)
    done = scheduled.run("status")
    assert done.code == 3
    assert done.out.startswith("no controller")
    assert "try: stillframe serve" in done.out


def test_without_a_controller_it_looks_by_itself(scheduled: Here) -> None:
    with catalog_of(scheduled) as catalog:
        fill(catalog, 2, age=100)
        with catalog.write() as session:
            session.delete(session.get_one(LeaseRow, "leader"))
    done = scheduled.run("status")
    assert "its last point is 4 days old, and its schedule makes one in 24 hours" in done.out
    assert "try: stillframe backup run web-0" in done.out


def test_a_vault_that_is_away_is_told_when_nobody_looked(scheduled: Here) -> None:
    done = scheduled.run("status")
    assert done.code == 3
    assert "CRITICAL  vault main: " in done.out
    assert "cannot be used" in done.out


def test_for_programs(scheduled: Here) -> None:
    now = datetime.now(UTC)
    with catalog_of(scheduled) as catalog:
        fill(catalog, 30, failing=1)
        with catalog.write() as session:
            session.add(WorkerRow(name="w1", host="h", pid=1, hypervisors="lab1", seen=now - timedelta(minutes=3)))
            session.add(job_row(now))
    done = scheduled.run("status", "--json")
    head = done.line("status")
    assert (done.code, head["ok"], head["machines"], head["alerts"], head["leader"]) == (3, False, 30, 1, "ctl1 4711")
    assert sum(line["type"] == "machine_status" for line in done.lines) == 30
    assert done.line("worker_status")["alive"] is False
    assert done.line("job_status")["state"] == "transferring"
    assert {line["consistency"] for line in done.lines if line["type"] == "machine_status"} == {"filesystem"}
    shown = scheduled.run("status").out
    assert "1 runs, 0 wait" in shown
    assert "SILENT for 3 min" in shown


def job_row(now: datetime) -> JobRow:
    return JobRow(
        id="aa11",
        kind="backup",
        machine_uuid=uuid(1),
        machine_name="web-1",
        hypervisor="lab1",
        vault="main",
        lock=f"machine:{uuid(1)}",
        state="transferring",
        owner_host="elsewhere",
        owner_boot="",
        owner_pid=1,
        owner_started=1,
        created=now,
        updated=now,
        doc="{}",
    )


def test_an_acknowledged_alert_stands_and_counts_no_more(scheduled: Here) -> None:
    with catalog_of(scheduled) as catalog:
        fill(catalog, 1, failing=1)
    listed = scheduled.run("alert", "list")
    assert "critical" in listed.out
    seen = scheduled.run("alert", "acknowledge", "1")
    assert (seen.code, "acknowledged  by " in seen.out) == (0, True)
    done = scheduled.run("status")
    assert (done.code, done.out.startswith("all is well")) == (0, True)
    assert "and 1 more: stillframe alert list" in done.out
    assert "seen" in scheduled.run("alert", "list").out
    assert scheduled.run("alert", "show", "1", "--json").line("alert")["acknowledged"]
    [entry] = [line for line in scheduled.run("audit", "list", "--json").lines if line["action"] == "alert.acknowledge"]
    assert entry["subject"] == "1"


def test_alerts_that_are_not_there(scheduled: Here) -> None:
    assert scheduled.run("alert", "list").out == "No alert stands.\n"
    assert scheduled.run("alert", "list", "--all").out == "No alert yet.\n"
    for word in ("show", "acknowledge"):
        done = scheduled.run("alert", word, "7")
        assert (done.code, "no alert 7" in done.err) == (2, True)
    assert scheduled.run("alert", "show", "seven").code == 2


def test_a_command_leaves_its_trace_and_a_refused_one_both(scheduled: Here) -> None:
    ready = scheduled
    (ready.folder / "main.key").unlink()
    assert ready.run("init").code == 0
    assert ready.run("point", "pin", "ffff", "--reason", "for the court").code == 2
    assert ready.run("vault", "sweep", "--dry-run").code == 0
    assert ready.run("vault", "sweep").code == 0
    lines = ready.run("audit", "list", "--json").lines
    said = [(line["action"], line["subject"], line["detail"].partition(":")[0]) for line in lines]
    pins = [one for one in said if one[0] == "point.pin"]
    assert pins == [("point.pin", "ffff", "reason for the court"), ("point.pin", "ffff", "refused")]
    assert said[-1] == ("vault.sweep", "main", "")
    assert [line["subject"] for line in lines if line["action"] == "vault.sweep"] == ["main"]
    assert all("@" in line["actor"] for line in lines)
    assert ready.run("audit", "list", "--action", "point", "--json").lines == [
        line for line in lines if line["action"] == "point.pin"
    ]
    assert ready.run("audit", "list", "--actor", "nobody-of-that-name").out == "Nothing is in the audit log.\n"
