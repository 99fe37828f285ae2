"""What only a hypervisor over QMP has: sockets instead of a list, a monitor for one client, no libvirt to lean on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import nbd
import pytest

from tests.contracts.conftest import MIB, connected, dirty_ranges, make_image
from tests.contracts.qmp_blank import QmpBlank, QmpFactory, qmp, wait_for
from tests.contracts.relay import Relay
from workers.contract.errors import (
    Busy,
    GuestError,
    HypervisorError,
    HypervisorUnreachable,
    NotFound,
    TargetExists,
    UsageError,
)
from workers.contract.machines import Power
from workers.contract.seams import Hypervisor, NewMachine
from workers.hypervisors import agent_socket, open_hypervisor
from workers.hypervisors.qmp_host import QmpHypervisor

NEW = "66666666-2222-3333-4444-555555555555"
AGENT = [
    *("-device", "virtio-serial", "-chardev", "socket,path=qga.sock,server=on,wait=off,id=qga0"),
    *("-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0"),
]


@pytest.fixture
def kind() -> str:
    return "qmp"


class TestFinding:
    def test_a_folder_holds_machines_and_other_things(
        self, hypervisor: Hypervisor, blank: QmpFactory, qmp_folder: Path
    ) -> None:
        one, two = blank({"vda": "qcow2"}), blank({"vda": "raw"}, extra=["-vnc", f"unix:{qmp_folder}/vnc.sock"])
        (qmp_folder / "notes.txt").write_text("no socket")
        with closing(socket.socket(socket.AF_UNIX)) as dead, closing(socket.socket(socket.AF_UNIX)) as other:
            dead.bind(str(qmp_folder / "dead.sock"))
            other.bind(str(qmp_folder / "other.sock"))
            other.listen()
            threading.Thread(target=self._chatter, args=(other,), daemon=True).start()
            found = hypervisor.machines()
        assert [summary.machine.name for summary in found] == sorted([one.name, two.name])
        assert {summary.power for summary in found} == {Power.PAUSED}
        assert found[0].disks[0].capacity == 16 * MIB
        two.stop()
        assert [summary.machine.uuid for summary in hypervisor.machines()] == [one.uuid]
        with pytest.raises(NotFound, match="that runs") as caught:
            hypervisor.inventory(two.uuid)
        assert "only while its QEMU runs" in caught.value.hint
        assert not hypervisor.features.knows_off

    def _chatter(self, server: socket.socket) -> None:
        with server.accept()[0] as link:
            link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    def test_one_socket_is_one_machine(self, blank: QmpFactory, tmp_path: Path) -> None:
        machine = blank({"vda": "qcow2"})
        opened = open_hypervisor(f"qmp+unix://{machine.monitor}", name="lab")
        assert [summary.machine.uuid for summary in opened.machines()] == [machine.uuid]
        assert "QEMU 7" in opened.features.version or "over QMP" in opened.features.version
        machine.stop()
        assert opened.machines() == []
        with pytest.raises(HypervisorUnreachable, match="there is no folder"):
            open_hypervisor(f"qmp+unix://{tmp_path}/none/web.sock")

    def test_without_a_uuid_it_has_a_stable_one_and_that_is_said(
        self, hypervisor: Hypervisor, blank: QmpFactory
    ) -> None:
        machine = blank({"vda": "qcow2"}, start=False)
        machine.uuid = "00000000-0000-0000-0000-000000000000"
        machine.start()
        [found] = hypervisor.machines()
        machine.stop()
        machine.start()
        again = hypervisor.inventory(found.machine.uuid)
        assert found.machine.uuid != machine.uuid
        assert "-uuid" in again.remarks[0]

    def test_two_monitors_are_one_machine_and_two_machines_with_one_uuid_none(
        self, hypervisor: Hypervisor, blank: QmpFactory, qmp_folder: Path
    ) -> None:
        extra = ["-qmp", f"unix:{qmp_folder}/second.sock,server=on,wait=off"]
        one, clone = blank({"vda": "qcow2"}, extra=extra), blank({"vda": "qcow2"}, start=False)
        assert [summary.machine.name for summary in hypervisor.machines()] == [one.name]
        clone.uuid = one.uuid
        clone.start()
        assert len(hypervisor.machines()) == 2
        with pytest.raises(HypervisorError, match="the same UUID") as caught:
            hypervisor.inventory(one.uuid)
        assert "-uuid" in caught.value.hint

    def test_hostile_names(self, hypervisor: Hypervisor, blank: QmpFactory) -> None:
        name = "../\x1b]0;x\x07\n" + "y" * 300
        machine = blank({"vda": "qcow2"}, extra=["-name", f"guest={name}"])
        [found] = hypervisor.machines()
        assert found.machine.name.startswith("../\ufffd]0;x\ufffd\ufffdyyy")
        assert len(found.machine.name) == 255
        wanted = hypervisor.redefined(
            hypervisor.inventory(machine.uuid).definition,
            NewMachine("../x", NEW, {"vda": ("/tmp/none.qcow2", "qcow2")}, None, True),
        )
        with pytest.raises(UsageError, match="cannot be named"):
            hypervisor.define(wanted, None, start=False)

    def test_a_monitor_that_somebody_holds(self, blank: QmpFactory, qmp_folder: Path, tmp_path: Path) -> None:
        hypervisor = QmpHypervisor(qmp_folder, name="lab", runtime_dir=tmp_path, patience=0.3)
        held, free = blank({"vda": "qcow2"}), blank({"vda": "qcow2"})
        with socket.socket(socket.AF_UNIX) as holder:
            holder.connect(str(held.monitor))
            holder.recv(1024)
            names = {summary.machine.name: summary.disks for summary in hypervisor.machines()}
            assert names[held.name] == []
            assert names[free.name] != []
            with pytest.raises(Busy, match="another program holds the QMP monitor"):
                hypervisor.inventory(held.uuid)
            with pytest.raises(Busy):
                hypervisor.begin_backup(held.uuid, held.request("one"))
        assert hypervisor.inventory(held.uuid).machine.name == held.name


class TestDisks:
    def test_every_disk_is_listed_with_the_reason_for_its_absence(
        self, hypervisor: Hypervisor, blank: QmpFactory, guest_folder: Path
    ) -> None:
        images = {name: make_image(guest_folder / f"{name}.raw", "raw") for name in ("fixed", "shared", "cd", "scsi")}
        old = make_image(guest_folder / "qmp-old.qcow2", options="compat=0.10")
        extra = [
            *("-drive", f"file={images['fixed']},if=virtio,format=raw,readonly=on"),
            *("-drive", f"file={images['shared']},if=none,id=two,format=raw"),
            *("-device", "virtio-blk-pci,drive=two,id=vdc,share-rw=on,addr=0x10"),
            *("-drive", f"file={images['cd']},if=none,media=cdrom,id=cd0", "-device", "ide-cd,drive=cd0,bus=ide.1"),
            *("-blockdev", f"driver=file,filename={old},node-name=old-file"),
            *("-blockdev", "driver=qcow2,file=old-file,node-name=old", "-object", "throttle-group,id=g0"),
            *("-blockdev", "driver=throttle,throttle-group=g0,file=old,node-name=slow"),
            *("-device", "virtio-scsi-pci,id=scsi0,addr=0x11", "-device", "scsi-hd,drive=slow,bus=scsi0.0,lun=3"),
            *("-drive", f"file={images['scsi']},if=none,id=thrown,snapshot=on,format=raw"),
            *("-device", "scsi-hd,drive=thrown,id=thrown0,bus=scsi0.0,lun=4"),
        ]
        machine = blank({"vda": "qcow2", "vdb": "raw"}, extra=extra)
        disks = {disk.target: disk for disk in hypervisor.inventory(machine.uuid).disks}
        assert {target: disk.excluded for target, disk in disks.items()} == {
            "vda": "",
            "vdb": "",
            "hda": "CD-ROM",
            "cd0": "CD-ROM",
            "virtio0": "read-only",
            "vdc": "shared between machines",
            "slow": "",
            "thrown0": "transient",
        }
        assert [target for target, disk in disks.items() if disk.tracks_changes] == ["vda"]
        assert (disks["slow"].source, disks["slow"].format) == (str(old), "qcow2")
        assert disks["slow"].address == "pci:0000:00:11.0/0:0:3"
        assert disks["vdc"].address == "pci:0000:00:10.0"

    def test_a_lost_image_is_an_error_for_a_backup_and_a_line_in_a_list(
        self, hypervisor: Hypervisor, blank: QmpFactory
    ) -> None:
        machine = blank({"vda": "qcow2"})
        before = hypervisor.inventory(machine.uuid).disks[0].identity
        make_image(machine.folder / "other").replace(machine.disks["vda"])
        assert hypervisor.inventory(machine.uuid).disks[0].identity != before
        machine.disks["vda"].unlink()
        with pytest.raises(HypervisorError, match="vda"):
            hypervisor.inventory(machine.uuid)
        assert "cannot be read" in hypervisor.machines()[0].disks[0].excluded

    def test_an_nbd_server_of_somebody_else(self, hypervisor: Hypervisor, blank: QmpFactory, tmp_path: Path) -> None:
        machine = blank({"vda": "qcow2"})
        theirs = {"type": "unix", "data": {"path": str(tmp_path / "theirs.sock")}}
        machine.ask("nbd-server-start", addr=theirs)
        with pytest.raises(Busy, match="NBD server"):
            hypervisor.begin_backup(machine.uuid, machine.request("one"))
        assert machine.checkpoints() == machine.ask("query-jobs") == []
        assert not hypervisor.end_backup(machine.uuid, "sf-one")
        machine.ask("block-export-add", id="theirs", **{"type": "nbd", "node-name": machine.node("vda")})
        with pytest.raises(Busy, match="exports disks"):
            hypervisor.begin_backup(machine.uuid, machine.request("one"))
        assert [export["id"] for export in machine.ask("query-block-exports")] == ["theirs"]

    def test_a_process_that_died_before_there_were_exports(self, hypervisor: Hypervisor, blank: QmpFactory) -> None:
        """Each thing that a begun backup leaves is found by itself."""
        machine = blank({"vda": "qcow2"})
        path = machine.taken_socket("one")
        path.parent.mkdir(parents=True)
        machine.ask("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
        assert hypervisor.end_backup(machine.uuid, "sf-one")
        assert not path.exists()
        assert not hypervisor.end_backup(machine.uuid, "sf-one")
        machine.ask("block-dirty-bitmap-add", node=machine.node("vda"), name="sf-one.0", disabled=True)
        assert hypervisor.leftovers(machine.uuid).checkpoints == []
        assert hypervisor.end_backup(machine.uuid, "sf-one")
        assert machine.checkpoints() == []

    @pytest.mark.parametrize(
        "command", ["blockdev-add", "transaction", "nbd-server-start", "block-export-add", "block-job-cancel"]
    )
    def test_death_after_each_command(
        self, hypervisor: Hypervisor, blank: QmpFactory, tmp_path: Path, command: str
    ) -> None:
        """Whatever was done last, a process that comes later takes it all away, and the base is untouched."""
        machine = blank({"vda": "qcow2", "vdb": "qcow2"})
        hypervisor.begin_backup(machine.uuid, machine.request("base"))
        assert hypervisor.end_backup(machine.uuid, "sf-base")
        runtime = machine.taken_socket("one").parent.parent
        with Relay(tmp_path / "relay.sock", machine.monitor) as relay:
            dying = open_hypervisor(f"qmp+unix://{relay.path}", name="lab", runtime_dir=runtime)
            relay.cut_at(f'"{command}"'.encode(), for_good=True)
            with suppress(HypervisorError, NotFound):
                dying.begin_backup(machine.uuid, machine.request("one", "sf-base"))
                dying.end_backup(machine.uuid, "sf-one")
            assert relay.has_cut
        left = hypervisor.leftovers(machine.uuid).backup_job  # QEMU may have dropped the command with the connection
        assert left in ("one", None)
        assert hypervisor.end_backup(machine.uuid, "sf-one") == bool(left)
        hypervisor.delete_checkpoint(machine.uuid, "sf-one")
        assert machine.checkpoints() == ["sf-base"]
        assert machine.ask("query-jobs") == machine.ask("query-block-exports") == []
        nodes = machine.ask("query-named-block-nodes", flat=True)
        assert [node["node-name"] for node in nodes if node["node-name"].startswith("sf-")] == []
        begun = hypervisor.begin_backup(machine.uuid, machine.request("two", "sf-base"))
        assert [dirty_ranges(hypervisor.host, export) for export in begun.exports] == [[], []]

    def test_what_is_said_of_io_threads_is_true(
        self, hypervisor: Hypervisor, blank: QmpFactory, guest_folder: Path
    ) -> None:
        """The danger is told of a disk just where the backup of such a disk kills its machine."""
        image = make_image(guest_folder / f"threaded-{os.getpid()}.qcow2")
        extra = ["-object", "iothread,id=t0", "-drive", f"file={image},if=none,id=two,format=qcow2"]
        extra += ["-device", "virtio-blk-pci,drive=two,id=vdt,iothread=t0"]
        machine = blank({"vda": "qcow2"}, extra=extra)
        disks = {disk.target: disk for disk in hypervisor.inventory(machine.uuid).disks}
        assert disks["vda"].danger == ""
        machine.disks, machine.sizes = {"vdt": image}, {"vdt": 16 * MIB}
        machine.ask("cont")  # the thread takes the disk when the firmware has looked at it
        begun = hypervisor.begin_backup(machine.uuid, machine.request("one"))
        assert machine.process is not None
        for _ in range(50):
            with suppress(nbd.Error), connected(hypervisor.host, begun.exports[0]):
                pass
            with suppress(subprocess.TimeoutExpired):
                machine.process.wait(0.1)
                break
        died = machine.process.poll() is not None
        assert died == ("crashes" in disks["vdt"].danger), disks["vdt"]
        assert died or disks["vdt"].danger == ""

    def test_a_machine_that_ends_meanwhile(self, hypervisor: Hypervisor, blank: QmpFactory) -> None:
        """Its new checkpoint is in the image already; it goes, and the base stays."""
        machine = blank({"vda": "qcow2"})
        hypervisor.begin_backup(machine.uuid, machine.request("base"))
        assert hypervisor.end_backup(machine.uuid, "sf-base")
        hypervisor.begin_backup(machine.uuid, machine.request("one", "sf-base"))
        machine.stop()
        assert machine.bitmaps("vda") == ["sf-base", "sf-one"]
        with pytest.raises(NotFound):
            hypervisor.end_backup(machine.uuid, "sf-one")
        hypervisor.delete_checkpoint(machine.uuid, "sf-one")
        assert machine.bitmaps("vda") == ["sf-base"]

    def test_exports_of_others_on_our_server_stay(self, hypervisor: Hypervisor, blank: QmpFactory) -> None:
        machine = blank({"vda": "qcow2"})
        hypervisor.begin_backup(machine.uuid, machine.request("one"))
        machine.ask("block-export-add", id="theirs", **{"type": "nbd", "node-name": machine.node("vda")})
        assert hypervisor.end_backup(machine.uuid, "sf-one")
        assert [export["id"] for export in machine.ask("query-block-exports")] == ["theirs"]

    def test_a_qemu_of_another_user(self, blank: QmpFactory, qmp_folder: Path, guest_folder: Path) -> None:
        """It gets its scratch and a place for its socket."""
        machine = blank({"vda": "qcow2"}, extra=["-runas", "nobody"])
        runtime = guest_folder / f"run-{machine.name}"
        hypervisor = open_hypervisor(f"qmp+unix://{qmp_folder}", name="lab", runtime_dir=runtime)
        begun = hypervisor.begin_backup(machine.uuid, machine.request("one"))
        with connected(hypervisor.host, begun.exports[0]) as handle:
            assert handle.get_size() == 16 * MIB
        assert hypervisor.end_backup(machine.uuid, "sf-one")


@pytest.fixture
def agent_machine(blank: QmpFactory) -> QmpBlank:
    return blank({"vda": "qcow2"}, extra=AGENT)


class TestAgent:
    def test_no_channel_and_nobody_behind_it(
        self, hypervisor: Hypervisor, blank: QmpFactory, agent_machine: QmpBlank
    ) -> None:
        with pytest.raises(GuestError, match="no guest agent channel"):
            hypervisor.agent_command(blank({"vda": "raw"}).uuid)('{"execute": "guest-ping"}', 1)
        with pytest.raises(GuestError, match="did not answer"):
            hypervisor.agent_command(agent_machine.uuid)('{"execute": "guest-ping"}', 0.3)
        assert not hypervisor.inventory(agent_machine.uuid).agent

    def test_the_thaw_needs_nothing_of_ours(self, hypervisor: Hypervisor, agent_machine: QmpBlank) -> None:
        *program, path = hypervisor.thaw_command(agent_machine.uuid)
        assert path == str(agent_machine.folder / "qga.sock")
        assert program[:2] == [sys.executable, "-I"]
        done = subprocess.run([*program, "/nonexistent"], cwd="/", env={}, capture_output=True, check=False)
        assert done.returncode == 1


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "agent.sock"))
        server.listen()
        yield server


def answering(server: socket.socket, *, before: bytes = b"", reply: bytes = b'{"return": {}}\n') -> None:
    """An agent that answers one client: `before` is what an earlier client has left."""

    def serve() -> None:
        with suppress(BrokenPipeError), server.accept()[0] as link, link.makefile("rb") as lines:
            link.sendall(before)
            token = json.loads(lines.readline().lstrip(b"\xff"))["arguments"]["id"]
            link.sendall(b'\xff{"return": 12345}\n\xff' + json.dumps({"return": token}).encode() + b"\n")
            lines.readline()
            link.sendall(reply)

    threading.Thread(target=serve, daemon=True).start()


class TestAgentSocket:
    def test_late_replies_of_others_are_not_ours(self, agent: socket.socket, tmp_path: Path) -> None:
        answering(agent, before=b'{"return": "late"}\n{"ret', reply=b'{"return": "mine"}\n')
        assert agent_socket.ask(str(tmp_path / "agent.sock"), "{}", 5) == '{"return": "mine"}'

    def test_silence_and_another_process(self, agent: socket.socket, tmp_path: Path) -> None:
        with pytest.raises(agent_socket.AgentSilent, match="within"):
            agent_socket.ask(str(tmp_path / "agent.sock"), "{}", 0.1)
        with pytest.raises(agent_socket.Elsewhere):
            agent_socket.ask(str(tmp_path / "agent.sock"), "{}", 5, pid=os.getpid() + 1)
        answering(agent, reply=b"")
        with pytest.raises(agent_socket.AgentSilent, match=r"closed|within"):
            agent_socket.ask(str(tmp_path / "agent.sock"), "{}", 0.5)

    def test_the_program(self, agent: socket.socket, tmp_path: Path) -> None:
        for reply, code in ((b'{"return": 2}\n', 0), (b'{"error": {"desc": "no"}}\n', 1), (b"nonsense\n", 1)):
            answering(agent, reply=reply)
            argv = [sys.executable, "-I", agent_socket.__file__, str(tmp_path / "agent.sock")]
            assert subprocess.run(argv, cwd="/", stderr=subprocess.DEVNULL, check=False).returncode == code


def new_machine(folder: Path, name: str, uuid: str = NEW, *, fresh: bool = True) -> NewMachine:
    image = make_image(folder / f"{uuid[:4]}.qcow2")
    return NewMachine(name, uuid, {"vda": (str(image), "qcow2")}, None, fresh)


class TestDefining:
    def test_a_copy_beside_its_original(self, hypervisor: Hypervisor, agent_machine: QmpBlank, tmp_path: Path) -> None:
        found = hypervisor.inventory(agent_machine.uuid)
        with pytest.raises(UsageError, match="knows no disk"):
            hypervisor.redefined(found.definition, NewMachine("x", NEW, {"vdz": ("/x", "qcow2")}, None, True))
        name = "it's; touch 'pwned' $(x)"
        hypervisor.define(hypervisor.redefined(found.definition, new_machine(tmp_path, name)), None, start=True)
        copy = hypervisor.inventory(NEW)
        assert (copy.machine.name, copy.power) == (name, Power.RUNNING)
        assert copy.disks[0].source.startswith(str(tmp_path))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["6666.qcow2", f"{name}.qemu.json", f"{name}.start"]
        assert (tmp_path / f"{name}.start").stat().st_mode & 0o777 == 0o700
        assert hypervisor.inventory(agent_machine.uuid).power is Power.PAUSED
        qmp(agent_machine.control, "query-status")
        hypervisor.undefine(NEW)
        with pytest.raises(NotFound):
            hypervisor.inventory(NEW)
        hypervisor.undefine(NEW)
        assert [path.name for path in tmp_path.iterdir()] == ["6666.qcow2"]
        assert agent_machine.monitor.is_socket()

    def test_one_that_takes_its_place(self, hypervisor: Hypervisor, blank: QmpFactory, tmp_path: Path) -> None:
        machine = blank({"vda": "qcow2"})
        found = hypervisor.inventory(machine.uuid)
        wanted = hypervisor.redefined(found.definition, new_machine(tmp_path, machine.name, machine.uuid, fresh=False))
        hypervisor.undefine(machine.uuid)
        hypervisor.define(wanted, None, start=True)
        wait_for(machine.monitor)
        again = hypervisor.inventory(machine.uuid)
        assert again.disks[0].source.startswith(str(tmp_path))
        hypervisor.undefine(machine.uuid)

    def test_names_that_are_taken_and_starts_that_fail(
        self, hypervisor: Hypervisor, blank: QmpFactory, tmp_path: Path
    ) -> None:
        machine = blank({"vda": "qcow2"})
        definition = hypervisor.inventory(machine.uuid).definition
        taken = hypervisor.redefined(definition, new_machine(tmp_path, machine.name))
        with pytest.raises(TargetExists, match="runs already"):
            hypervisor.define(taken, None, start=False)
        wanted = hypervisor.redefined(definition, new_machine(tmp_path, "copy"))
        assert hypervisor.define(wanted, None, start=False) == str(tmp_path / "copy.start")
        hypervisor.define(wanted, None, start=False)
        with pytest.raises(TargetExists, match="another machine's"):
            hypervisor.define(wanted.replace(NEW, machine.uuid), None, start=False)
        (tmp_path / "6666.qcow2").unlink()
        with pytest.raises(HypervisorError, match=r"starting copy: .*6666\.qcow2"):
            hypervisor.define(wanted, None, start=True)
        with pytest.raises(UsageError, match="pools"):
            hypervisor.volume_dir("default")
        with pytest.raises(UsageError, match="NVRAM"):
            hypervisor.define(wanted, b"variables", start=False)
        with pytest.raises(UsageError, match="of libvirt's"):
            hypervisor.define("<domain/>", None, start=False)
