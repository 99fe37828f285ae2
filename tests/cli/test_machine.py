"""The commands on a real machine: blank disks behind a running QEMU, which nobody has to boot.

One machine for the whole file, and one story a test: each needs points, and makes those it needs.
"""

from __future__ import annotations

import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from orchestrator.demo.host import URI, remove_machine
from tests.cli.conftest import Cli
from tests.guests.machines import MACHINE_PREFIX
from workers.tools import run

if TYPE_CHECKING:
    import libvirt

NAME = f"{MACHINE_PREFIX}{os.getpid()}-cli"
MIB = 1 << 20
_DISK = """<disk type='file' device='disk'><driver name='qemu' type='{format}' discard='unmap'/>
<source file='{path}'/><target dev='{target}' bus='virtio'/></disk>"""
_MACHINE = """<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{disks}</devices></domain>"""


def make_disk(path: Path, format: str, size: int, written: list[tuple[int, int]]) -> None:
    """An image with random bytes, which nothing compresses, at `(offset, length)`."""
    raw = path.with_suffix(".tmp")
    with raw.open("wb") as file:
        file.truncate(size)
        for start, length in written:
            file.seek(start)
            file.write(random.Random(start).randbytes(length))
    run(["qemu-img", "convert", "-f", "raw", "-O", format, str(raw), str(path)])
    raw.unlink()


@pytest.fixture(scope="module")
def lab(libvirt_host: libvirt.virConnect, guest_folder: Path) -> Iterator[Cli]:
    """`stillframe` set up beside a running machine NAME with the disks vda (qcow2) and vdb (raw)."""
    folder = guest_folder / "cli"
    folder.mkdir()
    make_disk(folder / "a.qcow2", "qcow2", 64 * MIB, [(0, 8 * MIB), (40 * MIB, MIB)])
    make_disk(folder / "b.raw", "raw", 8 * MIB, [(MIB, 3 * MIB)])
    disks = _DISK.format(format="qcow2", path=folder / "a.qcow2", target="vda")
    disks += _DISK.format(format="raw", path=folder / "b.raw", target="vdb")
    domain = libvirt_host.defineXML(_MACHINE.format(name=NAME, disks=disks))
    domain.create()
    cli = Cli(folder)
    cli.configure(
        f"""
        [paths]
        state = "state"
        runtime = "run"
        [vaults.main]
        url = "file://./vault"
        key_file = "main.key"
        [hypervisors.here]
        uri = "{URI}"
        """
    )
    assert cli.run("init").code == 0
    yield cli
    remove_machine(domain)


def backed_up(lab: Cli, *options: str) -> dict[str, object]:
    ran = lab.run("backup", "run", NAME, "--json", *options)
    assert ran.code == 0, ran.err
    return ran.line("backup")


def assert_nothing_left(lab: Cli) -> None:
    assert lab.run("job", "list", "--active", "--json").lines == []
    for folder in ("state/scratch", "run"):
        assert list((lab.folder / folder).glob("sf-*")) == []
    assert list((lab.folder / "vault/sessions").iterdir()) == []


def test_machines_are_listed_and_shown(lab: Cli) -> None:
    listed = [line for line in lab.run("vm", "list", "--json").lines if line["name"] == NAME]
    assert [disk["target"] for disk in listed[0]["disks"]] == ["vda", "vdb"]
    shown = lab.run("vm", "show", NAME)
    assert "vdb   raw" in shown.out
    wrong = lab.run("vm", "show", NAME[:-1] + "x")
    assert wrong.code == 2
    assert NAME in wrong.err


def test_a_full_and_an_incremental_backup_have_the_agreed_form(lab: Cli) -> None:
    made = backed_up(lab, "--full")
    again = backed_up(lab)
    points = lab.run("point", "list", NAME, "--json").lines
    assert [point["id"] for point in points[-2:]] == [made["id"], again["id"]]
    for point in points:
        assert point["machine"] == NAME
        assert point["consistency"] == "crash"
        assert point["frozen_ms"] is None
        for disk in point["disks"]:
            assert {"target", "mode", "reason", "read_bytes", "new_bytes", "stored_bytes"} <= set(disk)
    modes = [{disk["target"]: disk["mode"] for disk in point["disks"]} for point in points[-2:]]
    assert modes == [{"vda": "full", "vdb": "full"}, {"vda": "incremental", "vdb": "full"}]
    assert "because" not in lab.run("point", "list", NAME).out
    assert "it is raw" in lab.run("point", "show", f"{NAME}@latest").out
    assert_nothing_left(lab)


