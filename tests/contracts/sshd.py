"""A guest that is no machine: a real sshd of this host in namespaces of its own, with file systems that may be frozen.

Its root is an overlay upon this host's, so that users, shells and keys can be changed, and so that the only
block-device file systems that it sees are its own loop devices: freezing "all" cannot stop this host. Two ext4 are at
/data/vda and /data/vdb, as in the small guests.

A file system that stays frozen without a mount would hold its loop device, and every `sync` of this host, for ever. So
the first process in the namespaces outlives whoever made it: at the end of its input it thaws, then all ends.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from workers.guests.host_keys import HostKey
from workers.guests.ssh import SshChannel

UUID = "6f0d6a0e-4b0a-4a8e-9a55-3f5ad3f0a001"
OpenSsh = Callable[..., SshChannel]
"""The fixture `open_ssh`."""

# $1: the folder, $2: the shell, $3: the port.
SETUP = r"""
set -e
exec 3<&0 </dev/null
mkdir "$1/over" "$1/root"
mount -t tmpfs over "$1/over"
mkdir "$1/over/upper" "$1/over/work"
mount -t overlay over -o "lowerdir=/,upperdir=$1/over/upper,workdir=$1/over/work" "$1/root"
cd "$1/root"
mount -t proc proc proc
mount --rbind /dev dev
mount -t tmpfs run run
mount -t tmpfs tmp tmp
mkdir -p run/sshd etc/test-sshd data/vda data/vdb home
cp "$1"/host_key* "$1/authorized_keys" etc/test-sshd
chmod 600 etc/test-sshd/host_key
ln -sf "$2" usr/bin/sh
sed -i 's|^\(root:.*:\)[^:]*$|\1/bin/sh|' etc/passwd
for user in operator:7001 stranger:7002; do
    echo "${user%:*}:x:${user#*:}:${user#*:}::/:/bin/sh" >> etc/passwd
    echo "${user%:*}:*:19000:0:99999:7:::" >> etc/shadow
done
echo 'operator ALL=(root) NOPASSWD: ALL' > etc/sudoers.d/test
chmod 440 etc/sudoers.d/test
for disk in vda vdb; do mount -o loop "$1/$disk" "data/$disk"; done
cat > etc/test-sshd/config <<END
Port $3
ListenAddress 127.0.0.1
HostKey /etc/test-sshd/host_key
AuthorizedKeysFile /etc/test-sshd/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
PidFile none
StrictModes no
UsePAM no
UseDNS no
LogLevel VERBOSE
END
chroot . /usr/sbin/sshd -D -e -f /etc/test-sshd/config 3<&- &
cat <&3 >/dev/null
. "$1/thaw"
"""

# $1: the folder. In the order of mounting, which is outer ones first; by device, whatever the mount point is called.
THAW = r"""
set +e
mkdir -p "$1/thaw-here"
for device in $(sed -n 's|.* - ext4 \(/dev/loop[0-9]*\) .*|\1|p' /proc/self/mountinfo); do
    { mount "$device" "$1/thaw-here" || mount -o ro "$device" "$1/thaw-here"; } 2>/dev/null || continue
    timeout -k 1 5 fsfreeze --unfreeze "$1/thaw-here" 2>/dev/null
    umount -l "$1/thaw-here"
done
"""


def make_key(path: Path, kind: str = "ed25519") -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(path)], check=True)
    return path


def free_port() -> int:
    with socket.socket() as link:
        link.bind(("127.0.0.1", 0))
        return int(link.getsockname()[1])


@dataclass
class SshGuest:
    """`shell`: what /bin/sh and root's shell are, `dash`, `bash` or `busybox`."""

    folder: Path
    shell: str = "dash"
    host_kind: str = "ed25519"
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.key = make_key(self.folder / "key")
        shutil.copy(self.key.with_suffix(".pub"), self.folder / "authorized_keys")
        host_key = make_key(self.folder / "host_key", self.host_kind)
        self.host_key = HostKey.parse(host_key.with_suffix(".pub").read_text())
        for disk in ("vda", "vdb"):
            with (self.folder / disk).open("wb") as file:
                file.truncate(16 << 20)
            subprocess.run(["mkfs.ext4", "-q", str(self.folder / disk)], check=True)
        (self.folder / "thaw").write_text(THAW)
        argv = ["unshare", "-m", "-p", "-f", "--kill-child", "--propagation", "private"]
        argv += ["/bin/sh", "-c", SETUP, "sh", str(self.folder), self.shell, str(self.port)]
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.PIPE)
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + 60
        while "Server listening" not in self.log():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    @property
    def pid(self) -> int:
        """Of the sshd that listens."""
        return _children(_children(self.process.pid)[0])[0]

    def path(self, inside: str) -> Path:
        return Path(f"/proc/{self.pid}/root{inside}")

    def popen(self, script: str, output: int | None = subprocess.DEVNULL) -> subprocess.Popen[str]:
        """A script inside, not over SSH."""
        argv = ["nsenter", "-t", str(self.pid), "-m", "-p", "-r", "-w", "/bin/sh", "-c", script]
        return subprocess.Popen(argv, text=True, stdout=output, stderr=output)

    def out(self, script: str) -> str:
        process = self.popen(f"exec 2>&1; {script}", subprocess.PIPE)
        try:
            out, _ = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            # What waits for a frozen disk cannot be killed, and is not waited for.
            process.kill()
            raise
        assert process.returncode == 0, out
        return out

    def thaw(self) -> None:
        """Without anything that is tested here."""
        argv = ["nsenter", "-t", str(self.pid), "-m", "/bin/sh", "-c", THAW, "sh", str(self.folder)]
        subprocess.run(argv, timeout=60, check=True, stdin=subprocess.DEVNULL)

    def sessions(self) -> list[int]:
        """Process ids, as seen from outside, of the sshd processes that serve connections."""
        return [pid for pid in _children(self.pid) if "sshd" in Path(f"/proc/{pid}/comm").read_text()]

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(120)
        deadline = time.monotonic() + 60
        while str(self.folder) in subprocess.run(["losetup", "-l"], capture_output=True, text=True, check=True).stdout:
            assert time.monotonic() < deadline, "a loop device is still held"
            time.sleep(0.02)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def waits(process: subprocess.Popen[str]) -> bool:
    """Whether a quick program is held by something: it has not ended after a while."""
    try:
        process.wait(0.7)
    except subprocess.TimeoutExpired:
        return True
    return False


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


class Wire:
    """A TCP relay to a local port that can be cut, and that can go silent without an end, as a dead host does."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._links: list[socket.socket] = []
        self.passed = 0
        """Bytes, both ways together."""
        self.refusing = False
        """New connections are ended at once."""
        self._open = threading.Event()
        self._open.set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End all connections."""
        self._open.set()
        while self._links:
            link = self._links.pop()
            try:
                link.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def hold(self) -> None:
        """Deliver nothing from now on, until `cut`."""
        self._open.clear()

    def close(self) -> None:
        self._server.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
                if self.refusing:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._links += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self._open.wait()
                self.passed += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)
        except OSError:
            return
        finally:
            source.close()
