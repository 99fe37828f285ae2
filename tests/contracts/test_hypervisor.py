"""What every Hypervisor must do: on a real libvirt, and on bare QEMUs over QMP.

What only one of them has (machines that are off, a list of checkpoints beside the images) is marked so; what only QMP
has is in `test_qmp.py`."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import libvirt
import pytest

from tests.contracts.conftest import (
    MIB,
    BlankFactory,
    BlankMachine,
    connected,
    dirty_ranges,
    make_image,
    only_here,
    only_libvirt,
)
from tests.contracts.relay import Relay
from workers.contract.errors import (
    Busy,
    CheckpointUnusable,
    ConfigError,
    HypervisorError,
    HypervisorUnreachable,
    NotFound,
    UsageError,
)
from workers.contract.machines import BitmapState, Power
from workers.contract.seams import Hypervisor
from workers.hypervisors import open_hypervisor

VALID, MISSING, INCONSISTENT = BitmapState.VALID, BitmapState.MISSING, BitmapState.INCONSISTENT


def backed_up(hypervisor: Hypervisor, machine: BlankMachine, job: str, base: str | None = None) -> str:
    """One whole backup; the XML of its checkpoint."""
    begun = hypervisor.begin_backup(machine.uuid, machine.request(job, base))
    assert hypervisor.end_backup(machine.uuid, f"sf-{job}")
    assert begun.checkpoint_xml is not None
    return begun.checkpoint_xml


def judged(hypervisor: Hypervisor, machine: BlankMachine, base: str, xml: str | None) -> dict[str, BitmapState | None]:
    found = hypervisor.inventory(machine.uuid, base=base, base_xml=xml)
    return {disk.target: disk.bitmap for disk in found.disks if not disk.excluded}


class TestOpening:
    def test_says_what_it_can_do(self, hypervisor: Hypervisor, kind: str) -> None:
        assert hypervisor.features.backup
        assert hypervisor.host.local == (kind != "ssh")
        assert hypervisor.features.version.startswith("QEMU" if kind == "qmp" else "libvirt ")
        assert hypervisor.features.knows_off == (kind != "qmp")

    @pytest.mark.parametrize(
        "uri",
        [
            "esx://host",
            "qemu://lab1/system",
            "qemu+ssh://root@lab1/session",
            "qemu+ssh:///system",
            "qemu+ssh://root:secret@lab1/system",
            "qemu+ssh://-oProxyCommand=touch/system",
            "qemu+ssh://-oProxyCommand=x@lab1/system",
            "qemu+ssh://lab1:99999/system",
            "qemu+ssh://lab 1/system",
            "qemu+ssh://lab1/system?no_verify=1",
            "qemu+ssh://lab1/system?socket=/run/x:/etc/y",
            "qemu+tls://lab1/system",
            "qemu:///elsewhere",
            "lab1",
            "",
            "qmp+unix://host/run/qemu",
            "qmp+unix://",
            "qmp+unix:run/qemu",
            "qmp+unix:///run/qemu?socket=x",
            "qmp://localhost:4444",
        ],
    )
    def test_a_uri_that_cannot_be_meant(self, uri: str) -> None:
        with pytest.raises(ConfigError, match="hypervisor URI"):
            open_hypervisor(uri)

    def test_an_unreachable_one(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(HypervisorUnreachable, match="Failed to connect") as caught:
            open_hypervisor(f"qemu+unix:///system?socket={tmp_path}/none", name="lab")
        assert "systemctl start libvirtd" in caught.value.hint
        assert capfd.readouterr().err == ""  # libvirt would print errors by itself

    @only_here
    def test_a_lost_connection_is_made_again(self, blank: BlankFactory, tmp_path: Path) -> None:
        machine = blank({"vda": "qcow2"}, start=False)
        with Relay(tmp_path / "relay.sock") as relay:
            hypervisor = open_hypervisor(f"qemu+unix:///system?socket={relay.path}", name="lab")
            assert hypervisor.inventory(machine.uuid).power is Power.OFF
            relay.cut()
            assert hypervisor.inventory(machine.uuid).power is Power.OFF
            hypervisor.close()
            assert hypervisor.inventory(machine.uuid).power is Power.OFF
        with pytest.raises(HypervisorUnreachable):
            hypervisor.inventory(machine.uuid)
        hypervisor.close()

    @pytest.mark.parametrize("uuid", ["6f9b31a4-1f0e-4c57-9d4f-8a3d5f0c9b11", "no-uuid"])
    def test_an_unknown_machine(self, hypervisor: Hypervisor, uuid: str) -> None:
        with pytest.raises(NotFound, match="lab has no machine"):
            hypervisor.inventory(uuid)


class TestLooking:
    @only_libvirt
    def test_machines_and_their_power(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        on, off = blank({"vda": "qcow2"}), blank({"vda": "raw"}, start=False)
        found = {summary.machine.uuid: summary for summary in hypervisor.machines()}
        assert found[on.uuid].power is Power.PAUSED
        assert found[off.uuid].power is Power.OFF
        assert found[on.uuid].machine.name == on.name
        assert found[on.uuid].machine.hypervisor == "lab"
        assert found[on.uuid].disks[0].capacity == 16 * MIB

    @only_libvirt
    def test_every_disk_is_listed_with_the_reason_for_its_absence(
        self, hypervisor: Hypervisor, blank: BlankFactory, guest_folder: Path
    ) -> None:
        others = {name: make_image(guest_folder / f"{name}.raw", "raw") for name in ("shared", "fixed", "passing")}
        old = make_image(guest_folder / "old.qcow2", options="compat=0.10")
        drives = "".join(
            f"<disk type='file' device='disk'><driver name='qemu' type='{path.suffix[1:]}'/><source file='{path}'/>"
            f"<target dev='{target}' bus='virtio'/>{flag}</disk>"
            for target, path, flag in (
                ("vdc", others["shared"], "<shareable/>"),
                ("vdd", others["fixed"], "<readonly/>"),
                ("vde", others["passing"], "<transient/>"),
                ("vdf", old, ""),
            )
        )
        drives += (
            "<disk type='network' device='disk'><source protocol='nbd' name='x'><host name='h' port='1'/></source>"
            "<target dev='vdg' bus='virtio'/></disk>"
        )
        machine = blank({"vda": "qcow2", "vdb": "raw"}, start=False, extra=drives)
        disks = {disk.target: disk for disk in hypervisor.inventory(machine.uuid).disks}
        assert {target: disk.excluded for target, disk in disks.items()} == {
            "vda": "",
            "vdb": "",
            "hda": "CD-ROM",
            "vdc": "shared between machines",
            "vdd": "read-only",
            "vde": "transient",
            "vdf": "",
            "vdg": "network disk (nbd)",
        }
        assert [target for target, disk in disks.items() if disk.tracks_changes] == ["vda"]
        assert disks["vda"].source_options == {"compat": "1.1", "cluster_size": "65536"}
        assert disks["vdf"].source_options["compat"] == "0.10"
        assert disks["vdb"].source == str(machine.disks["vdb"])
        assert disks["vda"].bitmap is None

    @only_libvirt
    def test_a_replaced_image_is_another_identity(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2"}, start=False)
        before = hypervisor.inventory(machine.uuid).disks[0].identity
        assert hypervisor.inventory(machine.uuid).disks[0].identity == before
        make_image(machine.folder / "other").replace(machine.disks["vda"])
        assert hypervisor.inventory(machine.uuid).disks[0].identity != before

    @only_libvirt
    def test_a_lost_image_is_an_error_for_a_backup_and_a_line_in_a_list(
        self, hypervisor: Hypervisor, blank: BlankFactory
    ) -> None:
        machine = blank({"vda": "qcow2"}, start=False)
        machine.disks["vda"].unlink()
        with pytest.raises(HypervisorError, match="vda"):
            hypervisor.inventory(machine.uuid)
        listed = next(each for each in hypervisor.machines() if each.machine.uuid == machine.uuid)
        assert "cannot be read" in listed.disks[0].excluded

    @only_libvirt
    def test_the_definition_holds_the_machine(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2"}, extra="<graphics type='vnc' autoport='yes' passwd='secret'/>")
        found = hypervisor.inventory(machine.uuid)
        assert "secret" in found.definition
        assert machine.uuid in found.definition
        assert not found.agent
        assert found.foreign_job == ""
        assert found.nvram_path is None
        assert hypervisor.nvram(found) is None

    @only_libvirt
    def test_an_off_machine_remembers_how_it_ended(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2"})
        assert not hypervisor.inventory(machine.uuid).orderly_off
        machine.stop()  # by the host, not by the guest
        assert not hypervisor.inventory(machine.uuid).orderly_off


class TestBackup:
    def test_all_disks_can_be_read_until_it_ends(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2", "vdb": "raw"})
        machine.write("vda", 0, 4096, 0x11)
        begun = hypervisor.begin_backup(machine.uuid, machine.request("one"))
        machine.write("vda", 0, 4096, 0x22)  # after the point in time
        assert [(each.target, each.bitmap) for each in begun.exports] == [("vda", None), ("vdb", None)]
        with connected(hypervisor.host, begun.exports[0]) as handle:
            assert handle.get_size() == 16 * MIB
            assert bytes(handle.pread(4096, 0)) == b"\x11" * 4096
        assert hypervisor.leftovers(machine.uuid).backup_job == "one"
        assert hypervisor.leftovers(machine.uuid).backup_job == "one"
        assert hypervisor.inventory(machine.uuid).foreign_job == ""
        assert hypervisor.end_backup(machine.uuid, "sf-one")
        assert hypervisor.leftovers(machine.uuid).backup_job is None
        assert not hypervisor.host.taken(Path(begun.exports[0].socket))
        assert not hypervisor.end_backup(machine.uuid, "sf-one")
        subprocess.run(["qemu-img", "check", "-q", str(machine.folder / "sf-one-vda.scratch")], check=True)  # unlocked
        assert "sf-one" in hypervisor.leftovers(machine.uuid).checkpoints

    def test_an_incremental_knows_exactly_what_changed(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2", "vdb": "qcow2", "vdc": "raw"})
        machine.write("vda", 0, MIB)
        backed_up(hypervisor, machine, "one")
        machine.write("vda", 3 * MIB, 65536)
        begun = hypervisor.begin_backup(machine.uuid, machine.request("two", "sf-one"))
        changed = {each.target: dirty_ranges(hypervisor.host, each) for each in begun.exports if each.bitmap}
        assert changed == {"vda": [(3 * MIB, 65536)], "vdb": []}
        assert begun.exports[2].bitmap is None
        assert hypervisor.end_backup(machine.uuid, "sf-two")

    def test_one_disk_in_full_beside_an_incremental_one(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2", "vdb": "qcow2"})
        backed_up(hypervisor, machine, "one")
        begun = hypervisor.begin_backup(machine.uuid, machine.request("two", "sf-one", full=("vdb",)))
        assert [bool(each.bitmap) for each in begun.exports] == [True, False]
        assert hypervisor.end_backup(machine.uuid, "sf-two")

    def test_without_a_disk_that_tracks_there_is_no_checkpoint(
        self, hypervisor: Hypervisor, blank: BlankFactory
    ) -> None:
        machine = blank({"vda": "raw"})
        begun = hypervisor.begin_backup(machine.uuid, machine.request("one"))
        assert begun.checkpoint_xml is None
        assert hypervisor.end_backup(machine.uuid, "sf-one")
        assert machine.checkpoints() == []

    def test_ending_takes_the_exact_name(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2"})
        hypervisor.begin_backup(machine.uuid, machine.request("job10"))
        assert not hypervisor.end_backup(machine.uuid, "sf-job1")
        assert hypervisor.leftovers(machine.uuid).backup_job == "job10"
        assert hypervisor.end_backup(machine.uuid, "sf-job10")

    def test_a_second_backup_is_refused_at_once(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2"})
        hypervisor.begin_backup(machine.uuid, machine.request("one"))
        started = time.monotonic()
        with pytest.raises(Busy, match="sf-one"):
            hypervisor.begin_backup(machine.uuid, machine.request("two"))
        assert time.monotonic() - started < 5  # libvirt alone waits 30 s
        assert machine.checkpoints() == ["sf-one"]
        assert hypervisor.leftovers(machine.uuid).backup_job == "one"

    def test_a_job_of_somebody_else_is_seen_and_left_alone(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2"})
        machine.foreign_backup()
        assert "backup" in hypervisor.inventory(machine.uuid).foreign_job
        assert hypervisor.leftovers(machine.uuid).backup_job is None
        assert not hypervisor.end_backup(machine.uuid, "sf-one")
        with pytest.raises(Busy):
            hypervisor.begin_backup(machine.uuid, machine.request("one"))
        assert machine.foreign_backup_runs()
        assert machine.checkpoints() == []

    @only_libvirt
    def test_a_machine_that_is_off(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2"}, start=False)
        with pytest.raises(HypervisorError, match="not running"):
            hypervisor.begin_backup(machine.uuid, machine.request("one"))
        assert not hypervisor.end_backup(machine.uuid, "sf-one")

    def test_a_start_that_fails_leaves_nothing(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2"})
        request = machine.request("one")
        request.disks[0].scratch.unlink()
        with pytest.raises(HypervisorError, match="starting the backup"):
            hypervisor.begin_backup(machine.uuid, request)
        assert machine.checkpoints() == []
        assert hypervisor.leftovers(machine.uuid).backup_job is None
        backed_up(hypervisor, machine, "one")

    def test_a_start_whose_socket_is_taken_leaves_the_base_alone(
        self, hypervisor: Hypervisor, blank: BlankFactory
    ) -> None:
        machine = blank({"vda": "qcow2"})
        backed_up(hypervisor, machine, "one")
        in_the_way = machine.taken_socket("two")
        hypervisor.host.make_folder(in_the_way, 0o755)
        with pytest.raises(HypervisorError):
            hypervisor.begin_backup(machine.uuid, machine.request("two", "sf-one"))
        hypervisor.host.remove([in_the_way])
        assert machine.checkpoints() == ["sf-one"]
        assert judged(hypervisor, machine, "sf-one", None) == {"vda": VALID}

    @pytest.mark.parametrize(
        ("kind", "words"), [("libvirt", b"<domainbackup"), ("qmp", b'"transaction"')], indirect=["kind"]
    )
    def test_a_start_whose_reply_is_lost_leaves_nothing(
        self, blank: BlankFactory, tmp_path: Path, kind: str, words: bytes
    ) -> None:
        machine = blank({"vda": "qcow2"})
        with Relay(tmp_path / "relay.sock", *([machine.monitor] if kind == "qmp" else [])) as relay:
            libvirt_uri, qmp_uri = f"qemu+unix:///system?socket={relay.path}", f"qmp+unix://{relay.path}"
            hypervisor = open_hypervisor(qmp_uri if kind == "qmp" else libvirt_uri, name="lab", runtime_dir=tmp_path)
            request = machine.request("one")
            relay.cut_at(words)
            with pytest.raises(HypervisorUnreachable):
                hypervisor.begin_backup(machine.uuid, request)
            assert relay.has_cut
            assert hypervisor.leftovers(machine.uuid).backup_job is None
            assert machine.checkpoints() == []
            backed_up(hypervisor, machine, "two")
            hypervisor.close()

    def test_an_unusable_base_names_its_disk_and_leaves_nothing(
        self, hypervisor: Hypervisor, blank: BlankFactory
    ) -> None:
        machine = blank({"vda": "qcow2", "vdb": "qcow2"})
        xml = backed_up(hypervisor, machine, "one")
        machine.kill()
        machine.start()
        known = machine.checkpoints()
        with pytest.raises(CheckpointUnusable) as caught:
            hypervisor.begin_backup(machine.uuid, machine.request("two", "sf-one", full=("vda",)))
        assert caught.value.target == "vdb"
        assert machine.checkpoints() == known
        hypervisor.delete_checkpoint(machine.uuid, "sf-one")
        with pytest.raises(CheckpointUnusable):
            hypervisor.begin_backup(machine.uuid, machine.request("three", "sf-one"))
        assert machine.checkpoints() == []
        assert "vda" in xml

    @pytest.mark.parametrize("name", ["one", "sf-", "sf-../x"])
    def test_a_name_that_is_not_ours(self, hypervisor: Hypervisor, blank: BlankFactory, name: str) -> None:
        machine = blank({"vda": "qcow2"})
        with pytest.raises(UsageError):
            hypervisor.end_backup(machine.uuid, name)
        with pytest.raises(UsageError):
            hypervisor.delete_checkpoint(machine.uuid, name)


class TestBase:
    def test_a_good_one(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2", "vdb": "raw"})
        xml = backed_up(hypervisor, machine, "one")
        assert judged(hypervisor, machine, "sf-one", xml) == {"vda": VALID, "vdb": MISSING}
        assert judged(hypervisor, machine, "sf-one", None) == {"vda": VALID, "vdb": MISSING}

    @only_libvirt
    def test_lost_by_libvirt_it_is_redefined_and_serves(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2"})
        xml = backed_up(hypervisor, machine, "one")
        machine.write("vda", 0, 65536)
        machine.domain.checkpointLookupByName("sf-one").delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
        assert judged(hypervisor, machine, "sf-one", None) == {"vda": MISSING}
        assert judged(hypervisor, machine, "sf-one", xml) == {"vda": VALID}
        begun = hypervisor.begin_backup(machine.uuid, machine.request("two", "sf-one"))
        assert dirty_ranges(hypervisor.host, begun.exports[0]) == [(0, 65536)]

    def test_an_orderly_stop_and_start_keeps_it(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2"})
        xml = backed_up(hypervisor, machine, "one")
        machine.write("vda", MIB, 65536)
        machine.stop()
        if hypervisor.features.knows_off:
            assert judged(hypervisor, machine, "sf-one", xml) == {"vda": VALID}
        machine.start()
        assert judged(hypervisor, machine, "sf-one", xml) == {"vda": VALID}
        begun = hypervisor.begin_backup(machine.uuid, machine.request("two", "sf-one"))
        assert dirty_ranges(hypervisor.host, begun.exports[0]) == [(MIB, 65536)]

    def test_after_a_crash_it_is_inconsistent(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2", "vdb": "qcow2"})
        xml = backed_up(hypervisor, machine, "one")
        machine.stop()
        machine.start()
        machine.kill()
        if hypervisor.features.knows_off:
            off = hypervisor.inventory(machine.uuid, base="sf-one", base_xml=xml)
            assert [disk.bitmap for disk in off.disks[:2]] == [INCONSISTENT, INCONSISTENT]
            assert "in use" in off.disks[0].bitmap_detail
        machine.start()
        on = hypervisor.inventory(machine.uuid, base="sf-one", base_xml=xml)
        assert [disk.bitmap for disk in on.disks[:2]] == [INCONSISTENT, INCONSISTENT]
        assert "vda" in on.disks[0].bitmap_detail

    def test_each_disk_is_judged_for_itself(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        """A disk whose image was put back from elsewhere does not take the others along."""
        machine = blank({"vda": "qcow2", "vdb": "qcow2", "vdc": "qcow2"})
        xml = backed_up(hypervisor, machine, "one")
        machine.stop()
        make_image(machine.disks["vda"])
        expected = {"vda": MISSING, "vdb": VALID, "vdc": VALID}
        if hypervisor.features.knows_off:
            assert judged(hypervisor, machine, "sf-one", xml) == expected
        machine.start()
        assert judged(hypervisor, machine, "sf-one", xml) == expected
        assert judged(hypervisor, machine, "sf-one", None) == expected  # the entry still covers all
        begun = hypervisor.begin_backup(machine.uuid, machine.request("two", "sf-one", full=("vda",)))
        assert [bool(each.bitmap) for each in begun.exports] == [False, True, True]

    def test_a_disk_that_the_checkpoint_does_not_know(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2", "vdb": "qcow2"})
        request = machine.request("one")
        begun = hypervisor.begin_backup(machine.uuid, type(request)(request.name, request.disks[:1], ["vdb", "hda"]))
        hypervisor.end_backup(machine.uuid, "sf-one")
        assert judged(hypervisor, machine, "sf-one", begun.checkpoint_xml) == {"vda": VALID, "vdb": MISSING}

    def test_a_checkpoint_of_another_machine_serves_nothing(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        first, second = blank({"vda": "qcow2"}), blank({"vda": "qcow2"})
        xml = backed_up(hypervisor, first, "one")
        assert judged(hypervisor, second, "sf-one", xml) == {"vda": MISSING}

    @only_libvirt
    def test_an_image_that_is_being_written_is_busy(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2"})
        xml = backed_up(hypervisor, machine, "one")
        machine.stop()
        socket = machine.folder / "writer.sock"
        writer = subprocess.Popen(["qemu-nbd", "-t", "-f", "qcow2", "-k", str(socket), str(machine.disks["vda"])])
        try:
            deadline = time.monotonic() + 20
            while not socket.exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            with pytest.raises(Busy, match="another process"):
                hypervisor.inventory(machine.uuid, base="sf-one", base_xml=xml)
            with pytest.raises(Busy, match="another process"):
                hypervisor.delete_checkpoint(machine.uuid, "sf-one")
        finally:
            writer.terminate()
            writer.wait(20)


class TestDeleting:
    def test_bitmaps_and_entry(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2"})
        for job in ("one", "two"):
            backed_up(hypervisor, machine, job)
        assert hypervisor.leftovers(machine.uuid).checkpoints == ["sf-one", "sf-two"]
        hypervisor.delete_checkpoint(machine.uuid, "sf-one")
        hypervisor.delete_checkpoint(machine.uuid, "sf-one")
        assert machine.checkpoints() == ["sf-two"]
        machine.stop()
        assert machine.bitmaps("vda") == ["sf-two"]

    @only_libvirt
    def test_off(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2", "vdb": "raw"})
        for job in ("one", "two"):
            backed_up(hypervisor, machine, job)
        machine.stop()
        hypervisor.delete_checkpoint(machine.uuid, "sf-one")
        assert machine.checkpoints() == ["sf-two"]
        assert machine.bitmaps("vda") == ["sf-two"]

    @only_libvirt
    @pytest.mark.parametrize("on", [True, False])
    def test_what_libvirt_forgot(self, hypervisor: Hypervisor, blank: BlankFactory, on: bool) -> None:
        machine = blank({"vda": "qcow2", "vdb": "qcow2"})
        backed_up(hypervisor, machine, "one")
        machine.stop()
        machine.domain.checkpointLookupByName("sf-one").delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
        if on:
            machine.start()
        assert hypervisor.leftovers(machine.uuid).checkpoints == ["sf-one"]
        hypervisor.delete_checkpoint(machine.uuid, "sf-one")
        assert hypervisor.leftovers(machine.uuid).checkpoints == []
        assert machine.checkpoints() == []
        assert machine.bitmaps("vda") == machine.bitmaps("vdb") == []

    @pytest.mark.parametrize("on", [True, False])
    def test_broken_by_a_crash(self, hypervisor: Hypervisor, blank: BlankFactory, on: bool) -> None:
        machine = blank({"vda": "qcow2", "vdb": "qcow2"})
        backed_up(hypervisor, machine, "one")
        machine.stop()
        machine.start()
        machine.kill()
        if on:
            machine.start()
        hypervisor.delete_checkpoint(machine.uuid, "sf-one")
        assert machine.checkpoints() == []
        assert machine.bitmaps("vda") == machine.bitmaps("vdb") == []

    def test_gone_on_one_disk_it_goes_on_the_others(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2", "vdb": "qcow2"})
        backed_up(hypervisor, machine, "one")
        machine.stop()
        make_image(machine.disks["vda"])
        machine.start()
        assert machine.bitmaps("vdb") == ["sf-one"]
        hypervisor.delete_checkpoint(machine.uuid, "sf-one")
        assert machine.checkpoints() == []
        assert machine.bitmaps("vdb") == []

    def test_what_others_made_stays(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2"})
        machine.foreign_checkpoint("theirs")
        backed_up(hypervisor, machine, "one")
        assert hypervisor.leftovers(machine.uuid).checkpoints == ["sf-one"]
        hypervisor.delete_checkpoint(machine.uuid, "sf-one")
        with pytest.raises(UsageError):
            hypervisor.delete_checkpoint(machine.uuid, "theirs")
        assert machine.checkpoints() == ["theirs"]

    def test_the_other_checkpoint_is_not_harmed(self, hypervisor: Hypervisor, blank: BlankFactory) -> None:
        machine = blank({"vda": "qcow2", "vdb": "qcow2"})
        backed_up(hypervisor, machine, "one")
        xml = backed_up(hypervisor, machine, "two", "sf-one")
        machine.write("vdb", 0, 65536)
        assert judged(hypervisor, machine, "sf-two", xml) == {"vda": VALID, "vdb": VALID}
        hypervisor.delete_checkpoint(machine.uuid, "sf-one")  # the parent of sf-two, for libvirt
        assert judged(hypervisor, machine, "sf-two", xml) == {"vda": VALID, "vdb": VALID}
        begun = hypervisor.begin_backup(machine.uuid, machine.request("three", "sf-two"))
        assert [dirty_ranges(hypervisor.host, each) for each in begun.exports] == [[], [(0, 65536)]]