def test_a_goal_that_is_missed_ends_degraded_only_if_it_was_asked_for(lab: Cli) -> None:
    missed = lab.run("backup", "run", NAME, "--consistency", "filesystem", "--json")
    assert missed.code == 3
    assert missed.line("backup")["consistency"] == "crash"
    assert lab.run("backup", "run", NAME, "--consistency", "crash").code == 0
    plain = lab.configure(lab.file.read_text()).read_text()
    lab.configure(plain + '[backup]\nconsistency = "filesystem"\n')
    configured = lab.run("backup", "run", NAME)
    lab.configure(plain)
    assert configured.code == 3


def test_one_unknown_machine_of_two_stops_both_before_anything_begins(lab: Cli) -> None:
    before = lab.run("job", "list", "--json").lines
    ran = lab.run("backup", "run", NAME, "no-such-machine")
    assert ran.code == 2
    assert lab.run("job", "list", "--json").lines == before


def test_a_disk_left_out_is_said_and_an_unknown_one_refused(lab: Cli) -> None:
    made = backed_up(lab, "--exclude", "vdb")
    assert made["not_included"] == [{"target": "vdb", "reason": "excluded by you"}]
    refused = lab.run("backup", "run", NAME, "--exclude", "vdz", "--json")
    assert refused.code == 2
    assert refused.line("backup")["error"]["hint"] == "its disks are: vda, vdb"
    assert_nothing_left(lab)


def test_a_disk_is_restored_into_a_file_that_must_be_new(lab: Cli) -> None:
    backed_up(lab)
    for name, format in (("out.raw", "raw"), ("out.qcow2", "qcow2")):
        ran = lab.run("restore", "disk", f"{NAME}@latest", "vda", "--to", name, "--json")
        assert ran.code == 0, ran.err
        assert ran.line("restore")["files"] == {"vda": str(lab.folder / name)}
        run(["qemu-img", "compare", "-U", "-f", format, "-F", "qcow2", name_in(lab, name), name_in(lab, "a.qcow2")])
    again = lab.run("restore", "disk", f"{NAME}@latest", "vda", "--to", "out.raw")
    assert again.code == 2
    assert "exists already" in again.err
    unknown = lab.run("restore", "disk", f"{NAME}@latest", "vdz", "--to", "new")
    assert unknown.code == 2
    assert "it has: vda, vdb" in unknown.err


def name_in(lab: Cli, name: str) -> str:
    return str(lab.folder / name)


def test_a_machine_is_restored_as_a_new_one(lab: Cli, libvirt_host: libvirt.virConnect) -> None:
    backed_up(lab)
    new = f"{NAME}-new"
    ran = lab.run("restore", "vm", f"{NAME}@latest", "--name", new, "--dir", "restored", "--start", "--json")
    assert ran.code == 0, ran.err
    restored = ran.line("restore")
    domain = libvirt_host.lookupByName(new)
    try:
        assert domain.isActive()
        assert domain.UUIDString() == restored["uuid"]
        assert sorted(restored["files"]) == ["vda", "vdb"]
        again = lab.run("restore", "vm", f"{NAME}@latest", "--name", new, "--dir", "other")
        assert again.code == 2
        assert f"named {new} exists already" in again.err
        astray = lab.run("restore", "vm", f"{NAME}@latest", "--name", "a/../../b", "--dir", "other")
        assert astray.code == 2
        assert "cannot be named" in astray.err
        assert not (lab.folder / "other").exists()
    finally:
        remove_machine(domain)


