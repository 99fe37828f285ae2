"""Where a backup could believe what is not so: each test was a point that differed from its disk, a point that could
never be restored, or a job that never ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from orchestrator.config import load_config
from orchestrator.service import JobView, Service
from tests.model.machine import CHUNK, ModelMachine
from tests.model.test_generations_memory import memory_folder
from tests.model.test_generations_qemu import CONFIG
from tests.model.world import World
from tests.vault.pictures import BLOCK, backup, content, map_of, new_vault, read_disk, reopened, store_disk
from workers.contract.errors import Corrupt, ObjectMissing, VaultMissing
from workers.contract.extents import Extent, Kind
from workers.disks.memory import MemoryDisk
from workers.transfer import Settings, transfer_disk
from workers.vault import BlockMap, Vault
from workers.vault.verify import Level, verify

MIB = 1 << 20


# --- a vault that is damaged ---------------------------------------------------------------------------------------


def packs(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "vault" / "packs").rglob("*") if path.is_file())


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_base_whose_map_is_damaged_is_not_inherited_from(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    (disk,) = backup(vault, "p1", {"vda": "ABCD"}).disks
    ((pack, entry),) = vault.index.find(bytes.fromhex(disk.root))
    flip(tmp_path / "vault" / pack, entry.offset)
    vault = reopened(tmp_path)
    done = _incremental(vault, "ABCD", map_of(vault, disk))
    assert "base cannot be read" in done[1]
    assert _stored(reopened(tmp_path, cache="another"), done[0], 4) == b"".join(map(content, "ABCD"))


def test_a_base_that_the_vault_does_not_have_is_not_inherited_from(tmp_path: Path) -> None:
    """The vault was rolled back, the catalog was not."""
    vault = new_vault(tmp_path)
    done = _incremental(vault, "ABCD", BlockMap(vault.reader(), b"\7" * 32, 4 * BLOCK, BLOCK))
    assert "base cannot be read" in done[1]
    assert _stored(vault, done[0], 4) == b"".join(map(content, "ABCD"))


def _incremental(vault: Vault, picture: str, base: BlockMap) -> tuple[bytes, str]:
    """A transfer of a disk of which nothing is said to have changed."""
    data = b"".join(map(content, picture))
    source = MemoryDisk(data, [Extent(0, len(data), Kind.UNCHANGED)])
    done = transfer_disk(source, vault, Settings(BLOCK), base=base, watch=lambda _tally: None)
    return done.root, done.alert


def _stored(vault: Vault, root: bytes, count: int) -> bytes:
    reader = vault.reader()
    blocks = BlockMap(reader, root, count * BLOCK, BLOCK)
    return b"".join(reader.get(blocks.id_at(index)) for index in range(count))


@pytest.mark.parametrize("level", [Level.FULL, Level.IDS])
def test_what_a_verify_finds_damaged_is_stored_again_and_heals_older_points(tmp_path: Path, level: Level) -> None:
    vault = new_vault(tmp_path)
    old = backup(vault, "p1", {"vda": "ABCD"})
    pack = packs(tmp_path)[0]
    if level is Level.FULL:
        flip(pack, vault.index.entries(f"packs/{pack.name}")[1].offset)
    else:
        pack.unlink()
    vault = reopened(tmp_path)
    assert verify(vault, level).findings
    vault.close()
    vault = reopened(tmp_path)  # another process: what is damaged is remembered
    disk = store_disk(vault, "vda", "ABCD", None)
    vault = reopened(tmp_path, cache="another")
    expected = b"".join(map(content, "ABCD"))
    assert read_disk(vault, disk) == expected
    assert read_disk(vault, old.disks[0]) == expected


def test_blocks_of_packs_that_are_gone_are_stored_again(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    (disk,) = backup(vault, "p1", {"vda": "AB"}).disks
    for path in packs(tmp_path):
        path.unlink()
    with pytest.raises((ObjectMissing, Corrupt)):
        read_disk(vault, disk)
    with pytest.raises((ObjectMissing, Corrupt)):
        vault.reader().get(vault.reader().block_id(content("A")))
    store_disk(vault, "vda", "AB", None)
    assert read_disk(vault, disk) == content("A") + content("B")


def test_a_vault_that_was_unmounted_does_not_look_empty(tmp_path: Path) -> None:
    """To a process that has it open: it would forget every point that the catalog knows."""
    vault = new_vault(tmp_path)
    backup(vault, "p1", {"vda": "AB"})
    (tmp_path / "vault").rename(tmp_path / "elsewhere")
    (tmp_path / "vault").mkdir()
    with pytest.raises(VaultMissing):
        list(vault.points())


def test_a_disk_that_shrank_and_grew_has_lost_its_tail(tmp_path: Path) -> None:
    """One block of many differs, and nobody was told: chance would hardly ever find it."""
    world = World(tmp_path, {"vda": 4096})
    disk = world.add("vda", 400 * 4096)
    disk.put(0, bytes([7]) * disk.size)
    world.backup()
    disk.resize(399 * 4096)
    disk.resize(400 * 4096)
    assert world.backup().committed
    world.check()
    assert world.alerts
    disk.put(4096, bytes(4096))
    assert world.backup().committed
    world.check()
    assert len(world.alerts) == 1, "the next one is incremental again"


# --- a machine that is not as one thinks -----------------------------------------------------------------------------


@pytest.fixture
def stage(libvirt_host: libvirt.virConnect) -> Iterator[tuple[Service, ModelMachine]]:
    """A service with a vault, and a machine that is off and has a first disk."""
    with memory_folder() as folder:
        folder.chmod(0o755)
        path = folder / "stillframe.toml"
        path.write_text(CONFIG.format(folder=folder, floor="1MiB"))
        machine = ModelMachine.define(libvirt_host, folder)
        try:
            with Service.open(load_config(path)) as service:
                service.init_vault("main")
                machine.add("vda", 8 * MIB)
                machine.fill("vda", 0, 8 * MIB, 7)
                yield service, machine
        finally:
            machine.remove()


def run(service: Service, machine: ModelMachine) -> JobView:
    view = service.wait(service.start_backup(machine.name))
    assert view.state == "succeeded", view
    return view


def require_same(service: Service, machine: ModelMachine) -> None:
    for target, picture in machine.pictures.items():
        to = machine.folder / f"restored-{target}.raw"
        view = service.wait(service.start_restore_disk(f"{machine.name}@latest", target, to=to, format="raw"))
        assert view.state == "succeeded", view
        assert not picture.difference(to)
        to.unlink()


@pytest.mark.guest
@pytest.mark.parametrize("on", [True, False])
def test_a_real_disk_that_shrank_and_grew_is_read_in_full(stage: tuple[Service, ModelMachine], on: bool) -> None:
    service, machine = stage
    machine.start()
    run(service, machine)
    if not on:
        machine.stop()
    machine.resize("vda", 8 * MIB - CHUNK)
    machine.resize("vda", 8 * MIB)
    view = run(service, machine)
    require_same(service, machine)
    assert view.point is not None
    assert "they differ" in service.point(view.point).alerts[0]
    run(service, machine)
    require_same(service, machine)


@pytest.mark.guest
@pytest.mark.parametrize("on", [True, False])
def test_a_raw_disk_that_is_no_multiple_of_a_sector(stage: tuple[Service, ModelMachine], on: bool) -> None:
    service, machine = stage
    machine.add("vdb", MIB, "raw")
    with machine.disks["vdb"].open("r+b") as file:
        file.truncate(MIB + 100)
    machine.pictures["vdb"].resize(MIB + 512)  # as a guest sees it
    machine.fill("vdb", MIB - 512, 512, 9)
    if on:
        machine.start()
    run(service, machine)
    require_same(service, machine)


@pytest.mark.guest
def test_a_machine_that_vanishes_during_its_backup_leaves_nothing_to_release(
    stage: tuple[Service, ModelMachine],
) -> None:
    service, machine = stage
    machine.start()

    def vanish(view: JobView) -> None:
        if view.state == "transferring" and machine.defined:
            machine.remove()

    job = service.start_backup(machine.name)
    view = service.wait(job, on_progress=vanish)
    assert not machine.defined
    assert not [text for text in view.warnings if "release failed" in text], view
    assert service.reconcile() == []
