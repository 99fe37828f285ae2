"""What the control plane costs: per job, embedded and distributed, and what `serve` costs when nothing is to be done.

python -m tests.bench.control [--jobs N] [--machines N] [--seconds N]

Commands are performed by a small world in memory, in no time: what is left of a job's time is queue, broker, catalog.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from orchestrator.catalog import owner
from orchestrator.catalog.jobs import add_job
from orchestrator.catalog.points import see_machine
from orchestrator.catalog.schema import JobRow
from orchestrator.catalog.store import Catalog
from orchestrator.controller import Controller, register
from orchestrator.dispatcher import Dispatcher, Limits
from orchestrator.jobs.backup_job import BackupJob
from tests.distributed import process
from tests.distributed.place import make_place, wait_until
from tests.distributed.process import ScriptedTasks
from tests.servers.postgres import Postgres
from tests.servers.redis import Redis
from workers import app as celery
from workers.config import WorkerConfig
from workers.context import Context
from workers.contract.machines import MachineRef

ENDED = {"succeeded", "failed"}


def seconds_of(catalog: Catalog, job: str) -> float:
    """From being asked for to its end, by the catalog."""
    with catalog.read() as session:
        row = session.get(JobRow, job)
        assert row is not None
        assert row.state == "succeeded"
        return (row.updated - row.created).total_seconds()


def state_of(catalog: Catalog, job: str) -> str:
    with catalog.read() as session:
        row = session.get(JobRow, job)
    return row.state if row else ""


def embedded(folder: Path, jobs: int) -> list[float]:
    process.TRANSFER_SECONDS = 0
    mine = owner.this_process()
    app = celery.make_app(backend_url=f"file://{folder}/results")
    found = []
    with Catalog.open(f"sqlite:///{folder}/embedded.db") as catalog:
        controller = Controller(catalog, lambda command, queue: celery.send(app, command, queue))
        ScriptedTasks(app, Context(WorkerConfig(vaults={}, hypervisors={})))
        register(app, controller, lambda job, error: print(job, error))
        dispatcher = Dispatcher(catalog, controller, lambda: Limits({"lab1": 2}, {}), mine)
        with celery.ThreadWorkers(app, celery.plans_for(["lab1"], control=True)):
            for number in range(jobs):
                machine = MachineRef(hypervisor="lab1", uuid=f"u{number}", name=f"m{number}")
                job = BackupJob(id=f"job{number}", machine=machine, vault="main", point=f"p{number}")
                with catalog.write() as session:
                    add_job(session, job, mine, machine=(machine.uuid, machine.name), lock=f"machine:{machine.uuid}")
                dispatcher.dispatch()
                wait_until(lambda job=job: state_of(catalog, job.id) in ENDED, 30)  # type: ignore[misc]
                found.append(seconds_of(catalog, job.id))
    return found


def distributed(folder: Path, jobs: int) -> list[float]:
    redis, postgres = Redis(folder / "redis"), Postgres(folder / "postgres")
    redis.start()
    postgres.start()
    place = make_place(folder, postgres.new_database(), redis.url)
    app = celery.make_app(broker_url=redis.url, backend_url=redis.url)
    try:
        place.start("controller")
        place.start("worker", "lab1")
        found = []
        for number in range(jobs):
            job = place.queue(f"m{number}", "lab1")
            celery.wake(app)
            wait_until(lambda job=job: state_of(place.catalog, job) in ENDED, 30)  # type: ignore[misc]
            found.append(max(0.0, seconds_of(place.catalog, job) - process.TRANSFER_SECONDS))
        return found
    finally:
        place.close()
        redis.kill()
        postgres.remove()


def idle(folder: Path, machines: int, seconds: int) -> tuple[float, float]:
    """(MiB of memory, share of a core) of `serve` with so many machines in its catalog."""
    config = folder / "serve.toml"
    config.write_text(f"""
[vaults.main]
url = "file://{folder}/vault"
key_file = "{folder}/main.key"
[hypervisors.lab1]
uri = "qemu:///system?socket=/nowhere/sock"
[policies.daily]
schedule = "daily at 02:00"
spread = "4 hours"
[protect.all]
machines = ["*"]
policy = "daily"
[paths]
state = "{folder}/state"
runtime = "{folder}/run"
cache = "{folder}/cache"
scratch = "{folder}/scratch"
""")
    stillframe = [sys.executable, "-m", "orchestrator.cli.main", "--config", str(config)]
    subprocess.run([*stillframe, "init"], check=True, capture_output=True)
    with Catalog.open(f"sqlite:///{folder}/state/catalog.db") as catalog, catalog.write() as session:
        for number in range(machines):
            see_machine(session, MachineRef(hypervisor="lab1", uuid=f"uuid{number}", name=f"m{number}"))
    served = subprocess.Popen([*stillframe, "serve"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(20)
        before = _cpu(served.pid)
        time.sleep(seconds)
        share = (_cpu(served.pid) - before) / seconds
        status = Path(f"/proc/{served.pid}/status").read_text()
        memory = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024
    finally:
        served.terminate()
        served.wait(90)
    return memory, share


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--machines", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stillframe-bench-", dir="/dev/shm") as name:
        folder = Path(name)
        folder.chmod(0o755)
        for form, measure, aim in (("embedded", embedded, 1.0), ("distributed", distributed, 2.0)):
            times = measure(folder, options.jobs)
            print(f"{form}: {statistics.median(times):.3f} s a job, at most {max(times):.3f} s (aim: {aim} s)")
        memory, share = idle(folder, options.machines, options.seconds)
        print(f"serve, idle: {memory:.0f} MiB (aim: 150), {100 * share:.2f} % of a core (aim: 1)")


if __name__ == "__main__":
    main()
