"""Two pieces at work in one vault, neither of which knows the other: repair and sweep, locks and repair, mirrors that
were cut off and writers. No committed point loses a byte, and nothing that was deleted comes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from celery import Celery

from tests.model.test_mistrust import flip
from tests.vault.faulty import Died, FaultyStore, Plan
from tests.vault.pictures import KEY, backup, image, new_vault, read_disk, reopened
from tests.vault.stepped import Actor, MemoryStore
from tests.vault.test_repair import folder, replica, require_whole
from tests.vault.test_sweep_races import Hosts, before
from workers.config import VaultConfig, WorkerConfig
from workers.context import Context
from workers.contract.errors import Locked, StillframeError, StoreUnreachable, VaultError
from workers.contract.messages import CommitPoint
from workers.contract.seams import ObjectInfo, Store
from workers.tasks import Tasks
from workers.vault import DirectoryStore, Vault
from workers.vault.condemned import condemn
from workers.vault.mirror import MirrorStore
from workers.vault.mirror_sync import outdated, sync_store
from workers.vault.repair import repair
from workers.vault.sealing import encode_plain
from workers.vault.sweep import Settings, sweep
from workers.vault.trash import delete, finalise, remove_finals
from workers.vault.verify import Level, verify

__all__ = ["folder"]
NOW = datetime.now(UTC)


@pytest.mark.parametrize("step", range(48))
def test_a_repair_of_manifests_that_is_killed_loses_no_point(folder: Path, step: int) -> None:
    """Nothing but the manifest itself says that there is a point: were it away for a moment, and its repair killed in
    this moment, the point would be gone, and the next sweep would take its blocks."""
    paths = sorted((folder / "vault/points").iterdir())
    for path in paths:
        flip(path, 90)
    plan = Plan()
    dying = Vault.open(FaultyStore(DirectoryStore(folder / "vault"), plan), key=KEY, cache_dir=folder / "cache")
    plan.die_after = len(plan.calls) + step
    with suppress(Died):
        repair(dying, [replica(folder)])
    assert all(path.exists() for path in paths)
    assert not repair(reopened(folder, cache="next"), [replica(folder)]).findings
    require_whole(folder)


def damaged(hosts: Hosts, point: str) -> MemoryStore:
    """Damage a manifest; a copy of the vault as it was before."""
    copy = MemoryStore(hosts.folder)
    copy.objects = dict(hosts.store.objects)
    data = bytearray(hosts.store.objects[f"points/{point}"])
    data[90] ^= 1
    hosts.store.objects[f"points/{point}"] = bytes(data)
    return copy


def test_a_sweep_at_any_moment_of_a_repair(tmp_path: Path) -> None:
    """It stops at a manifest that it cannot read, and must not take one that is being repaired for one that is gone."""
    ended = False
    steps = 0
    while not ended:
        steps += 1
        hosts = Hosts(tmp_path / str(steps))
        backup(hosts.vault("one"), "p1", {"vda": "AB"})
        copy = damaged(hosts, "p1")
        mending = hosts.actor("h1", lambda vault, copy=copy: repair(vault, [copy]))  # type: ignore[misc]
        for _ in range(steps):
            mending.step()
        ended = mending.ended
        with suppress(StillframeError):
            sweep(hosts.vault("two"), now=NOW, settings=Settings(empty=True, compact=False))
        mending.run()
        assert hosts.content() == {"p1": image("AB")}


def test_a_repair_brings_no_deleted_point_back(tmp_path: Path) -> None:
    """It takes the manifest from a replica, where the point still is."""
    ended = False
    steps = 0
    while not ended:
        steps += 1
        hosts = Hosts(tmp_path / str(steps))
        vault = hosts.vault("one")
        backup(vault, "p1", {"vda": "AB"})
        backup(vault, "p2", {"vda": "C"})
        copy = damaged(hosts, "p1")
        mending = hosts.actor("h1", lambda vault, copy=copy: repair(vault, [copy]))  # type: ignore[misc]
        for _ in range(steps):
            mending.step()
        ended = mending.ended
        delete(vault, "p1", now=NOW, until=NOW, by="anna", reason="it is damaged")
        finalise(vault, NOW)
        remove_finals(vault)
        mending.run()
        remove_finals(vault)
        assert hosts.names("points/") == ["points/p2"], mending.calls
        assert hosts.names("trash/") == hosts.names("sessions/") == []


@pytest.mark.parametrize("kind", ["packs", "points"])
def test_what_a_lock_retains_is_repaired(folder: Path, kind: str) -> None:
    """Nobody may delete it, but right bytes take the place of wrong ones, and are retained as those were."""
    for path in sorted((folder / "vault" / kind).iterdir()):
        flip(path, 90)
    vault = reopened(folder)
    until = NOW.replace(microsecond=0) + timedelta(days=30)
    names = [info.name for info in vault.store.list(f"{kind}/")]
    for name in names:
        vault.store.retain(name, until)
    verify(vault, Level.FULL)
    report = repair(vault, [replica(folder)])
    assert not report.failed
    assert not report.findings
    require_whole(folder)
    for name in names:
        assert (folder / "vault" / name).stat().st_mtime == until.timestamp()
        with pytest.raises(Locked):
            vault.store.delete(name)


# --- keys, and processes that run for months -----------------------------------------------------------------------


def test_a_process_that_was_there_before_a_new_data_key(tmp_path: Path) -> None:
    """What is sealed under a key that it does not know yet is not damaged: it must not tell every host so."""
    early = new_vault(tmp_path)
    first = backup(early, "p1", {"vda": "AB"})
    late = reopened(tmp_path, cache="late")
    late.rotate_data_key()
    backup(late, "p2", {"vda": "-C"}, first)
    assert read_disk(early, early.point("p2").disks[0]) == image("AC")
    assert verify(early, Level.FULL).ok
    backup(early, "p3", {"vda": "-D"}, early.point("p2"))
    assert read_disk(late, late.point("p3").disks[0]) == image("AD")
    assert early.index.damage() == set()


# --- mirrors -------------------------------------------------------------------------------------------------------


class Flaky(MemoryStore):
    """One that cannot be listed while `ill`."""

    ill = False

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        if self.ill:
            raise StoreUnreachable("injected")
        return super().list(prefix)


def mirrored(folder: Path, first: MemoryStore, other: MemoryStore, host: str) -> Vault:
    """A vault in both, as one host sees it."""
    store = MirrorStore({"first": lambda: first, "other": lambda: other}, create=True)
    if not first.objects:
        Vault.create(store, key=KEY, cache_dir=folder / host)
    return Vault.open(store, key=KEY, cache_dir=folder / host)


def test_a_condemnation_that_one_store_alone_has(tmp_path: Path) -> None:
    """Who condemned was killed between the stores. A session that saw it there must not miss it later, when that store
    does not answer for a moment: the sweep would not wait for it, and take a pack that it relies on."""
    first, other = Flaky(tmp_path), MemoryStore(tmp_path)

    vault = mirrored(tmp_path, first, other, "one")
    with vault.writer() as writer:
        writer.put(image("A"))
        writer.finish()
    condemn(first, vault.keys, [bytes.fromhex(name.removeprefix("packs/")) for name in vault.packs()[0]])
    writer_host = mirrored(tmp_path, first, other, "two")
    writer_host.announce("job", "p1")
    first.ill = True
    with writer_host.writer() as relying:
        first.ill = False
        id = relying.put(image("A"))
        relying.finish()
    sweep(mirrored(tmp_path, first, other, "three"), now=NOW, settings=Settings(empty=True, compact=False))
    assert writer_host.reader().get(id) == image("A")


def test_a_final_deletion_that_one_store_alone_has(tmp_path: Path) -> None:
    """Who made it final was killed between the stores. Before the manifest goes all have it, so that a reader who comes
    after the sessions were listed sees it, whichever store answers."""
    first, other = Flaky(tmp_path), MemoryStore(tmp_path)
    vault, later = mirrored(tmp_path, first, other, "one"), mirrored(tmp_path, first, other, "two")
    backup(vault, "p1", {"vda": "A"})
    delete(vault, "p1", now=NOW, until=NOW, by="anna", reason="a test")
    first.put("trash/p1.1.end", encode_plain({"by": "anna", "outcome": "final", "time": NOW.isoformat()}))
    remover = Actor("remover", vault.store, lambda store: remove_finals(_over(store, vault)))
    before(remover, "delete points/p1")
    later.announce("job", "p2", reads=["p1"])
    first.ill = True
    assert not later.readable("p1")
    first.ill = False
    remover.run()
    assert vault.point_ids() == []


def _over(store: Store, vault: Vault) -> Vault:
    return Vault.open(store, key=KEY, cache_dir=vault.cache_dir)


def test_an_outdated_store_has_a_pack_that_is_locked(tmp_path: Path) -> None:
    """The others have swept it. It cannot be removed yet, and is in nobody's way."""
    one, two = (DirectoryStore(tmp_path / name, create=True) for name in ("one", "two"))
    backup(Vault.create(one, key=KEY, cache_dir=tmp_path / "cache")[0], "p1", {"vda": "A"})
    old = "packs/" + 64 * "0"
    for info in list(one.list("keyring/")):
        two.put(info.name, one.get(info.name))
    two.put(old, b"old")
    two.retain(old, NOW + timedelta(days=9))
    report = sync_store(one, two, outdated(one, two))
    assert report.removed == 0
    assert {info.name for info in two.list("")} - {info.name for info in one.list("")} == {old}


# --- who is late ---------------------------------------------------------------------------------------------------


def test_a_commit_that_comes_again_when_its_point_was_deleted(tmp_path: Path) -> None:
    """A command that a broker delivers twice: the point must not come back without its blocks."""
    vault = new_vault(tmp_path)
    (tmp_path / "key").write_text(KEY.hex() + "\n")
    (tmp_path / "key").chmod(0o600)
    config = WorkerConfig(
        vaults={"main": VaultConfig(url=f"file://{tmp_path}/vault", key_file=tmp_path / "key")},
        hypervisors={},
        cache_dir=tmp_path / "late",
    )
    tasks = Tasks(Celery(), Context(config))
    vault.announce("j1", "p1")
    point = backup(vault, "p1", {"vda": "A"})
    command = CommitPoint(job="j1", vault="main", point=point)
    assert tasks.commit_point(command)
    vault.withdraw("j1")
    delete(vault, "p1", now=NOW, until=NOW, by="anna", reason="a test")
    sweep(vault, now=NOW)
    with pytest.raises(VaultError):
        tasks.commit_point(command)
    assert vault.point_ids() == []
