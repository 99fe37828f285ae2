"""A distributed Stillframe of a test: its configuration, its servers, its processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from orchestrator.catalog.jobs import BACKUP, Ticket, add_job
from orchestrator.catalog.owner import NOBODY
from orchestrator.catalog.schema import JobRow
from orchestrator.catalog.store import Catalog
from orchestrator.jobs.backup_job import BackupJob
from workers.contract.machines import MachineRef

ROOT = Path(__file__).parents[2]


@dataclass
class Place:
    """`catalog` is a connection of the test's own."""

    folder: Path
    config: Path
    catalog: Catalog
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, role: str, *names: str) -> subprocess.Popen[str]:
        """A controller, or a worker of a hypervisor; returns when it is up."""
        argv = [sys.executable, "-m", "tests.distributed.process", role, str(self.config), *names]
        with (self.folder / f"{role}-{len(self.processes)}.log").open("w") as log:
            process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.processes.append(process)
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == "up\n", (self.folder / f"{role}.log").read_text()
        return process

    def queue(self, name: str, hypervisor: str, *, due: datetime | None = None, priority: int = BACKUP) -> str:
        """A backup of a machine of that name, as a controller or a command would add it."""
        machine = MachineRef(hypervisor=hypervisor, uuid=f"uuid-{name}", name=name)
        job = BackupJob(id=f"j-{name}", machine=machine, vault="main", point=f"point-{name}")
        with self.catalog.write() as session:
            named, lock = (machine.uuid, name), f"machine:{machine.uuid}"
            add_job(session, job, NOBODY, machine=named, lock=lock, ticket=Ticket(priority, due=due))
        return job.id

    def states(self, jobs: Sequence[str]) -> dict[str, str]:
        with self.catalog.read() as session:
            rows = [session.get(JobRow, job) for job in jobs]
        return {row.id: row.state for row in rows if row is not None}

    def close(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
        self.catalog.close()


def wait_until(what: Callable[[], bool], seconds: float, why: Callable[[], object] = lambda: "") -> None:
    """Look again and again. Raises AssertionError, with `why`, when the time is over."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, why()
        time.sleep(0.05)


CONFIG = """
[catalog]
url = "{catalog}"
[broker]
url = "{broker}"
[vaults.main]
url = "file://{folder}/vault"
key_file = "{folder}/main.key"
[hypervisors.lab1]
uri = "qemu:///system?socket=/nowhere/one"
[hypervisors.lab2]
uri = "qemu:///system?socket=/nowhere/two"
[extension]
install = false
[paths]
state = "{folder}/state"
runtime = "{folder}/run"
cache = "{folder}/cache"
scratch = "{folder}/scratch"
{more}
"""


def make_place(folder: Path, catalog_url: str, broker_url: str, more: str = "") -> Place:
    config = folder / "stillframe.toml"
    config.write_text(CONFIG.format(catalog=catalog_url, broker=broker_url, folder=folder, more=more))
    return Place(folder, config, Catalog.open(catalog_url))
