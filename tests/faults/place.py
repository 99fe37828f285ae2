"""A Stillframe of a test's own: configuration, catalog, vault, key, folders; and the command, run in it.

In memory (`/dev/shm`): small cloud disks stall for a minute after a burst, and a walk of hundreds of runs is a burst.
The commands run in children of one `killer --serve`, which has imported everything already.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.guests.machines import FOLDER_PREFIX

ROOT = Path(__file__).parents[2]
MEMORY = Path("/dev/shm")
_ENVIRONMENT = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONPATH": str(ROOT)}


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended: exit code, or minus the signal that ended it; None: it hung and was killed."""

    code: int | None
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    def line(self, kind: str) -> dict[str, Any]:
        """The one JSON line of that type."""
        [line] = [line for line in self.lines if line["type"] == kind]
        return line

    def __str__(self) -> str:
        return f"exit {self.code}\n{self.out}\n{self.err}"


@dataclass
class Held:
    """A command that stands still."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def finish(self) -> Ran:
        """Let it go on, to its end."""
        self.process.send_signal(signal.SIGCONT)
        code = self.process.wait(120)
        return Ran(code, self.out.read_text(), self.err.read_text())


class Nursery:
    """The process that runs commands, see `killer`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.killer", "--serve"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_ENVIRONMENT,
        )

    def run(self, request: dict[str, Any]) -> int | None:
        source, answers = self._process.stdin, self._process.stdout
        assert source is not None
        assert answers is not None
        source.write(json.dumps(request) + "\n")
        source.flush()
        code: int | None = json.loads(answers.readline())["code"]
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def memory_folder() -> Path:
    """A folder in memory that QEMU's user can pass through; those of killed test runs are removed."""
    for old in MEMORY.glob(f"{FOLDER_PREFIX}*"):
        found = re.fullmatch(re.escape(FOLDER_PREFIX) + r"(\d+)-.*", old.name)
        if found and not Path("/proc", found[1]).exists() and not os.path.ismount(old):
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-", dir=MEMORY))
    folder.chmod(0o755)
    return folder


@dataclass
class Place:
    """One configuration, with everything that it names."""

    folder: Path
    nursery: Nursery
    uri: str = "qemu:///system"
    hypervisor: str = ""
    """Lines for the [hypervisors.lab] section."""
    backup: str = ""
    """Lines for the [backup] section."""
    extension: str = "install = false"
    """Lines for the [extension] section. Most of what is tested here is the host's affair, and needs no scripts."""
    scratch: Path = field(init=False)
    vault: Path = field(init=False)
    numbers: itertools.count[int] = field(init=False, default_factory=itertools.count)
    held: list[Held] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(mode=0o755, exist_ok=True)
        self.scratch = self.folder / "scratch"
        self.vault = self.folder / "vault"
        self.configure()

    def configure(self) -> None:
        """Write the configuration as the fields are now."""
        self.config.write_text(
            f"""
            [paths]
            state = "state"
            scratch = "{self.scratch}"
            runtime = "run"
            cache = "cache"
            [catalog]
            url = "sqlite:///{self.folder}/catalog.db"
            [vaults.main]
            url = "file://{self.vault}"
            key_file = "main.key"
            [hypervisors.lab]
            uri = "{self.uri}"
            {self.hypervisor}
            [backup]
            {self.backup}
            [extension]
            {self.extension}
            """
        )

    @property
    def config(self) -> Path:
        return self.folder / "stillframe.toml"

    @property
    def catalog(self) -> Path:
        return self.folder / "catalog.db"

    @property
    def runtime(self) -> Path:
        return self.folder / "run"

    @property
    def key(self) -> bytes:
        return bytes.fromhex((self.folder / "main.key").read_text().strip())

    def run(
        self,
        *arguments: str | Path,
        count: Path | None = None,
        at: tuple[str, int] | None = None,
        late: float = 0.0,
        timeout: float = 120.0,
    ) -> Ran:
        """Run `stillframe arguments…` with this configuration and `--json`; it dies at the step `at`, or `late`
        seconds after it has begun that step."""
        number = next(self.numbers)
        out, err = self.folder / f"out-{number}", self.folder / f"err-{number}"
        argv = [*map(str, arguments), "--json", "--config", str(self.config)]
        code = self.nursery.run(
            {
                "argv": argv,
                "out": str(out),
                "err": str(err),
                "count": str(count) if count else None,
                "at": at,
                "late": late,
                "timeout": timeout,
            }
        )
        ran = Ran(code, out.read_text(), err.read_text())
        out.unlink()
        err.unlink()
        return ran

    def hold(self, step: str, nth: int, *arguments: str | Path) -> Held:
        """Begin `stillframe arguments…`; returns when it stands still at that step."""
        out, err = self.folder / "held-out", self.folder / "held-err"
        argv = [sys.executable, "-m", "tests.faults.killer", "--hold", step, str(nth), "--", *map(str, arguments)]
        with out.open("w") as out_file, err.open("w") as err_file:
            process = subprocess.Popen(
                [*argv, "--json", "--config", str(self.config)],
                cwd=ROOT,
                env=_ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
            )
        held = Held(process, out, err)
        self.held.append(held)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None:
                break
            time.sleep(0.01)
        if found is None or found.si_code != os.CLD_STOPPED:
            process.kill()
            raise AssertionError(f"{arguments} never came to {step} ({nth}): {held.finish()}")
        return held

    def let_go(self) -> None:
        """End what a test that failed has left standing: it is no trouble of the next test's."""
        while self.held:
            process = self.held.pop().process
            if process.poll() is None:
                process.kill()
                process.wait()

    def good(self, *arguments: str | Path) -> Ran:
        """Run a command that must succeed."""
        ran = self.run(*arguments)
        assert ran.code == 0, f"{arguments}: {ran}"
        return ran

    def backed_up(self, machine: str, *options: str) -> dict[str, Any]:
        """Run a backup that must succeed; its point."""
        return self.good("backup", "run", machine, *options).line("backup")

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """What the catalog holds."""
        with sqlite3.connect(f"file:{self.catalog}?mode=ro", uri=True) as connection:
            found = connection.execute(sql).fetchall()
        connection.close()
        return found
