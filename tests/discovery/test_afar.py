"""Hypervisors that only a worker can reach: asked over a real broker, whose answers any controller may hear."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from orchestrator.catalog.owner import NOBODY
from orchestrator.catalog.points import seen_machines
from orchestrator.config import Config, parse_config
from orchestrator.control import Control
from orchestrator.service import Service
from workers.app import make_app
from workers.context import Context
from workers.host import HostWorker


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Config]:
    """With a broker that runs, a hypervisor with a worker, and one without."""
    port = free_port()
    argv = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as redis:
        assert redis.stdout is not None
        while "Ready to accept" not in (line := redis.stdout.readline()):
            assert line, "Redis does not start"
        text = f"""
            [paths]
            state = "{tmp_path}/state"
            runtime = "{tmp_path}/run"
            [broker]
            url = "redis://127.0.0.1:{port}/0"
            [vaults.main]
            url = "file://{tmp_path}/vault"
            key_file = "{tmp_path}/main.key"
            [hypervisors.far]
            uri = "qemu:///system"
            [hypervisors.lost]
            uri = "qemu:///system"
        """
        yield parse_config(text, tmp_path / "stillframe.toml")
        redis.terminate()


@pytest.mark.usefixtures("libvirt_host")
def test_a_worker_lists_for_those_who_cannot_reach_the_hypervisor(config: Config) -> None:
    app = make_app(broker_url=config.broker_url, backend_url=config.broker_url)
    with (
        Service.open(config) as service,
        HostWorker(app, Context(config.worker), ["far"]),
        Control(lambda: config, service.catalog, service.engine),
    ):
        assert service.engine.owner("far") == NOBODY
        look = service.machine_desk.look("far", disks=True)
        assert look.silent == {}
        service.machine_desk.turn(datetime.now(UTC))
        look = service.machine_desk.look(seconds=3)
        assert list(look.silent) == ["lost"]
        assert "no worker has asked it" in look.silent["lost"].message
        assert look.silent["lost"].hint == "stillframe worker --hypervisor lost"
        with service.catalog.read() as session:
            assert {row.hypervisor for row in seen_machines(session)} <= {"far"}
