"""What the catalog makes of hypervisors' answers; the answers are handed over, as a controller gets them of workers."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from orchestrator.catalog import machines as cache
from orchestrator.catalog.alerts import standing_alerts
from orchestrator.catalog.points import put_point, see_machine, seen_machines
from orchestrator.catalog.schema import MachineRow
from orchestrator.catalog.store import Catalog
from orchestrator.config import parse_config
from orchestrator.discovery import News
from orchestrator.machine_desk import MachineDesk
from orchestrator.machine_news import MachineNews
from tests.controller.test_service import made
from workers.context import Context
from workers.contract.errors import ErrorInfo
from workers.contract.machines import Disk, MachineRef, MachineSummary, Power
from workers.contract.messages import ListMachines, MachinesListed

NOW = datetime.now(UTC)
AWAY = ErrorInfo(code="HypervisorUnreachable", message="no route to host", retryable=True)
DISK = Disk(target="vda", source="/a", format="raw", capacity=512, identity="/a", tracks_changes=False)


class Lab:
    """A desk of two hypervisors, whose questions are kept."""

    def __init__(self, folder: Path) -> None:
        text = f"""
            [vaults.main]
            url = "file://{folder}/vault"
            key_file = "{folder}/main.key"
            [hypervisors.a]
            uri = "qemu:///system"
            [hypervisors.b]
            uri = "qemu:///system"
            [policies.gold]
            schedule = "hourly"
            [protect.all]
            machines = ["web"]
            policy = "gold"
        """
        self.config = parse_config(text, folder / "stillframe.toml")
        self.catalog = Catalog.open(f"sqlite:///{folder}/catalog.db")
        self.asked: list[ListMachines] = []
        self.news = MachineNews(lambda: self.config, self.catalog)
        context = Context(self.config.worker)
        self.desk = MachineDesk(lambda: self.config, self.catalog, context, self.news, self.asked.append)
        self.time = NOW

    def hear(self, hypervisor: str, *machines: str, error: ErrorInfo | None = None) -> list[str]:
        """`web=running`, as that hypervisor lists them; what is news, in words."""
        found = []
        for word in machines:
            uuid, _, power = word.partition("=")
            ref = MachineRef(hypervisor=hypervisor, uuid=uuid, name=uuid)
            found.append(MachineSummary(machine=ref, power=Power(power), disks=[]))
        listing = MachinesListed(hypervisor=hypervisor, asked=self.time, machines=found, error=error)
        return [kind for change in self.news.heard([listing], self.time) for kind, _ in change.news]

    def turn(self, **minutes: float) -> None:
        """The controller's next round."""
        self.time += timedelta(**minutes or {"minutes": 5})
        self.desk.turn(self.time)

    @property
    def rows(self) -> dict[str, MachineRow]:
        with self.catalog.read() as session:
            return {row.uuid: row for row in seen_machines(session)}

    @property
    def alerts(self) -> dict[str, str]:
        with self.catalog.read() as session:
            return {row.key: row.text for row in standing_alerts(session)}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    lab.catalog.close()


def test_each_hypervisor_is_asked_in_each_round(lab: Lab) -> None:
    [chore] = lab.desk.chores()
    chore.act(NOW)
    assert [(command.hypervisor, command.disks) for command in lab.asked] == [("a", False), ("b", False)]
    assert lab.hear("a", "web=running") == ["new"]
    assert (lab.rows["web"].hypervisor, lab.rows["web"].power) == ("a", "running")


def test_a_machine_that_moves_is_never_gone(lab: Lab) -> None:
    lab.turn()
    lab.hear("b")
    lab.hear("a", "web=running")
    lab.turn()
    lab.hear("b")  # still on its way
    assert lab.hear("a") == []
    assert (lab.rows["web"].gone, lab.alerts) == (None, {})
    lab.turn()
    assert lab.hear("b", "web=running") == []  # a has not answered yet
    assert lab.hear("a") == ["moved"]
    assert (lab.rows["web"].hypervisor, lab.rows["web"].missed, lab.alerts) == ("b", None, {})


def test_a_disappearance_is_told_once_and_a_return_too(lab: Lab) -> None:
    lab.hear("a", "web=off", "scrap=off")
    lab.hear("b")
    for _ in range(3):
        lab.turn()
        lab.hear("a")
        lab.hear("b")
    assert lab.rows["web"].gone is not None
    assert lab.rows["scrap"].gone is not None
    assert list(lab.alerts) == ["machine-gone machine:web"], "nobody protects scrap, and it has no point"
    with lab.catalog.read() as session:
        assert [row.count for row in standing_alerts(session)] == [1]
    assert lab.hear("a", "web=running") == [News.BACK]
    assert (lab.rows["web"].gone, lab.alerts) == (None, {})


