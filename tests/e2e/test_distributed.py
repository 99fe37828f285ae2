"""The distributed form for real: two hypervisor hosts, each with its own libvirtd and its worker; Redis, PostgreSQL,
two controllers, one vault; all asked for on the command line, with one configuration. Then all is killed, in turn.

The machines are QEMUs with disks behind them that nobody boots: blocks, bitmaps, snapshots and jobs are all there.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_machine import _DISK, _MACHINE
from tests.distributed.place import ROOT, wait_until
from tests.hosts.host import Host, pid_of, start_host
from tests.servers.postgres import Postgres
from tests.servers.redis import Redis
from workers.tools import run

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]
MIB = 1 << 20
SIZE = 32 * MIB
SILENT = "25"
"""Seconds; a worker beats every ten."""
CONFIG = """
[catalog]
url = "{catalog}"
[broker]
url = "{broker}"
[vaults.main]
url = "file://{folder}/vault"
key_file = "{folder}/main.key"
[hypervisors.lab1]
uri = "qemu:///system"
bandwidth = "8MiB"
[hypervisors.lab2]
uri = "qemu:///system"
bandwidth = "8MiB"
[backup]
consistency = "crash"
[extension]
install = false
[paths]
state = "{folder}/state"
runtime = "{folder}/run"
cache = "{folder}/cache"
scratch = "{folder}/scratch"
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


@dataclass
class Fleet:
    folder: Path
    redis: Redis
    postgres: Postgres
    hosts: dict[str, Host] = field(default_factory=dict)
    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    controllers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def argv(self, *arguments: str) -> list[str]:
        config = str(self.folder / "stillframe.toml")
        return [sys.executable, "-m", "orchestrator.cli.main", "--config", config, *arguments]

    def cli(self, *arguments: str, timeout: float = 200) -> tuple[int, list[dict[str, Any]]]:
        """Exit code and records of one command."""
        ran = subprocess.run(
            self.argv("--json", *arguments), capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=timeout
        )
        lines = [json.loads(line) for line in (ran.stdout + ran.stderr).splitlines() if line.startswith("{")]
        return ran.returncode, lines

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.argv("--json", *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=ENVIRONMENT,
        )

    def start_worker(self, name: str) -> None:
        with (self.folder / f"worker-{name}.log").open("ab") as log:
            self.workers[name] = self.hosts[name].start(
                *self.argv("worker", "--hypervisor", name), stdout=log, stderr=log, cwd=ROOT, env=ENVIRONMENT
            )

    def start_controller(self) -> None:
        with (self.folder / f"controller-{len(self.controllers)}.log").open("ab") as log:
            argv = [sys.executable, "-m", "tests.distributed.process", "controller", self.folder / "stillframe.toml"]
            started = subprocess.Popen([*argv, SILENT], stdout=log, stderr=log, cwd=ROOT, env=ENVIRONMENT)
        self.controllers.append(started)

    def kill_worker(self, name: str) -> None:
        os.kill(pid_of(self.workers[name]), signal.SIGKILL)
        self.workers[name].wait()

    def machine(self, host: str, name: str) -> None:
        """A running machine with one disk, full of what nothing compresses."""
        image = self.folder / f"{name}.qcow2"
        raw = self.folder / f"{name}.raw"
        raw.write_bytes(random.Random(name).randbytes(SIZE))
        run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image)])
        raw.unlink()
        disk = _DISK.format(format="qcow2", path=image, target="vda")
        xml = _MACHINE.format(name=name, disks=disk).replace(
            "<memory", f"<uuid>{uuid.uuid5(uuid.NAMESPACE_DNS, name)}</uuid><memory", 1
        )
        self.virsh(host, "define", "/dev/stdin", input=xml)
        self.virsh(host, "start", name)

    def virsh(self, host: str, *arguments: str, **options: Any) -> str:
        return self.hosts[host].run("virsh", "-q", "-c", "qemu:///system", *arguments, **options).stdout

    def write(self, host: str, name: str, byte: int, length: int = MIB) -> None:
        for command in (f'qemu-io vda "write -P {byte} 0 {length}"', "qemu-io vda flush"):
            alias = command.replace("vda", "/machine/peripheral/virtio-disk0/virtio-backend").replace("io /", "io -d /")
            self.virsh(host, "qemu-monitor-command", name, "--hmp", alias)

    def close(self) -> None:
        for process in [*self.controllers, *self.workers.values()]:
            process.kill()
            process.wait()
        for host in self.hosts.values():
            host.close()
        self.redis.kill()
        self.postgres.remove()


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    base = Path(tempfile.mkdtemp(prefix="stillframe-test-fleet-", dir="/dev/shm"))
    base.chmod(0o755)
    made = Fleet(base, Redis(base / "redis"), Postgres(base / "postgres"))
    try:
        made.redis.start()
        made.postgres.start()
        text = CONFIG.format(catalog=made.postgres.new_database(), broker=made.redis.url, folder=base)
        (base / "stillframe.toml").write_text(text)
        assert made.cli("init")[0] == 0
        for name in ("lab1", "lab2"):
            made.hosts[name] = start_host(base / name, name)
            for machine in ("a", "b"):
                made.machine(name, f"{name}{machine}")
            made.start_worker(name)
        made.start_controller()
        made.start_controller()
        yield made
    finally:
        made.close()
        for log in base.glob("*.log"):
            print(log.name, log.read_text()[-3000:])
        subprocess.run(["rm", "-rf", base], check=True)


