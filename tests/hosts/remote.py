"""A host of the tests, as Stillframe reaches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.hosts.host import Host as Lab
from workers.config import HypervisorConfig
from workers.contract.hosts import Host
from workers.hosts import open_host


def config_of(lab: Lab, port: int | None = None) -> HypervisorConfig:
    """How to reach it; `port`: of a relay in between."""
    return HypervisorConfig(
        uri=f"qemu+ssh://root@127.0.0.1:{port or lab.port}/system", key_file=lab.client_key, host_key=lab.host_key
    )


@contextmanager
def ssh_host(lab: Lab, runtime: Path, port: int | None = None) -> Iterator[Host]:
    host = open_host(config_of(lab, port), name="lab1", runtime_dir=runtime)
    try:
        yield host
    finally:
        host.close()


def config_lines(lab: Lab) -> str:
    """For the section of a configuration file."""
    return f'key_file = "{lab.client_key}"\nhost_key = "{lab.host_key}"\nscratch_dir = "/srv/lab/scratch"'


def left_on(lab: Lab) -> list[str]:
    """What carries our names there: files, helpers, backup jobs; looked for without Stillframe."""
    script = """
    ls -d /srv/lab/scratch/sf-* /run/stillframe/sf-* /var/lib/libvirt/qemu/domain-*/sf-*
    ls -d /srv/lab/*.sf-* /srv/lab/*/*.sf-*
    for pid in /proc/[0-9]*; do
        tr '\\0' ' ' < $pid/cmdline | grep -E '^qemu-(nbd|img) .*/sf-'
    done
    for machine in $(virsh -q -c qemu:///system list --name); do
        virsh -q -c qemu:///system backup-dumpxml "$machine" >/dev/null && echo "a job on $machine"
    done
    """
    return lab.run("sh", "-c", f"exec 2>/dev/null\n{script}", check=False).stdout.splitlines()