def test_a_machine_with_points_is_missed_although_nobody_protects_it(lab: Lab) -> None:
    point = made(1, MachineRef(hypervisor="a", uuid="scrap", name="scrap"))
    with lab.catalog.write() as session:
        put_point(session, "main", point)
        see_machine(session, point.machine)
    lab.hear("a")
    lab.hear("b")
    lab.turn()
    assert lab.rows["scrap"].gone is None, "nobody has answered since it was missed"
    lab.hear("a")
    lab.hear("b")
    assert "machine-gone machine:scrap" in lab.alerts


def test_a_silent_hypervisor_keeps_its_machines_and_is_told_of(lab: Lab) -> None:
    lab.hear("a", "web=running")
    lab.hear("b")
    lab.hear("a", error=AWAY)
    for _ in range(2):
        lab.turn()
        lab.hear("b")
    assert lab.rows["web"].gone is None
    assert "no answer within 60 s" in lab.alerts["hypervisor-silent hypervisor:a"]
    found, look = lab.desk.listed(ask=False)
    assert [(one.summary.machine.name, one.problem != "") for one in found] == [("web", True)]
    assert list(look.silent) == ["a"]
    lab.hear("a", "web=running")
    assert lab.alerts == {}


def test_running_twice_is_told_when_the_next_round_says_so_too(lab: Lab) -> None:
    lab.turn()
    lab.hear("a", "web=running")
    assert lab.hear("b", "web=running") == ["doubtful"]
    assert lab.alerts == {}
    found, _ = lab.desk.listed(ask=False)
    assert [one.summary.machine.hypervisor for one in found] == ["a", "b"], "so that one must be named"
    lab.turn()
    assert list(lab.alerts) == ["machine-twice machine:web"]
    lab.hear("b")
    assert lab.hear("a", "web=running") == ["clear"]
    assert (lab.rows["web"].doubt, lab.alerts) == ("", {})


def test_a_hypervisor_that_was_taken_out_of_the_configuration_takes_its_machines_along(lab: Lab) -> None:
    with lab.catalog.write() as session:
        see_machine(session, MachineRef(hypervisor="old", uuid="web", name="web"))
    for _ in range(2):
        lab.turn()
        lab.hear("a")
        lab.hear("b")
    assert lab.rows["web"].gone is not None


def test_a_quick_look_does_not_forget_disks(lab: Lab) -> None:
    ref = MachineRef(hypervisor="a", uuid="web", name="web")
    full = MachineSummary(machine=ref, power=Power.OFF, disks=[DISK], tags=["gold", "nightly"])
    lab.news.heard([MachinesListed(hypervisor="a", asked=NOW, machines=[full], disks=True)])
    bare = full.model_copy(update={"disks": [], "power": Power.RUNNING})
    lab.news.heard([MachinesListed(hypervisor="a", asked=NOW, machines=[bare])])
    found, _ = lab.desk.listed(ask=False)
    assert found[0].summary == full.model_copy(update={"power": Power.RUNNING})
    assert lab.rows["web"].tags == "gold\nnightly"


def test_who_knows_only_what_runs_has_lost_nothing(lab: Lab) -> None:
    lab.hear("a", "web=running")
    lab.news.heard([MachinesListed(hypervisor="a", asked=NOW, complete=False)])
    assert (lab.rows["web"].power, lab.rows["web"].missed) == ("off", None)


def test_what_a_job_sees_leaves_the_rest_as_it_is(lab: Lab) -> None:
    lab.hear("a", "web=running")
    with lab.catalog.write() as session:
        see_machine(session, MachineRef(hypervisor="a", uuid="web", name="www"))
        see_machine(session, MachineRef(hypervisor="x", uuid="web", name="old"), NOW - timedelta(days=1))
    row = lab.rows["web"]
    assert (row.hypervisor, row.name, row.power) == ("a", "www", "running")


def test_a_large_fleet_is_kept_up_to_date_in_passing(lab: Lab) -> None:
    """1,000 machines of one hypervisor, of which nothing has changed."""
    words = [f"m{number}=running" for number in range(1000)]
    assert len(lab.hear("a", *words)) == 1000
    with lab.catalog.read() as session:
        assert len(cache.concerned(session, ["a"])) == 1000
    began = datetime.now(UTC)
    assert lab.hear("a", *words) == []
    assert datetime.now(UTC) - began < timedelta(seconds=2)
