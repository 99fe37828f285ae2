"""A machine that was moved while it ran. Measured with libvirt 9.0 and QEMU 7.2: the new libvirt knows none of its
checkpoints, the bitmaps are there."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.hosts.host import Host, start_host

ROOT = Path(__file__).parents[2]
ALONE = 'mount -t tmpfs none /var/lib/libvirt && exec "$@"'
"""In a mount namespace of its own: a host without a libvirt."""


def uri(host: Host) -> str:
    inside = Path(f"/proc/{host.first.pid}/task/{host.first.pid}/children").read_text().split()[0]
    return f"qemu+unix:///system?socket=/proc/{inside}/root/run/libvirt/libvirt-sock"


def another_machine(host: Host) -> None:
    """libvirt refuses to migrate to the host that it believes to be on, and goes by the board's UUID."""
    file = host.folder / "etc/libvirtd.conf"
    file.write_text(f'{file.read_text()}\nhost_uuid = "{uuid.uuid4()}"\n')
    host.end_libvirtd()
    host.start_libvirtd()


@pytest.mark.timeout(180)
def test_the_chain_goes_on_after_a_live_migration(guest_folder: Path) -> None:
    folder = guest_folder / f"migration-{uuid.uuid4().hex[:6]}"
    for one in (folder, folder / "run"):  # both hosts' QEMUs make sockets there
        one.mkdir()
        one.chmod(0o777)
    disk = folder / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "16M"], check=True)
    disk.chmod(0o666)
    hosts = [start_host(folder / name, name) for name in ("a", "b")]
    try:
        another_machine(hosts[1])
        story = [sys.executable, "-m", "tests.discovery.migration", str(folder), *map(uri, hosts)]
        unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-c", ALONE, "sh"]
        ran = subprocess.run([*unshare, *story], cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    finally:
        for host in hosts:
            host.close()
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["checkpoints"] == []
    assert told["news"] == ["moved"]
    assert told["where"] == "b"
    [[before], [after]] = told["disks"]
    assert (before["mode"], after["mode"]) == ("full", "incremental"), after["reason"]
    same = subprocess.run(["qemu-img", "compare", str(disk), str(folder / "restored.qcow2")], check=False)
    assert same.returncode == 0
