"""The extension in a real guest: put there through the agent, called as the host calls it."""

from __future__ import annotations

import io
import json
import tarfile
import time
from dataclasses import dataclass
from typing import Any

from tests.extension.sandbox import LINUX, ROOT, UUID, VERSION
from tests.guests.machines import Guest
from workers.guests.agent import AgentChannel

SYSTEM = "/run /opt /etc /var /tmp"


@dataclass
class Answer:
    code: int
    answer: dict[str, Any]
    seconds: float


@dataclass
class ExtensionInGuest:
    guest: Guest
    channel: AgentChannel

    def install(self) -> None:
        """Payload without application scripts, in force."""
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for path in sorted(LINUX.rglob("*")):
                name = path.relative_to(LINUX).as_posix()
                if path.is_file() and not name.startswith("apps/"):
                    info = tarfile.TarInfo(name)
                    info.size, info.mode = path.stat().st_size, 0o755
                    tar.addfile(info, io.BytesIO(path.read_bytes()))
        self.channel.put_file("/tmp/payload.tar", archive.getvalue())
        here = f"{ROOT}/{VERSION}"
        self.guest.out(
            f"umask 022; chmod 755 {SYSTEM} / 2>/dev/null; mkdir -p {here} /var/lib/stillframe /etc/stillframe/apps"
            f" && tar -x -f /tmp/payload.tar -C {here} && chown -R 0:0 {here} && ln -sfn {VERSION} {ROOT}/current"
            f" && echo {UUID} >/var/lib/stillframe/machine"
        )

    def app(self, name: str, script: str) -> None:
        folder = f"/etc/stillframe/apps/{name}"
        self.guest.out(f"umask 022; mkdir -p {folder}")
        self.channel.put_file(f"{folder}/run", b"#!/bin/sh\n" + script.encode())
        self.guest.out(f"chmod 0755 {folder}/run")

    def remove_apps(self) -> None:
        self.guest.out("rm -rf /etc/stillframe/apps/*")

    def ext(self, verb: str, *options: str, timeout: float = 120) -> Answer:
        begun = time.monotonic()
        ran = self.channel.run(["/bin/sh", f"{ROOT}/current/ext", verb, *options], timeout=timeout)
        seconds = time.monotonic() - begun
        assert ran.out.count(b"\n") == 1, ran
        return Answer(ran.code, json.loads(ran.out), seconds)

    def quiesce(self, job: str, *options: str, freeze_s: int = 60, limit_s: int = 60) -> dict[str, Any]:
        words = ["--job", job, "--uuid", UUID, "--goal", "application"]
        words += ["--freeze-s", str(freeze_s), "--limit-s", str(limit_s)]
        said = self.ext("quiesce", *words, *options)
        assert said.code == 0, said
        return said.answer

    def resume(self, job: str) -> dict[str, Any]:
        said = self.ext("resume", "--job", job)
        assert said.code == 0, said
        return said.answer