ALL = ("lab1a", "lab1b", "lab2a", "lab2b")


def modes(lines: Sequence[dict[str, Any]]) -> dict[str, set[str]]:
    return {one["machine"]: {disk["mode"] for disk in one["disks"]} for one in lines if one["type"] == "backup"}


def test_full_then_incremental_on_both_hosts_at_once(fleet: Fleet) -> None:
    code, lines = fleet.cli("backup", "run", *ALL)
    assert code == 0, lines
    assert modes(lines) == {name: {"full"} for name in ALL}
    fleet.write("lab1", "lab1a", 7)
    fleet.write("lab2", "lab2a", 8)
    code, lines = fleet.cli("backup", "run", *ALL)
    assert code == 0, lines
    assert modes(lines) == {name: {"incremental"} for name in ALL}
    read = {one["machine"]: one["disks"][0]["read_bytes"] for one in lines if one["type"] == "backup"}
    assert max(read.values()) <= 4 * MIB, "what changed, and a sample of what did not"
    assert min(read["lab1a"], read["lab2a"]) >= MIB
    restored = fleet.folder / "restored"
    restored.mkdir()
    code, lines = fleet.cli("restore", "vm", "lab1a@latest", "--name", "copy", "--dir", str(restored))
    assert code == 0, lines
    assert "copy" in fleet.virsh("lab1", "list", "--all", "--name").split()
    [image] = restored.glob("*")
    raw = fleet.folder / "copy.raw"
    run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)])
    expected = bytes([7]) * MIB + random.Random("lab1a").randbytes(SIZE)[MIB:]
    assert raw.read_bytes() == expected


def in_the_middle(fleet: Fleet) -> subprocess.Popen[str]:
    """Full backups of all machines, of which at least one on lab1 is being transferred."""
    begun = fleet.begin("backup", "run", "--full", *ALL)

    def transfers() -> bool:
        _, jobs = fleet.cli("job", "list", "--active")
        return any(job["state"] == "transferring" and job.get("hypervisor", "lab1") == "lab1" for job in jobs)

    wait_until(transfers, 60)
    return begun


def outcome(begun: subprocess.Popen[str]) -> dict[str, str]:
    """Machine → how its backup ended."""
    out, _ = begun.communicate(timeout=200)
    found = {}
    for line in out.splitlines():
        record = json.loads(line) if line.startswith("{") else {}
        if record.get("type") == "backup":
            found[record["machine"]] = record["error"]["message"] if record.get("error") else "succeeded"
    assert set(found) == set(ALL), out
    return found


def all_is_well(fleet: Fleet) -> None:
    """Nothing is left behind, and the next backup of each works."""
    code, lines = fleet.cli("backup", "run", *ALL)
    assert code == 0, lines
    for host, machine in ((host, machine) for host in ("lab1", "lab2") for machine in ALL if machine.startswith(host)):
        checkpoints = fleet.virsh(host, "checkpoint-list", machine, "--name").split()
        assert len(checkpoints) == 1, f"{machine} has {checkpoints}"
        assert "None" in fleet.virsh(host, "domjobinfo", machine)
    assert list((fleet.folder / "scratch").rglob("*.qcow2")) == []


def test_a_worker_is_killed(fleet: Fleet) -> None:
    begun = in_the_middle(fleet)
    fleet.kill_worker("lab1")
    fleet.start_worker("lab1")
    ended = outcome(begun)
    assert {ended[name] for name in ("lab2a", "lab2b")} == {"succeeded"}
    assert all(why == "succeeded" or "no worker was heard" in why for why in ended.values()), ended
    all_is_well(fleet)


def test_controller_redis_and_postgresql_are_killed(fleet: Fleet) -> None:
    begun = in_the_middle(fleet)
    fleet.controllers[0].kill()
    fleet.controllers.pop(0).wait()
    fleet.start_controller()
    fleet.redis.kill()
    fleet.redis.start()
    fleet.postgres.kill()
    fleet.postgres.start()
    ended = outcome(begun)
    assert all(why == "succeeded" or "no worker was heard" in why for why in ended.values()), ended
    all_is_well(fleet)


def test_libvirtd_is_killed(fleet: Fleet) -> None:
    begun = in_the_middle(fleet)
    fleet.hosts["lab1"].end_libvirtd()
    fleet.hosts["lab1"].start_libvirtd()
    ended = outcome(begun)
    assert {ended[name] for name in ("lab2a", "lab2b")} == {"succeeded"}
    all_is_well(fleet)


def test_a_whole_host_is_gone_and_comes_back(fleet: Fleet) -> None:
    """Its machines were cut off: their bitmaps are of no use, and what changed is not known."""
    begun = in_the_middle(fleet)
    fleet.hosts["lab1"].kill()
    fleet.workers["lab1"].wait()
    fleet.hosts["lab1"].close()
    fleet.hosts["lab1"] = start_host(fleet.folder / "lab1", "lab1")
    for machine in ("lab1a", "lab1b"):
        fleet.machine("lab1", machine)
    fleet.start_worker("lab1")
    ended = outcome(begun)
    assert {ended[name] for name in ("lab2a", "lab2b")} == {"succeeded"}
    all_is_well(fleet)
