"""`kill -9` at every step of a full backup, of a restore, and of the backup of a machine that is off (invariant 8)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import libvirt
import pytest

from orchestrator.demo.host import remove_machine, shut_down
from tests.faults import world
from tests.faults.walk import Walked, walk

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]


def disk_content(image: Path) -> bytes:
    """What a guest would read of a qcow2 image."""
    raw = image.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    content = raw.read_bytes()
    raw.unlink()
    return content


def test_every_step_of_a_full_backup(walked: Walked) -> None:
    assert walk(walked, "backup", "run", walked.guest.name, "--full") > 40
    walked.check_points()


def test_every_step_of_a_restored_machine(walked: Walked, libvirt_host: libvirt.virConnect, memory: Path) -> None:
    folder, name = memory / "walked", f"{walked.guest.name}-r"
    folder.mkdir(mode=0o755)
    walked.change()
    walked.place.backed_up(walked.guest.name)
    walked.remember()
    files = [f"{name}-vda.qcow2", f"{name}-vdb.qcow2"]

    def undo() -> None:
        """All of it is there, or nothing."""
        machines = [domain for domain in libvirt_host.listAllDomains() if domain.name() == name]
        found = sorted(path.name for path in folder.iterdir())
        assert (len(machines), found) in ((0, []), (1, files)), found
        for machine in machines:
            assert disk_content(folder / files[1]) == walked.content
            remove_machine(machine)
        for path in folder.iterdir():
            path.unlink()

    command = ("restore", "vm", f"{walked.guest.name}@latest", "--name", name, "--dir", str(folder))
    assert walk(walked, *command, undo=undo, writes=False) > 15


def test_every_step_of_a_backup_of_a_machine_that_is_off(walked: Walked) -> None:
    shut_down(walked.guest.domain)
    try:
        assert walk(walked, "backup", "run", walked.guest.name) > 25
        walked.check_points()
    finally:
        walked.guest.start()
    walked.change()
    point = walked.place.backed_up(walked.guest.name)
    assert [disk["mode"] for disk in point["disks"]] == ["incremental", "incremental"]
    walked.remember()
    walked.check_points()
    assert world.strays(walked.place, walked.guest) == []
