"""The real command, in a process of its own, with a configuration of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

UNREACHABLE = "qemu+unix:///system?socket=/nonexistent/libvirt-sock"


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Its JSON lines; each must be an object with a type."""
        lines = [json.loads(line) for line in self.out.splitlines()]
        assert all(isinstance(line.get("type"), str) for line in lines), self.out
        return lines

    def line(self, kind: str) -> dict[str, Any]:
        [line] = [line for line in self.lines if line["type"] == kind]
        return line


@dataclass(frozen=True)
class Cli:
    """`stillframe`, run in `folder`; `file` is its configuration."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "stillframe.toml"

    def configure(self, text: str) -> Path:
        self.file.write_text(text)
        return self.file

    def run(self, *arguments: str | Path, stdin: str | None = None, env: dict[str, str] | None = None) -> Ran:
        """Run a command without a terminal; `stdin` None: closed."""
        home = {
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder),
            "PATH": os.environ["PATH"],
            **(env or {}),
        }
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.cli.main", *map(str, arguments)],
            cwd=self.folder,
            env={**home, "PYTHONPATH": str(Path(__file__).parents[2])},
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """The command, with an empty folder and no configuration yet."""
    return Cli(tmp_path)


def write_configuration(cli: Cli) -> Cli:
    """A good configuration, whose hypervisor cannot be reached."""
    cli.configure(
        f"""
        [paths]
        state = "state"
        runtime = "run"
        [vaults.main]
        url = "file://./vault"
        key_file = "main.key"
        [hypervisors.lab1]
        uri = "{UNREACHABLE}"
        """
    )
    return cli


@pytest.fixture
def configured(cli: Cli) -> Cli:
    """The command, configured; nothing made yet."""
    return write_configuration(cli)


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """The command with an empty vault, for tests that leave it as it is."""
    cli = write_configuration(Cli(tmp_path_factory.mktemp("ready")))
    assert cli.run("init").code == 0
    return cli
