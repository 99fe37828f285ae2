"""The seam that people's commands call, as far as it goes without a hypervisor: names, points, vaults, cancellation."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from orchestrator.catalog.jobs import load_job, store_job
from orchestrator.catalog.points import put_point, see_machine
from orchestrator.catalog.store import Catalog
from orchestrator.config import Config, parse_config
from orchestrator.jobs.states import JobState
from orchestrator.service import Service
from tests.controller.scripted import add_backup
from tests.controller.test_reconciler import dead
from tests.jobs.test_backup import run_backup
from tests.jobs.world import MACHINE, World
from workers.contract.errors import HypervisorUnreachable, NotFound, UsageError, VaultMissing
from workers.contract.machines import MachineRef
from workers.contract.points import Point

DB = MachineRef(hypervisor="lab", uuid="99999999-2222-3333-4444-555555555555", name="db")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = f"""
        [vaults.main]
        url = "file://{tmp_path}/vault"
        key_file = "{tmp_path}/main.key"
        [hypervisors.lab]
        uri = "test+unreachable:///x"
        [paths]
        state = "{tmp_path}/state"
        runtime = "{tmp_path}/run"
        cache = "{tmp_path}/cache"
        scratch = "{tmp_path}/scratch"
    """.replace("test+unreachable:///x", "qemu:///system?socket=/nowhere/libvirt-sock")
    return parse_config(text, tmp_path / "stillframe.toml")


@pytest.fixture
def service(config: Config) -> Iterator[Service]:
    with Service.open(config) as service:
        yield service


@pytest.fixture
def catalog(service: Service, config: Config) -> Iterator[Catalog]:
    """A second connection to the service's catalog, as another process would have."""
    assert service.settled == []
    with Catalog.open(config.catalog_url) as catalog:
        yield catalog


def made(number: int, machine: MachineRef = MACHINE) -> Point:
    """Point `number` of a machine, `number` hours after the first."""
    world = World()
    run_backup(world, "p")
    changes = {"id": f"{number:02x}" * 16, "machine": machine}
    point = world.points["p"].model_copy(update=changes)
    return point.model_copy(update={"time": point.time + timedelta(hours=number)})


def register(catalog: Catalog, *points: Point) -> None:
    with catalog.write() as session:
        for point in points:
            put_point(session, "main", point)
            see_machine(session, point.machine)


def commit(service: Service, *points: Point) -> None:
    service.init_vault("main")
    for point in points:
        service._desk.open("main").commit(point)


# --- names ---------------------------------------------------------------------------------------------------------


def test_points_are_named_in_three_ways(service: Service, catalog: Catalog) -> None:
    register(catalog, made(1), made(2), made(3, DB))
    assert [p.id[:2] for p in service.points()] == ["01", "02", "03"]
    assert [p.id[:2] for p in service.points("web")] == ["01", "02"]
    assert service.point("01").id == "01" * 16
    assert service.point("web@latest").id == "02" * 16
    assert service.point("lab/db@latest").id == "03" * 16
    assert service.point(f"{MACHINE.uuid}@latest").id == "02" * 16
    assert service.point("web@2026-11-22T01:30:00+00:00").id == "01" * 16
    assert service.point("web@2026-11-22T02:00:01+00:00").id == "02" * 16
    assert service.point("web@2026-11-22T05:00:01+02:00").id == "02" * 16


@pytest.mark.parametrize(
    ("ref", "message", "hint"),
    [
        ("ff", "no point 'ff'", "stillframe point list"),
        ("", "no point ''", "stillframe point list"),
        ("web", "no point 'web': that is a machine", "web@latest"),
        ("wbe@latest", "no point of a machine 'wbe'", "did you mean web?"),
        ("web@2026-11-21", "web has no point at or before 2026-11-21", "its first is 01010101, 2026-11-22T01:00:01"),
    ],
)
def test_point_that_is_not_there(service: Service, catalog: Catalog, ref: str, message: str, hint: str) -> None:
    register(catalog, made(1))
    with pytest.raises(NotFound) as caught:
        service.point(ref)
    assert str(caught.value) == message
    assert caught.value.hint.startswith(hint)


def test_moment_that_is_none(service: Service, catalog: Catalog) -> None:
    register(catalog, made(1))
    with pytest.raises(UsageError, match="'yesterday' is no moment"):
        service.point("web@yesterday")


