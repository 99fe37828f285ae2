"""The contract of `Store`, held by the directory store, by the faults wrapper without faults, and by buckets of two
real S3 servers, with Object Lock, and through a proxy that spoils every other request; and what is the directory
store's own: marker, staging, names. What is S3's own is in `test_s3.py`."""

from __future__ import annotations

import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from threading import Barrier

import pytest

from tests.vault.buckets import QUICK, Server
from tests.vault.faulty import FaultyStore
from tests.vault.s3_proxy import Fault, Proxy, every_other
from workers.contract.errors import ConfigError, Corrupt, Locked, ObjectMissing, VaultError, VaultMissing
from workers.contract.seams import ObjectInfo, Store
from workers.vault.mirror import MirrorStore
from workers.vault.stores import DirectoryStore, open_store

Maker = Callable[[pytest.FixtureRequest], Store]


def directory(request: pytest.FixtureRequest) -> Store:
    folder: Path = request.getfixturevalue("tmp_path")
    return DirectoryStore(folder / "s", create=True)


def faulty(request: pytest.FixtureRequest) -> Store:
    return FaultyStore(directory(request))


def bucket(server: str, name: str = "plain") -> Maker:
    def make(request: pytest.FixtureRequest) -> Store:
        found: Server = request.getfixturevalue(server)
        return found.store(found.url(name), create=True)

    return make


def mirror(*makers: Maker) -> Maker:
    def make(request: pytest.FixtureRequest) -> Store:
        return MirrorStore({str(at): partial(one, request) for at, one in enumerate(makers)}, create=True)

    return make


def second(request: pytest.FixtureRequest) -> Store:
    folder: Path = request.getfixturevalue("tmp_path")
    return FaultyStore(DirectoryStore(folder / "two", create=True))


def spoilt(fault: Fault) -> Maker:
    def make(request: pytest.FixtureRequest) -> Store:
        proxy: Proxy = request.getfixturevalue("proxy")
        server: Server = request.getfixturevalue("proxied")
        proxy.plan = every_other(fault)
        patience = replace(QUICK, read_timeout=0.4) if fault is Fault.SILENT else QUICK
        return server.store(server.url(), create=True, patience=patience)

    return make


