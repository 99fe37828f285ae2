"""`schedule show`, `policy apply`, `config`, `vm protect` as people type them; the hypervisor does not answer."""

from __future__ import annotations

import pytest

from orchestrator.catalog.points import see_machine
from orchestrator.catalog.schema import MachineRow, SightingRow
from orchestrator.catalog.store import Catalog
from orchestrator.config import load_config
from tests.cli.conftest import Cli
from workers.contract.machines import MachineRef, MachineSummary, Power

POLICIES = """
[policies.gold]
schedule = "daily at 02:00"
timezone = "UTC"
[policies.weekly]
schedule = "weekly at 02:00"
[protect.web]
machines = ["web-*"]
policy = "gold"
"""


@pytest.fixture
def fleet(configured: Cli) -> Cli:
    """Four machines that the hypervisor had when it last answered."""
    configured.configure(configured.file.read_text() + POLICIES)
    config = load_config(configured.file)
    with Catalog.open(config.catalog_url) as catalog, catalog.write() as session:
        for number, name in enumerate(["web-1", "web-2", "db", "e\x1b[31mvil"]):
            machine = MachineRef(hypervisor="lab1", uuid=f"{number:032x}", name=name)
            see_machine(session, machine)
            row = session.get(MachineRow, machine.uuid)
            assert row is not None
            row.power = "running"
            summary = MachineSummary(machine=machine, power=Power.RUNNING, disks=[])
            session.add(SightingRow(hypervisor="lab1", uuid=machine.uuid, doc=summary.model_dump_json()))
    return configured


def test_what_begins_next(fleet: Cli) -> None:
    shown = fleet.run("schedule", "show")
    assert shown.code == 0
    assert [line.split()[2] for line in shown.out.splitlines() if "daily at 02:00" in line] == ["web-1", "web-2"]
    assert "not: db, e\N{REPLACEMENT CHARACTER}[31mvil: no [protect.*] section covers it" in shown.out
    assert "no controller runs" in shown.err
    one = fleet.run("schedule", "show", "web-2", "--count", "3", "--json")
    assert [(line["machine"], line["begins"][11:16]) for line in one.lines] == [("web-2", "02:00")] * 3
    unknown = fleet.run("schedule", "show", "web-3")
    assert (unknown.code, "did you mean web-" in unknown.err) == (2, True)


def test_a_plan_is_shown_and_is_a_difference(fleet: Cli) -> None:
    first = fleet.run("policy", "apply", "--dry-run", "--json")
    assert [(line["change"], line["machine"]) for line in first.lines if line["type"] == "change"] == [
        ("protected", "web-1"),
        ("protected", "web-2"),
    ]
    asked = fleet.run("policy", "apply")
    assert (asked.code, "add --yes" in asked.err) == (2, True)
    assert "in force for 2 machines" in fleet.run("policy", "apply", "--yes").out
    new = fleet.folder / "new.toml"
    new.write_text(fleet.file.read_text().replace('policy = "gold"', 'policy = "weekly"').replace("web-*", "web-1"))
    planned = fleet.run("policy", "apply", new, "--yes", "--json")
    assert planned.code == 0, planned.err
    changes = {line["machine"]: line for line in planned.lines if line["type"] == "change"}
    assert changes["web-2"]["change"] == "unprotected"
    assert changes["web-1"]["differences"][0] == {"field": "policy", "before": "gold", "after": "weekly"}
    assert fleet.file.read_text() == new.read_text()
    assert fleet.run("policy", "apply").out.startswith("nothing changes; 1 protected as before")
    new.write_text(new.read_text().replace("schedule", "shedule", 1))
    wrong = fleet.run("policy", "apply", new, "--yes")
    assert (wrong.code, "new.toml:" in wrong.err, "did you mean schedule" in wrong.err) == (2, True, True)


def test_a_machine_into_the_file_and_out_of_it(fleet: Cli) -> None:
    before = fleet.file.read_text()
    looked = fleet.run("vm", "protect", "db", "--policy", "weekly", "--dry-run")
    assert '+machines = ["db"]' in looked.out
    assert fleet.file.read_text() == before
    done = fleet.run("vm", "protect", "db", "--policy", "weekly")
    assert "db is protected by policy weekly; its next backup begins" in done.out
    assert "it last had them" in done.err, "its hypervisor does not answer"
    out = fleet.run("vm", "unprotect", "db", "--keep-extension", "--yes")
    assert (out.code, fleet.file.read_text()) == (0, before + "\n")
    wrong = fleet.run("vm", "protect", "db", "--policy", "wekly")
    assert (wrong.code, "did you mean weekly?" in wrong.err) == (2, True)


def test_a_configuration_is_checked(fleet: Cli) -> None:
    checked = fleet.run("config", "check", "--json")
    assert (checked.code, checked.line("doubt")["text"]) == (3, "no [protect.*] section uses policy weekly")
    text = fleet.file.read_text()
    fleet.configure(text + '[protect.a]\nmachines = ["a"]\npolicy = "gld"\n')
    wrong = fleet.run("config", "check")
    assert (wrong.code, "no policy is named 'gld'; did you mean gold?" in wrong.err) == (2, True)
    fleet.configure(text + '[upkeep]\nsweeep = "never"\n')
    wrong = fleet.run("config", "show", "--origin")
    assert (wrong.code, "unknown key 'sweeep' in [upkeep]; did you mean sweep?" in wrong.err) == (2, True)
    fleet.configure(text)
    shown = fleet.run("config", "show", "--origin", "--json")
    [schedule] = [line for line in shown.lines if line["key"] == "policies.gold.schedule"]
    assert schedule["value"] == "daily at 02:00"
    assert schedule["origin"].startswith(f"{fleet.file}:")


def test_a_broker_that_does_not_answer_is_no_defect(fleet: Cli) -> None:
    fleet.configure(fleet.file.read_text() + '[broker]\nurl = "redis://127.0.0.1:1/0"\n')
    ran = fleet.run("vm", "list", "--refresh")
    assert ran.code == 1, ran
    assert "the broker does not answer" in ran.err
    assert "[broker]" in ran.err
    assert "defect" not in ran.err