def test_beginning_that_fits_two_points(service: Service, catalog: Catalog) -> None:
    register(catalog, made(0x1A), made(0x1B))
    with pytest.raises(UsageError, match="several points begin with 1"):
        service.point("1")


def test_renamed_machine_gives_its_name_away(service: Service, catalog: Catalog) -> None:
    """`web` means the machine that has the name now, not the one that once had it."""
    register(catalog, made(1))
    register(catalog, made(2, MACHINE.model_copy(update={"name": "web-old"})))
    assert [p.id[:2] for p in service.points("web")] == ["01", "02"]
    register(catalog, made(3, DB.model_copy(update={"name": "web"})))
    assert [p.id[:2] for p in service.points("web")] == ["03"]
    assert [p.id[:2] for p in service.points("web-old")] == ["01", "02"]


def test_same_name_on_two_hypervisors_must_be_told_apart(service: Service, catalog: Catalog) -> None:
    register(catalog, made(1), made(2, MachineRef(hypervisor="lab2", uuid="u2", name="web")))
    with pytest.raises(UsageError) as caught:
        service.point("web@latest")
    assert caught.value.hint == "say which: lab/web@latest, lab2/web@latest"
    assert service.point("lab2/web@latest").id[:2] == "02"


def test_unknown_machine_asks_the_hypervisor(service: Service) -> None:
    with pytest.raises(HypervisorUnreachable):
        service.points("nobody")


# --- points and vaults ---------------------------------------------------------------------------------------------


def test_catalog_lost_and_rebuilt_from_the_vault(service: Service, catalog: Catalog) -> None:
    points = [made(1), made(2), made(3, DB)]
    commit(service, *points)
    register(catalog, made(9))  # a row without a manifest
    assert service.rebuild_catalog() == 3
    assert [p.id[:2] for p in service.points()] == ["01", "02", "03"]
    assert service.point("db@latest").id[:2] == "03"


def test_init_makes_a_vault_once(service: Service) -> None:
    with pytest.raises(VaultMissing):
        service.keys.verify("main")
    assert service.vaults()[0].problem
    assert service.init_vault("main")
    assert service.init_vault("main") is None
    service.keys.verify("main")
    [view] = service.vaults()
    assert (view.points, view.problem) == (0, "")


def test_restore_of_a_disk_that_the_point_lacks(service: Service, catalog: Catalog, tmp_path: Path) -> None:
    register(catalog, made(1))
    with pytest.raises(NotFound) as caught:
        service.start_restore_disk("web@latest", "vdz", to=tmp_path / "x", format=None)
    assert caught.value.hint == "it has: vda, vdb"
    assert service.jobs() == []


# --- jobs ----------------------------------------------------------------------------------------------------------


def test_cancel_reaches_the_job_of_another_process(service: Service, catalog: Catalog) -> None:
    add_backup(catalog, "one")
    service.cancel("on")
    view = service.job("one")
    assert (view.state, view.events[-1].kind) == (JobState.CANCELLED, "cancel_requested")
    with pytest.raises(UsageError, match="has cancelled already"):
        service.cancel("one")


def test_waiting_for_a_job_whose_process_dies_settles_it(service: Service, catalog: Catalog) -> None:
    add_backup(catalog, "one", of=dead())
    seen = []
    view = service.wait("one", on_progress=lambda view: seen.append(view.state))
    assert view.state is JobState.FAILED
    assert view.error is not None
    assert view.error.code == "WorkerLost"
    assert seen == [JobState.QUEUED, JobState.FAILED]


def test_opening_settles_what_was_left(config: Config) -> None:
    with Catalog.open(config.catalog_url) as catalog:
        add_backup(catalog, "one", of=dead())
    with Service.open(config) as service:
        assert service.settled == [
            "backup one of web, left behind by a process that is gone: released, nothing of it is left"
        ]
        assert service.job("one").machine == "web"


def test_lost_job_on_an_unreachable_hypervisor_keeps_its_obligations(config: Config) -> None:
    with Catalog.open(config.catalog_url) as catalog:
        job = add_backup(catalog, "one", of=dead())
        with catalog.write() as session:
            store_job(session, job.model_copy(update={"state": JobState.SNAPSHOTTING, "must_thaw": True}), 0)
        with Service.open(config) as service:
            assert "could not be released" in service.settled[0]
        with catalog.read() as session:
            row, stored = load_job(session, "one")
        assert row.leftover
        assert stored.model_dump()["must_thaw"]
