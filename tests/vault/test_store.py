"""The contract of `Store`, held by the directory store and by the faults wrapper without faults; and what is the
directory store's own: marker, staging, names."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vault.faulty import FaultyStore
from workers.contract.errors import ConfigError, Corrupt, ObjectMissing, VaultError, VaultMissing
from workers.contract.seams import ObjectInfo, Store
from workers.vault.mirror import MirrorStore
from workers.vault.stores import DirectoryStore, open_store

KINDS: dict[str, Callable[[Path], Store]] = {
    "directory": lambda folder: DirectoryStore(folder, create=True),
    "faulty": lambda folder: FaultyStore(DirectoryStore(folder, create=True)),
    "mirror": lambda folder: MirrorStore(
        {
            "one": lambda: DirectoryStore(folder, create=True),
            "two": lambda: FaultyStore(DirectoryStore(folder / "../two", create=True)),
        },
        create=True,
    ),
}


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    store = KINDS[request.param](tmp_path / "s")
    store.put("vault.json", b"marker")
    return store


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


@pytest.mark.parametrize(("offset", "length"), [(0, 6), (4, 2), (6, 1), (99, 1)])
def test_a_short_object_is_corrupt(store: Store, offset: int, length: int) -> None:
    store.put("packs/a", b"hello")
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


def test_free_bytes(store: Store) -> None:
    free = store.free_bytes()
    assert free is None or free > 0


@pytest.mark.parametrize(
    "name", ["../up", "packs/../../up", "/etc/x", "packs//x", ".hidden", "Packs/x", "", "a/", "a\n"]
)
def test_bad_names(store: Store, name: str) -> None:
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
