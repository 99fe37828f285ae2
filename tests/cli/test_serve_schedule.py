"""A real `stillframe serve` finds a machine by its tag and backs it up, and tells of a mistake in its file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from orchestrator.demo.host import URI, remove_machine
from tests.cli.conftest import Cli
from tests.guests.machines import MACHINE_PREFIX
from workers.tools import run

if TYPE_CHECKING:
    import libvirt

NAME = f"{MACHINE_PREFIX}{os.getpid()}-served"
_MACHINE = """<domain type='qemu'><name>{name}</name><description>[stillframe: {tag}]</description>
<memory unit='MiB'>32</memory><os><type arch='x86_64' machine='q35'>hvm</type></os>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator><disk type='file' device='disk'>
<driver name='qemu' type='qcow2'/><source file='{path}'/><target dev='vda' bus='virtio'/></disk></devices></domain>"""
_TEXT = f"""
[paths]
state = "state"
runtime = "run"
[vaults.main]
url = "file://./vault"
key_file = "main.key"
[hypervisors.here]
uri = "{URI}"
[policies.gold]
schedule = "monthly at 02:00"
consistency = "crash"
[protect.tagged]
tags = ["sf-{os.getpid()}"]
policy = "gold"
"""


@pytest.fixture
def served(libvirt_host: libvirt.virConnect, guest_folder: Path) -> Iterator[Cli]:
    """`stillframe` set up beside a machine NAME that is off, and has the tag that is protected."""
    folder = guest_folder / "served"
    folder.mkdir()
    run(["qemu-img", "create", "-q", "-f", "qcow2", str(folder / "a.qcow2"), "16M"])
    xml = _MACHINE.format(name=NAME, tag=f"sf-{os.getpid()}", path=folder / "a.qcow2")
    domain = libvirt_host.defineXML(xml)
    cli = Cli(folder)
    cli.configure(_TEXT)
    assert cli.run("init").code == 0
    yield cli
    remove_machine(domain)


def until(process: subprocess.Popen[str], wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Lines of its log until the wanted one."""
    assert process.stderr is not None
    lines = []
    for text in process.stderr:
        lines.append(json.loads(text))
        if wanted(lines[-1]):
            return lines
    raise AssertionError(lines)


@pytest.mark.guest
@pytest.mark.timeout(180)
def test_a_tagged_machine_is_backed_up_and_a_mistake_is_told(served: Cli) -> None:
    arguments = [sys.executable, "-m", "orchestrator.cli.main", "serve", "-v", "--config", str(served.file)]
    place = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(arguments, env=place, stderr=subprocess.PIPE, text=True) as process:
        try:
            until(process, lambda line: "succeeded" in json.dumps(line))
            [point] = served.run("point", "list", NAME, "--json").lines
            assert point["machine"] == NAME
            [job] = [line for line in served.run("job", "list", "--json").lines if line.get("kind") == "backup"]
            assert job["state"] == "succeeded"
            served.configure(_TEXT.replace("schedule =", "shedule ="))
            process.send_signal(signal.SIGHUP)
            until(process, lambda line: "did you mean schedule" in json.dumps(line))
            assert "did you mean schedule" in served.run("alert", "list").err, "commands go by no other file"
            served.configure(_TEXT)
            shown = served.run("alert", "list", "--all", "--json")
            assert any("the last good one is in force" in line.get("text", "") for line in shown.lines)
        finally:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0
