"""The hosts that other tests are made with are what they claim to be."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.hosts.host import start_host

pytestmark = pytest.mark.guest


def test_two_hosts_know_nothing_of_each_other(tmp_path: Path) -> None:
    one, two = start_host(tmp_path / "one", "lab1", ssh=True), start_host(tmp_path / "two", "lab2")
    try:
        assert one.run("hostname").stdout == "lab1\n"
        one.run("sh", "-c", "echo here > /srv/lab/file")
        assert two.run("test", "-e", "/srv/lab/file", check=False).returncode == 1
        assert not Path("/srv/lab/file").exists()
        xml = "<domain type='qemu'><name>m</name><memory>1024</memory><os><type>hvm</type></os></domain>"
        one.run("virsh", "-q", "-c", "qemu:///system", "define", "/dev/stdin", input=xml)
        assert two.run("virsh", "-q", "-c", "qemu:///system", "list", "--all", "--name").stdout.strip() == ""
        login = ["ssh", "-i", str(one.client_key), "-p", str(one.port), "-o", "StrictHostKeyChecking=no"]
        login += ["-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "root@127.0.0.1"]
        assert subprocess.run([*login, "cat /srv/lab/file"], capture_output=True, text=True).stdout == "here\n"
        one.end_libvirtd()
        assert one.run("virsh", "-c", "qemu:///system", "uri", check=False).returncode != 0
        one.start_libvirtd()
        assert one.run("virsh", "-q", "-c", "qemu:///system", "list", "--all", "--name").stdout.split() == ["m"]
        one.kill()
    finally:
        one.close()
        two.close()