STORES: dict[str, Maker] = {
    "directory": directory,
    "faulty": faulty,
    "moto": bucket("moto"),
    "moto with lock": bucket("moto", "locked"),
    "localbucket": bucket("localbucket"),
    "mirror": mirror(directory, second),
    "mirror of a folder and a bucket": mirror(directory, bucket("moto")),
    **{fault.name: spoilt(fault) for fault in Fault if fault is not Fault.LESS},
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> Store:
    made = STORES[request.param](request)
    assert made.put("vault.json", b"marker")
    return made


def names(store: Store, prefix: str) -> list[str]:
    return [info.name for info in store.list(prefix)]


def test_what_was_put_is_got(store: Store) -> None:
    assert store.put("packs/a1", b"hello")
    assert store.get("packs/a1") == b"hello"
    assert store.get("packs/a1", 1, 3) == b"ell"
    assert store.get("packs/a1", 5, 0) == b""


def test_put_is_exclusive(store: Store) -> None:
    assert store.put("points/p", b"first")
    assert not store.put("points/p", b"second")
    assert store.get("points/p") == b"first"


def test_put_file_consumes_the_file(store: Store) -> None:
    for content, created in ((b"one", True), (b"two", False)):
        path = store.staging() / "x"
        path.write_bytes(content)
        assert store.put_file("packs/f", path) is created
        assert not path.exists()
    assert store.get("packs/f") == b"one"


def test_absent_object(store: Store) -> None:
    with pytest.raises(ObjectMissing):
        store.get("packs/none")
    store.delete("packs/none")
    assert names(store, "packs/") == []


def test_a_short_object_is_corrupt(store: Store) -> None:
    store.put("packs/a", b"hello")
    for offset, length in ((0, 6), (4, 2), (6, 1), (99, 1)):
        with pytest.raises(Corrupt):
            store.get("packs/a", offset, length)


def test_list_and_delete(store: Store) -> None:
    for name in ("packs/b2", "packs/a1", "packs/a0", "points/a1"):
        store.put(name, b"xyz")
    assert list(store.list("packs/a")) == [ObjectInfo("packs/a0", 3), ObjectInfo("packs/a1", 3)]
    store.delete("packs/a1")
    assert names(store, "packs/") == ["packs/a0", "packs/b2"]
    assert names(store, "") == ["packs/a0", "packs/b2", "points/a1", "vault.json"]
    assert names(store, "nothing/") == []


def test_deleted_name_can_be_put_again(store: Store) -> None:
    store.put("sessions/j", b"1")
    store.delete("sessions/j")
    assert store.put("sessions/j", b"2")
    assert store.get("sessions/j") == b"2"


def test_retained_object_is_not_deleted(store: Store) -> None:
    now = datetime.now(UTC)
    store.put("packs/kept", b"1")
    store.retain("packs/kept", now + timedelta(days=2))
    store.retain("packs/kept", now + timedelta(days=1))
    with pytest.raises(Locked) as caught:
        store.delete("packs/kept")
    assert f"{now + timedelta(days=2):%Y-%m-%d}" in str(caught.value)
    assert store.get("packs/kept") == b"1"
    assert names(store, "") == ["packs/kept", "vault.json"]


def test_object_whose_retention_is_over_is_deleted(store: Store) -> None:
    store.put("packs/kept", b"1")
    store.retain("packs/kept", datetime.now(UTC) + timedelta(seconds=1))
    deadline = time.monotonic() + 30
    while names(store, "packs/"):
        assert time.monotonic() < deadline
        with suppress(Locked):
            store.delete("packs/kept")
    assert store.put("packs/kept", b"2")


def test_right_bytes_take_the_place_of_wrong_ones(store: Store) -> None:
    """Of what nobody may delete, too; and where there is nothing."""
    store.put("packs/bad", b"wrong")
    store.put("packs/kept", b"wrong")
    store.retain("packs/kept", datetime.now(UTC) + timedelta(days=2))
    for name in ("packs/bad", "packs/kept", "packs/none"):
        path = store.staging() / "x"
        path.write_bytes(b"right one")
        store.replace(name, path)
        assert not path.exists()
        assert store.get(name) == b"right one"
    with pytest.raises(Locked):
        store.delete("packs/kept")
    store.delete("packs/bad")
    assert [(info.name, info.size) for info in store.list("packs/")] == [("packs/kept", 9), ("packs/none", 9)]


def test_absent_object_is_not_retained(store: Store) -> None:
    with pytest.raises(ObjectMissing):
        store.retain("packs/none", datetime.now(UTC))


def test_it_says_where_it_is_and_how_often(store: Store) -> None:
    assert len(store.copies()) == (2 if isinstance(store, MirrorStore) else 1)
    assert store.features.place


def test_free_bytes(store: Store) -> None:
    free = store.free_bytes()
    assert free is None or free > 0


def test_bad_names(store: Store) -> None:
    for name in ("../up", "packs/../../up", "/etc/x", "packs//x", ".hidden", "Packs/x", "", "a/", "a\n"):
        with pytest.raises(VaultError):
            store.put(name, b"x")
        with pytest.raises(VaultError):
            store.get(name)


# --- the directory store's own -----------------------------------------------------------------------------------


def test_urls(tmp_path: Path) -> None:
    for url in ("s3://bucket/x", "file://host/x", "file:relative", "/plain/path"):
        with pytest.raises(ConfigError):
            open_store(url, create=True)
    spaced = tmp_path / "with space"
    open_store(f"file://{tmp_path}/with%20space", create=True).put("vault.json", b"m")
    assert (spaced / "vault.json").exists()


def test_no_vault_there(tmp_path: Path) -> None:
    with pytest.raises(VaultMissing) as caught:
        open_store(f"file://{tmp_path}/none")
    assert caught.value.exit_code == 10
    assert "mounted" in caught.value.hint


@pytest.mark.parametrize("now", [None, b"another vault"])
def test_refuses_to_write_when_the_marker_is_not_the_same(tmp_path: Path, now: bytes | None) -> None:
    store = DirectoryStore(tmp_path, create=True)
    store.put("vault.json", b"marker")
    (tmp_path / "vault.json").unlink()
    if now is not None:
        (tmp_path / "vault.json").write_bytes(now)
    with pytest.raises(VaultMissing):
        store.put("packs/a", b"x")
    loose = tmp_path / "loose"
    loose.write_bytes(b"x")
    with pytest.raises(VaultMissing):
        store.put_file("packs/a", loose)
    with pytest.raises(VaultMissing):
        store.delete("packs/a")
    assert not (tmp_path / "packs").exists()


def test_files_are_private_and_nothing_is_left_in_staging(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "s", create=True)
    store.put("packs/a", b"x")
    store.put("packs/a", b"x")
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "s/packs/a").stat().st_mode) & 0o077 == 0
    assert list(store.staging().iterdir()) == []
    store.close()
    assert list((tmp_path / "s/.staging").iterdir()) == []


