"""A guest without a guest: this host's kernel, with mounts and processes of its own, for the extension to live in.

The extension's paths are fixed, so the sandbox puts memory over all places that it touches. Three things of the kernel
must never be reached from here: `/sys/fs/cgroup` would move processes, `fsfreeze` and `/proc/sysrq-trigger` would act
on this host. A plain file lies upon the first; the others have another path in the copy of the payload that runs here,
since busybox has one built in, and many hosts have no such file that could be covered. The tests in real guests have
the real ones. There are three kinds: Debian's dash and coreutils; bash, as Red Hat's systems have it; nothing but
busybox.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LINUX = Path(__file__).parents[2] / "extensions" / "linux"
UUID = "11111111-2222-3333-4444-555555555555"
VERSION = "0.1.0+1a2b3c4d"
ROOT = "/opt/stillframe"
SYSRQ = "/proc/sysrq-trigger"
FSFREEZE = r"(?<=command -v )fsfreeze|fsfreeze(?= --)"

# $1 is the folder that is /seen on both sides, $2 the kind of shell. In a process namespace of its own: when its first
# process ends, everything in it is killed.
_SETUP = r"""
set -e
seen=$1
mkdir -p "$seen/etc" "$seen/bin" "$seen/cgroup" "$seen/kernel" "$seen/tools"
cp -a /etc/passwd /etc/group /etc/nsswitch.conf /etc/ld.so.* "$seen/etc/"
touch "$seen/kernel/sysrq" "$seen/cgroup/cgroup.procs" "$seen/fsfreeze.log"
printf '#!/bin/sh\necho "$@" >>%s/fsfreeze.log\n' "$seen" >"$seen/tools/fsfreeze"
chmod 0755 "$seen/tools/fsfreeze" "$seen/etc"
mount --bind "$seen/cgroup" /sys/fs/cgroup
mount --bind "$seen/etc" /etc
mount -t tmpfs -o mode=0755,size=16m run /run
mount -t tmpfs -o mode=0755 opt /opt
mkdir -p "$seen/var"
mount --bind "$seen/var" /var
if [ "$2" = busybox ]; then
    busybox=$(command -v busybox)
    cp "$busybox" "$seen/bin/busybox"
    "$seen/bin/busybox" --install -s "$seen/bin"
    for applet in "$seen/bin"/*; do [ ! -h "$applet" ] || ln -sf busybox "$applet"; done
    mount --bind "$seen/bin" /usr/sbin
    mount --bind "$seen/bin" /usr/bin
fi
[ "$2" != bash ] || mount --bind "$(command -v bash)" "$(readlink -f /bin/sh)"
touch "$seen/ready"
exec sleep infinity
"""


@dataclass
class Said:
    """How a verb ended."""

    code: int
    answer: dict[str, Any]
    err: str
    seconds: float


@dataclass
class Sandbox:
    """See the module. `seen` is the same folder inside and outside."""

    seen: Path
    shell: str
    init: subprocess.Popen[bytes] | None = None
    pid: int = 0
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        argv = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "--propagation", "private"]
        self.init = subprocess.Popen([*argv, "/bin/sh", "-c", _SETUP, "sh", str(self.seen), self.shell])
        wait_for(lambda: (self.seen / "ready").exists() or self.init is None or self.init.poll() is not None)
        assert self.init.poll() is None, "the sandbox could not be made"
        [child] = Path(f"/proc/{self.init.pid}/task/{self.init.pid}/children").read_text().split()
        self.pid = int(child)

    def close(self) -> None:
        if self.init is not None:
            self.init.kill()
            self.init.wait()
        for process in self.started:
            process.kill()
            process.communicate()
        shutil.rmtree(self.seen, ignore_errors=True)

    def argv(self, command: list[str], user: int = 0) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "-m", "-p", "-S", str(user), "--", *command]

    def run(self, command: str, *, timeout: float = 60) -> tuple[int, str]:
        """A shell command in the sandbox: exit code, and standard output with errors."""
        done = subprocess.run(
            self.argv(["/bin/sh", "-c", command]), capture_output=True, timeout=timeout, check=False, env=_environment()
        )
        return done.returncode, (done.stdout + done.stderr).decode(errors="replace")

    def out(self, command: str) -> str:
        code, text = self.run(command)
        assert code == 0, text
        return text

    def background(self, command: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            self.argv(["/bin/sh", "-c", command]), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_environment()
        )
        self.started.append(process)
        return process

    # --- the extension -----------------------------------------------------------------------------------------

    def place(self, folder: str = f"{ROOT}/{VERSION}") -> None:
        """Put the payload without its application scripts there, as a package would."""
        target = self.seen / "payload"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(LINUX, target, ignore=shutil.ignore_patterns("apps", "__pycache__"))
        for path in (target / "watchdog", target / "lib" / "lease.sh"):
            text = path.read_text()
            for name, stand_in in ((SYSRQ, "kernel/sysrq"), (FSFREEZE, "tools/fsfreeze")):
                assert re.search(name, text)
                text = re.sub(name, f"{self.seen}/{stand_in}", text)
            path.write_text(text)
        self.out(f"umask 022; mkdir -p {folder} && cp -R {target}/. {folder}/ && chmod -R go-w {folder}")

    def install(self, uuid: str = UUID) -> None:
        """Put it in place and in force, without the verbs for that."""
        self.place()
        self.out(f"ln -s {VERSION} {ROOT}/current && mkdir -p /var/lib/stillframe /etc/stillframe/apps")
        self.out(f"echo {uuid} >/var/lib/stillframe/machine; echo 5 >{ROOT}/{VERSION}/serial")

    def app(self, name: str, script: str, *, own: bool = True) -> None:
        """An application script whose `run` is `script`; in /etc, or among those that were shipped."""
        folder = f"/etc/stillframe/apps/{name}" if own else f"{ROOT}/{VERSION}/apps/{name}"
        source = self.seen / "app.sh"
        source.write_text("#!/bin/sh\n" + script)
        self.out(f"umask 022; mkdir -p {folder} && cp {source} {folder}/run && chmod 0755 {folder}/run")

    def ext(
        self, verb: str, *options: str, path: str = f"{ROOT}/current/ext", timeout: float = 60, user: int = 0
    ) -> Said:
        """Call a verb as the host does; its answer must be one line of JSON, and nothing may hold its output."""
        begun = time.monotonic()
        command = self.argv(["/bin/sh", path, verb, *options], user)
        done = subprocess.run(command, capture_output=True, timeout=timeout, check=False, env=_environment())
        seconds = time.monotonic() - begun
        text = done.stdout.decode()
        assert text.endswith("\n"), (done.returncode, text, done.stderr)
        assert text.count("\n") == 1, text
        answer = json.loads(text)
        assert answer["verb"] == verb
        assert answer["ok"] == (done.returncode in (0, 3))
        return Said(done.returncode, answer, done.stderr.decode(errors="replace"), seconds)

    def quiesce(
        self, job: str = "job-1", *options: str, freeze_s: int = 60, limit_s: int = 60, timeout: float = 60
    ) -> Said:
        words = ["--job", job, "--uuid", UUID, "--goal", "application"]
        words += ["--freeze-s", str(freeze_s), "--limit-s", str(limit_s)]
        return self.ext("quiesce", *words, *options, timeout=timeout)

    def resume(self, job: str = "job-1", timeout: float = 60) -> Said:
        return self.ext("resume", "--job", job, timeout=timeout)

    def thaws(self) -> int:
        """How many times something wrote to the file that stands in for sysrq."""
        return (self.seen / "kernel" / "sysrq").read_text().count("j\n")

    def processes(self, word: str) -> list[int]:
        """Processes in the sandbox (their numbers there) whose command line has `word` in it."""
        found = self.out("for p in /proc/[0-9]*; do echo \"${p#/proc/} $(tr '\\0' ' ' <$p/cmdline)\"; done 2>/dev/null")
        lines = [line.split(" ", 1) for line in found.splitlines() if word in line]
        return [int(pid) for pid, command in lines if "for p in /proc" not in command]


def _environment() -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOSTILE": "yes", "STILLFRAME_OPTION": "hostile", "LC_ALL": "C.UTF-8"}


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