def test_a_replacement_asks_and_can_be_tried_dry(lab: Cli, libvirt_host: libvirt.virConnect) -> None:
    backed_up(lab)
    before = libvirt_host.lookupByName(NAME).XMLDesc()
    refused = lab.run("restore", "vm", f"{NAME}@latest", "--replace", stdin="y\n")
    assert refused.code == 2
    assert "try: add --yes" in refused.err
    dry = lab.run("restore", "vm", f"{NAME}@latest", "--replace", "--dry-run", "--json")
    assert dry.code == 0
    assert dry.line("plan")["replaces"]["name"] == NAME
    assert libvirt_host.lookupByName(NAME).XMLDesc() == before


def test_in_the_background(lab: Cli) -> None:
    ran = lab.run("backup", "run", NAME, "--detach", "--json")
    assert ran.code == 0, ran.err
    job = ran.line("started")["job"]
    watched = lab.run("job", "watch", job, "--json")
    assert watched.code == 0, watched.err
    ended = watched.line("job")
    assert ended["state"] == "succeeded"
    assert lab.run("point", "list", NAME, "--json").lines[-1]["id"] == ended["point"]
    assert "released" in lab.run("job", "show", job[:6]).out
    late = lab.run("job", "cancel", job)
    assert late.code == 2
    assert "succeeded already" in late.err


def test_points_are_deleted_only_when_told_so(lab: Cli) -> None:
    keep, goes = backed_up(lab), backed_up(lab)
    ref = str(goes["id"])[:12]
    assert lab.run("point", "delete", ref, stdin="y\n").code == 2
    assert lab.run("point", "delete", ref, "--dry-run", "--json").line("deleted")["dry_run"]
    assert lab.run("point", "show", ref).code == 0
    assert lab.run("point", "delete", ref, "--yes").code == 0
    assert lab.run("point", "list", NAME, "--json").lines[-1]["id"] == keep["id"]
    assert lab.run("point", "delete", ref, "--now", "--yes").code == 0
    assert lab.run("point", "show", ref).code == 2
    assert lab.run("point", "verify", str(keep["id"])).code == 0


def test_the_vault_and_its_key_are_enough(lab: Cli) -> None:
    made = backed_up(lab)
    before = lab.run("point", "list", NAME, "--json").lines
    for left in (lab.folder / "state").glob("catalog*"):
        left.unlink()
    assert lab.run("point", "list", "--json").lines == []
    assert lab.run("vault", "rebuild-catalog", "--json").line("catalog")["points"] == len(before)
    after = lab.run("point", "list", NAME, "--json").lines
    assert after == [{**point, "verified": None} for point in before], "who verified what, only the catalog knew"
    assert before[-1]["id"] == made["id"]


def test_a_damaged_pack_is_found_told_and_remembered(lab: Cli) -> None:
    backed_up(lab)
    assert lab.run("vault", "verify", "--full").code == 0
    pack = max((lab.folder / "vault/packs").iterdir(), key=lambda path: path.stat().st_size)
    whole = pack.read_bytes()
    pack.chmod(0o600)
    middle = len(whole) // 2
    pack.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    found = lab.run("vault", "verify", "--full", "--json")
    assert found.code == 1
    assert pack.name in found.line("verify")["findings"][0]["object"]
    assert lab.run("vault", "verify", "--ids").code == 1, "it is known now, at every level"
    damaged = [point["id"] for point in lab.run("point", "list", "--json").lines if point["damaged"]]
    affected = {one["point"] for one in found.line("verify")["findings"][0]["affected"]}
    assert affected
    assert set(damaged) == affected
    (lab.folder / "main.key").rename(lab.folder / "away.key")
    without_key = lab.run("vault", "verify", "--packs").code
    (lab.folder / "away.key").rename(lab.folder / "main.key")
    assert without_key == 1
    pack.write_bytes(whole)
    assert lab.run("vault", "verify", "--full").code == 0
    assert not any(point["damaged"] for point in lab.run("point", "list", "--json").lines)


def test_doctor_sees_the_machine(lab: Cli) -> None:
    checks = lab.run("doctor", "--json").lines
    details = [line["detail"] for line in checks if line["subject"] == f"machine {NAME}"]
    assert any("no guest agent" in detail for detail in details)
    assert any(detail.startswith("vdb is raw") for detail in details)
    assert next(line["level"] for line in checks if line["subject"] == "hypervisor here") == "OK"