def test_staging_of_a_killed_process_is_removed_and_that_of_a_live_one_is_not(tmp_path: Path) -> None:
    code = (
        "import os,sys; from pathlib import Path; from workers.vault.stores import DirectoryStore\n"
        "store = DirectoryStore(Path(sys.argv[1]), create=True); folder = store.staging()\n"
        "(folder / 'half').write_bytes(b'x'); print(folder, flush=True); sys.stdin.read(); os.kill(os.getpid(), 9)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        DirectoryStore(tmp_path, create=True).staging()
        assert (folder / "half").exists()
        process.communicate("")
    DirectoryStore(tmp_path, create=True).staging()
    assert not folder.exists()


def test_a_listing_does_not_end_early_where_the_vault_is_gone(tmp_path: Path) -> None:
    """A sweep would take what it did not see for what is not there."""
    store = DirectoryStore(tmp_path / "s", create=True)
    for name in ("vault.json", "points/a", "points/b"):
        store.put(name, b"x")
    found = store.list("points/")
    next(found)
    (tmp_path / "s").rename(tmp_path / "away")
    with pytest.raises(VaultMissing):
        list(found)
    with pytest.raises(VaultMissing):
        list(store.list("points/"))


def test_all_threads_have_one_staging_folder(tmp_path: Path) -> None:
    """Each made one of its own, and took the lock off the one before, which others then removed as stale."""
    for number in range(30):
        store = DirectoryStore(tmp_path / str(number), create=True)
        together = Barrier(4)

        def ask(store: Store = store, together: Barrier = together) -> Path:
            together.wait()
            return store.staging()

        with ThreadPoolExecutor(4) as pool:
            assert len({one.result() for one in [pool.submit(ask) for _ in range(4)]}) == 1


def test_a_store_that_nobody_uses_any_more_holds_no_file_open(tmp_path: Path) -> None:
    """Whoever backs up for months opens many; each kept the lock on its staging folder for ever."""

    def held_open() -> list[str]:
        links = [link for link in list(Path("/proc/self/fd").iterdir()) if link.is_symlink()]
        return [str(name) for link in links if (name := link.readlink()).is_relative_to(tmp_path)]

    for _ in range(3):
        store = DirectoryStore(tmp_path, create=True)
        folder = store.staging()
        (folder / "half").write_bytes(b"x")
        assert held_open() == [str(folder)]
        del store
        assert held_open() == []
    DirectoryStore(tmp_path, create=True).staging()
    assert not folder.exists()


def test_errors_of_the_disk_are_ours(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "s", create=True)
    store.put("vault.json", b"m")
    (tmp_path / "s/packs").write_bytes(b"a file where a folder should be")
    with pytest.raises(VaultError):
        store.put("packs/a", b"x")
    with pytest.raises(ObjectMissing):
        store.get("packs/a")
    (tmp_path / "s/points/p").mkdir(parents=True)
    with pytest.raises(VaultError):
        store.get("points/p")
