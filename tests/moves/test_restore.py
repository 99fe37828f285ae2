"""Disks out of a real vault, into real images, by QEMU's own tools."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from workers import restore
from workers.contract.errors import Cancelled, Corrupt, NotFound, TargetExists, UsageError
from workers.contract.machines import MachineRef
from workers.contract.messages import IMAGE_FORMATS, Discard, ImageFormat, PrepareRestore, RestoreDisk
from workers.contract.points import Consistency, DiskPoint, Mode, Point
from workers.disks.images import driver
from workers.disks.memory import drawn
from workers.hosts.local import LOCAL
from workers.transfer import Settings, transfer_disk
from workers.vault import Vault
from workers.vault.stores import DirectoryStore

BLOCK = 64 << 10
JOB = "0123456789ab"
MACHINE = MachineRef(hypervisor="here", uuid="1b0e6a2e-0000-4000-8000-000000000001", name="web")


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    store = DirectoryStore(tmp_path / "vault", create=True)
    return Vault.create(store, key=bytes(32), cache_dir=tmp_path / "cache")[0]


def point_of(vault: Vault, picture: str) -> tuple[Point, bytes]:
    """A committed point of one disk, and the disk's content."""
    disk = drawn(picture, BLOCK)
    done = transfer_disk(disk, vault, Settings(BLOCK), base=None, watch=lambda _tally: None)
    point = Point(
        id="a" * 32,
        job=JOB,
        machine=MACHINE,
        time=datetime(2026, 11, 22, 2, 0, tzinfo=UTC),
        definition="<domain/>",
        disks=[
            DiskPoint(
                target="vda",
                source="/gone/vda.qcow2",
                format="qcow2",
                identity="/gone/vda.qcow2:1",
                capacity=disk.size,
                block_size=BLOCK,
                root=done.root.hex(),
                mode=Mode.FULL,
                reason="it is the first backup",
                checkpoint=None,
                options={"cluster_size": "131072", "compat": "1.1", "unknown": "x"},
            )
        ],
        consistency=Consistency.CRASH,
        consistency_goal=Consistency.CRASH,
        consistency_reason="crash consistency was asked for",
    )
    vault.commit(point)
    return point, bytes(disk.content)


def ask(point: Point, path: Path, format: ImageFormat = "raw", *, standalone: bool = True) -> RestoreDisk:
    return RestoreDisk(
        job=JOB, vault="main", point=point.id, target="vda", path=str(path), format=format, standalone=standalone
    )


def quiet(_written: restore.Written) -> None:
    """A watch that lets everything pass."""


@pytest.mark.parametrize("format", IMAGE_FORMATS)
def test_a_disk_comes_back_byte_for_byte(vault: Vault, tmp_path: Path, format: ImageFormat) -> None:
    point, content = point_of(vault, "AB--CC-D")
    path = tmp_path / "new" / "disk"
    done = restore.restore_disk(vault, ask(point, path, format), 2, quiet)
    assert done.written_bytes == 5 * BLOCK, "zeroes are not written"
    raw = tmp_path / "as.raw"
    subprocess.run(["qemu-img", "convert", "-f", driver(format), "-O", "raw", str(path), str(raw)], check=True)
    assert raw.read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == ["disk"]


def test_options_of_the_format_are_kept(vault: Vault, tmp_path: Path) -> None:
    point, _ = point_of(vault, "AB")
    restore.restore_disk(vault, ask(point, tmp_path / "d", "qcow2"), 1, quiet)
    shown = subprocess.run(["qemu-img", "info", "--output=json", str(tmp_path / "d")], capture_output=True, check=True)
    assert json.loads(shown.stdout)["cluster-size"] == 131072


def test_an_existing_file_is_never_overwritten(vault: Vault, tmp_path: Path) -> None:
    point, _ = point_of(vault, "AB")
    (tmp_path / "disk").write_text("mine")
    with pytest.raises(TargetExists, match="exists already"):
        restore.restore_disk(vault, ask(point, tmp_path / "disk"), 1, quiet)
    assert (tmp_path / "disk").read_text() == "mine"


def test_a_file_that_appears_meanwhile_is_not_overwritten_either(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    ours = restore.temporary(path, JOB)
    ours.write_text("whole")
    path.write_text("mine")
    with pytest.raises(TargetExists, match="meanwhile"):
        restore._publish(LOCAL, ours, path, keep=False)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("format", IMAGE_FORMATS)
def test_a_stopped_restore_leaves_nothing_under_the_name(vault: Vault, tmp_path: Path, format: ImageFormat) -> None:
    point, _ = point_of(vault, "ABCDEFGH")
    path = tmp_path / "disk"

    def stop(_written: restore.Written) -> None:
        raise Cancelled("cancelled")

    with pytest.raises(Cancelled):
        restore.restore_disk(vault, ask(point, path, format), 2, stop)
    assert not path.exists()
    restore.discard(None, Discard(job=JOB, vault="main", paths=[str(path)], hypervisor=None, uuid=None))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "vault"]


def test_discard_removes_only_what_is_provably_the_jobs(vault: Vault, tmp_path: Path) -> None:
    point, _ = point_of(vault, "AB")
    ours, others = tmp_path / "ours", tmp_path / "others"
    restore.restore_disk(vault, ask(point, ours, standalone=False), 1, quiet)
    others.write_text("somebody else's, of a name that the job had wanted")
    restore.discard(None, Discard(job=JOB, vault="main", paths=[str(ours), str(others)], hypervisor=None, uuid=None))
    assert not ours.exists()
    assert others.exists()


def test_a_flipped_bit_in_the_vault_is_never_restored(vault: Vault, tmp_path: Path) -> None:
    point, _ = point_of(vault, "ABCD")
    pack = max((tmp_path / "vault" / "packs").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    pack.chmod(0o600)
    content = bytearray(pack.read_bytes())
    content[200] ^= 1
    pack.write_bytes(content)
    with pytest.raises(Corrupt):
        restore.restore_disk(vault, ask(point, tmp_path / "disk"), 2, quiet)
    assert not (tmp_path / "disk").exists()


def test_wrong_names_are_told_before_anything_is_written(vault: Vault, tmp_path: Path) -> None:
    point, _ = point_of(vault, "AB")
    wanted = PrepareRestore(
        job=JOB,
        vault="main",
        point=point.id,
        targets=["vdz"],
        hypervisor=None,
        name=None,
        uuid=None,
        directory=None,
        pool=None,
        to=str(tmp_path / "out"),
        format=None,
        replace=False,
    )
    with pytest.raises(NotFound, match="no disk vdz") as caught:
        restore.prepare(vault, None, wanted, None)
    assert "vda" in caught.value.hint
    far = {"targets": ["vda"], "to": str(tmp_path / "mispelt" / "mount" / "out")}
    with pytest.raises(UsageError, match="there is no folder"):
        restore.prepare(vault, None, wanted.model_copy(update=far), None)
    prepared = restore.prepare(vault, None, wanted.model_copy(update={"targets": ["vda"]}), None)
    assert prepared.formats == {"vda": "qcow2"}
    assert not (tmp_path / "out").exists()