# --- two at once, and one that dies ------------------------------------------------------------------------------


def stopped_in_the_middle(lab: Cli) -> subprocess.Popen[str]:
    """A backup whose process stands still between snapshot and release."""
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli.main", "backup", "run", NAME, "--full"],
        cwd=lab.folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "snapshotting" in line:
            process.send_signal(signal.SIGSTOP)
            return process
    raise AssertionError(f"the backup ended with {process.wait()}")


def test_a_second_backup_of_a_machine_is_refused_while_one_runs(lab: Cli) -> None:
    first = stopped_in_the_middle(lab)
    try:
        second = lab.run("backup", "run", NAME)
    finally:
        first.send_signal(signal.SIGCONT)
        _, errors = first.communicate(timeout=120)
    assert second.code == 11
    assert "stillframe job" in second.err
    assert first.returncode == 0, errors


def test_what_a_killed_backup_left_is_settled_by_the_next_command(lab: Cli) -> None:
    killed = stopped_in_the_middle(lab)
    killed.kill()
    killed.communicate(timeout=60)
    ran = lab.run("point", "list", NAME)
    assert ran.code == 0
    assert "settled: backup" in ran.err
    assert_nothing_left(lab)
    assert backed_up(lab)["state"] == "succeeded"


# --- on a terminal ---------------------------------------------------------------------------------------------


def on_terminal(
    lab: Cli, arguments: list[str], *, until: str = "", act: str = "", colour: bool = True
) -> tuple[int, str]:
    """Run a command on a pseudo-terminal; once `until` was shown, type `act` (or interrupt, for "^C")."""
    parent, child = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm", "COLUMNS": "150"}
    if not colour:
        environment["NO_COLOR"] = "1"
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli.main", *arguments],
        cwd=lab.folder,
        stdin=child,
        stdout=child,
        stderr=child,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also where the tests run in the background
    )
    os.close(child)
    shown, deadline = "", time.monotonic() + 120
    while time.monotonic() < deadline:
        ready, _, _ = select.select([parent], [], [], 1)
        if ready:
            try:
                piece = os.read(parent, 65536)
            except OSError:  # what Linux says of a terminal whose other side is closed
                break
            shown += piece.decode(errors="replace")
        if until and until in shown:
            until = ""
            if act == "^C":
                process.send_signal(signal.SIGINT)
            else:
                os.write(parent, act.encode())
    os.close(parent)
    return process.wait(timeout=60), shown


def test_bars_and_tables_on_a_terminal(lab: Cli) -> None:
    code, shown = on_terminal(lab, ["backup", "run", NAME, "--full"])
    assert code == 0, shown
    assert "\x1b[" in shown
    assert "transferring" in shown
    assert "it is raw" in shown
    code, plain = on_terminal(lab, ["point", "list"], colour=False)
    assert code == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", plain)


def test_a_question_on_a_terminal(lab: Cli) -> None:
    made = str(backed_up(lab)["id"])
    code, shown = on_terminal(lab, ["point", "delete", made], until="[y/N]", act="n\n")
    assert code == 1
    assert "nothing was changed" in shown
    assert lab.run("point", "show", made).code == 0
    code, shown = on_terminal(lab, ["point", "delete", made], until="[y/N]", act="y\n")
    assert code == 0, shown
    assert lab.run("point", "list", NAME, "--deleted", "--json").lines[-1]["id"] == made


def test_an_interruption_cancels_and_leaves_nothing(lab: Cli) -> None:
    text = lab.file.read_text()
    lab.configure(f'{text}\nbandwidth = "1MiB"\n')  # under [hypervisors.here]: it takes some seconds
    try:
        code, shown = on_terminal(lab, ["backup", "run", NAME, "--full"], until="snapshotting", act="^C")
    finally:
        lab.configure(text)
    assert code == 130, shown
    assert "interrupted" in shown
    assert "Traceback" not in shown
    assert_nothing_left(lab)
    assert lab.run("job", "list", "--json").lines[-1]["state"] == "cancelled"
