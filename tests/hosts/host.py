"""A hypervisor host of its own: mount, process and UTS namespaces of this machine with a libvirtd, and perhaps an sshd.

Files, programs and the network are this machine's, except `/run/libvirt`, `/etc/libvirt`, `/var/lib/libvirt`,
`/run/stillframe` and `/srv/lab`: what lies there only this host can see, so whoever claims to read it over SSH must do
so. The whole host ends, with every machine on it, when its first process does: `kill` is a power cut, and a test that
is killed leaves nothing, since that process also ends at the end of its input.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REAPER = Path(__file__).parents[2] / "deploy/reaper"

# $1: the folder, $2: the host's name, $3: the reaper, $4: the port of sshd, or 0.
SETUP = r"""
set -e
exec 3<&0 </dev/null
hostname "$2"
mount -t proc proc /proc
mkdir -p "$1/var/qemu" "$1/var/images" /srv/lab /run/stillframe
chmod 711 "$1" "$1/var"
chown libvirt-qemu "$1/var/qemu" 2>/dev/null || true
cp -a /etc/libvirt "$1/etc"
rm -rf "$1"/etc/qemu/*.xml "$1"/etc/qemu/autostart "$1"/etc/storage/*
echo 'namespaces = []' >> "$1/etc/qemu.conf"
mount -t tmpfs -o mode=755 run /run/libvirt
mount -t tmpfs -o mode=755 lab /srv/lab
mount -t tmpfs -o mode=755 run /run/stillframe
mount --bind "$1/var" /var/lib/libvirt
mount --bind "$1/etc" /etc/libvirt
if [ -c /dev/kvm ]; then : > "$1/no-kvm"; chmod 0 "$1/no-kvm"; mount --bind "$1/no-kvm" /dev/kvm; fi
cat > "$1/libvirtd-up" <<END
#!/bin/sh
[ -S /run/libvirt/virtlogd-sock ] || virtlogd -d -p "$1/virtlogd.pid"
"$3" libvirtd -d -p "$1/libvirtd.pid"
for i in \$(seq 300); do timeout 10 virsh -c qemu:///system uri >/dev/null 2>&1 && exit 0; sleep 0.1; done
exit 1
END
chmod 755 "$1/libvirtd-up"
"$1/libvirtd-up"
if [ "$4" != 0 ]; then
    mkdir -p /run/sshd
    /usr/sbin/sshd -e -f "$1/sshd_config" -E "$1/sshd.log"
fi
echo up > "$1/ready.part"
mv "$1/ready.part" "$1/ready"
cat <&3 >/dev/null
"""

SSHD = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
PidFile {folder}/sshd.pid
StrictModes no
UsePAM no
UseDNS no
MaxStartups 100
MaxSessions 100
LogLevel VERBOSE
"""


@dataclass(frozen=True)
class Host:
    """One that is up. Not a Stillframe's `Hypervisor`: the machine room in which one runs."""

    name: str
    folder: Path
    first: subprocess.Popen[bytes]
    port: int
    """Of its sshd on 127.0.0.1; 0: there is none."""

    @property
    def client_key(self) -> Path:
        """Private key that its sshd lets in as root."""
        return self.folder / "client_key"

    @property
    def host_key(self) -> str:
        """`ssh-ed25519 AAAA…`"""
        return " ".join((self.folder / "host_key.pub").read_text().split()[:2])

    def _inside(self, argv: Sequence[str | Path]) -> list[str]:
        children = Path(f"/proc/{self.first.pid}/task/{self.first.pid}/children").read_text().split()
        return ["nsenter", "-t", children[0], "-m", "-p", "-u", "--", *map(str, argv)]

    def run(self, *argv: str | Path, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a program on this host to its end."""
        return subprocess.run(self._inside(argv), check=check, text=True, capture_output=True, timeout=240, **options)

    def start(self, *argv: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        """Start a program on this host. The process that is returned is `nsenter`, whose child is the program: see
        `pid_of` for whom to kill."""
        return subprocess.Popen(self._inside(argv), **options)

    def end_libvirtd(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Its machines live on."""
        self.run("sh", "-c", f"kill -{how.name.removeprefix('SIG')} $(cat {self.folder}/libvirtd.pid)")

    def start_libvirtd(self) -> None:
        self.run(self.folder / "libvirtd-up")

    def kill(self) -> None:
        """A power cut: every process of the host is gone."""
        children = Path(f"/proc/{self.first.pid}/task/{self.first.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        self.first.wait(60)

    def close(self) -> None:
        assert self.first.stdin is not None
        self.first.stdin.close()
        self.first.wait(60)
        shutil.rmtree(self.folder, ignore_errors=True)


def pid_of(started: subprocess.Popen[bytes]) -> int:
    """The process that `Host.start` started, as this machine numbers it."""
    return int(Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()[0])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_host(folder: Path, name: str, *, ssh: bool = False) -> Host:
    """A host whose own files are in the new folder `folder`. Raises AssertionError with what it said if it does not
    come up."""
    folder.mkdir(parents=True)
    port = _free_port() if ssh else 0
    if ssh:
        for key in ("host_key", "client_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
        shutil.copy(folder / "client_key.pub", folder / "authorized_keys")
        (folder / "sshd_config").write_text(SSHD.format(port=port, folder=folder))
    namespaces = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--propagation", "private"]
    log = (folder / "log").open("wb")
    first = subprocess.Popen(
        [*namespaces, "sh", "-c", SETUP, "sh", str(folder), name, str(REAPER), str(port)],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
    )
    log.close()
    host = Host(name, folder, first, port)
    for _ in range(1200):
        if (folder / "ready").exists():
            return host
        try:
            first.wait(0.05)
            break
        except subprocess.TimeoutExpired:
            continue
    said = (folder / "log").read_text()
    host.close()
    raise AssertionError(f"host {name} did not come up: {said}")
