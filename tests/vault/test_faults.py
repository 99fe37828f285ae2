"""The store fails, fills up, or the process dies, at every single call of a backup; and many writers at once.

Whatever happens: every committed point reads back, verify is clean, and the next backup works.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vault.faulty import WRITES, Died, FaultyStore, Plan
from tests.vault.pictures import BLOCK, KEY, backup, content, image, new_vault, read_disk, reopened
from workers.contract.errors import NoSpace, StillframeError, VaultError
from workers.contract.seams import Store
from workers.vault import Vault, open_store
from workers.vault.packs import PackBuilder
from workers.vault.stores import DirectoryStore
from workers.vault.verify import Level, verify

FIRST = {"vda": "ABCDEFGHIJ", "vdb": "0Kk0"}
SECOND = {"vda": "-0-LMNOP--", "vdb": "Qq--"}
AFTER = {"vda": "A0CLMNOPIJ", "vdb": "Qqk0"}
CALLS = 45
"""At least as many as one backup makes, so that the last tests see it succeed."""


def through(folder: Path, plan: Plan) -> tuple[Vault, Store]:
    store = FaultyStore(open_store(f"file://{folder}/vault"), plan)
    return Vault.open(store, key=KEY, cache_dir=folder / "cache"), store


def run(folder: Path, fault: Callable[[int], Plan], number: int) -> bool:
    """A second backup during which call `number` goes wrong; whether it got its manifest in."""
    vault, store = through(folder, Plan())
    base = vault.point("p1")
    plan = fault(number)
    assert isinstance(store, FaultyStore)
    store.plan = plan
    try:
        vault.announce("job", "p2")
        backup(vault, "p2", SECOND, base)
        vault.withdraw("job")
    except (Died, StillframeError):
        return False
    finally:
        vault.close()
    return True


FAULTS: dict[str, Callable[[int], Plan]] = {
    "dies before": lambda number: Plan(die_before=number),
    "dies after": lambda number: Plan(die_after=number),
    "fails": lambda number: Plan(fail_at=number),
    "is full": lambda number: Plan(full_at=number),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_at_every_call_of_a_backup(tmp_path: Path, kind: str) -> None:
    outcomes = []
    for number in range(CALLS):
        folder = tmp_path / str(number)
        first = new_vault(folder)
        backup(first, "p1", FIRST)
        first.close()
        outcomes.append(run(folder, FAULTS[kind], number))
        for cache in ("cache", "cold"):
            vault = reopened(folder, cache=cache)
            report = verify(vault, Level.IDS)
            assert report.ok, (number, report.findings)
            points = {point.id: point for point in vault.points()}
            assert outcomes[-1] <= ("p2" in points)
            for id, pictures in (("p1", FIRST), ("p2", AFTER)):
                for disk in points[id].disks if id in points else []:
                    assert read_disk(vault, disk) == image(pictures[disk.target])
            vault.close()
        vault = reopened(folder)
        again = backup(vault, "p3", SECOND, vault.point("p1"))
        assert read_disk(vault, again.disks[0]) == image(AFTER["vda"])
        assert verify(vault, Level.FULL).ok
        vault.close()
    assert outcomes[-1], "the walk did not reach the end of a backup: raise CALLS"
    assert not outcomes[0]


def test_the_order_of_writes(tmp_path: Path) -> None:
    """Packs, then their segment, per disk; the manifest last."""
    new_vault(tmp_path).close()
    plan = Plan()
    vault, _ = through(tmp_path, plan)
    backup(vault, "p1", FIRST)
    written = [name.partition("/")[0] for call, name in plan.calls if call in WRITES]
    assert written == ["packs", "packs", "index", "packs", "index", "points"]


def test_no_space_for_a_pack(vault: Vault, tmp_path: Path) -> None:
    """A real full device, not an injected fault: the pack's descriptor leads to /dev/full."""
    pack = PackBuilder(tmp_path, vault.keys)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        for name in Path("/proc/self/fd").iterdir():
            if name.exists() and name.samefile(pack.path):
                os.dup2(full, int(name.name))
        with pytest.raises(NoSpace):
            pack.append(0, b"i" * 32, 4, 0, b"data")
    finally:
        os.close(full)
        pack.abandon()
    assert not pack.path.exists()


def test_a_full_store(tmp_path: Path) -> None:
    new_vault(tmp_path).close()
    vault, store = through(tmp_path, Plan())
    assert isinstance(store, FaultyStore)
    store.plan = Plan(full_at=0)
    with pytest.raises(NoSpace):
        backup(vault, "p1", {"vda": "AB"})
    assert list(vault.points()) == []
    assert list(vault.store.staging().iterdir()) == []


def test_a_failed_put_fails_the_writer(tmp_path: Path) -> None:
    """Another thread may have been told that the block is known: nothing of this writer can be relied on."""
    new_vault(tmp_path).close()
    vault, store = through(tmp_path, Plan())
    assert isinstance(store, FaultyStore)
    with vault.writer(pack_size=BLOCK) as writer:
        store.plan = Plan(fail_at=0)
        with pytest.raises(VaultError, match="injected"):
            writer.put(content("A"))
        writer_id = writer.put(content("A"))
        assert writer_id == vault.reader().block_id(content("A"))
        with pytest.raises(VaultError, match="failed"):
            writer.finish()


def test_wrong_bytes_from_the_store_are_noticed(tmp_path: Path) -> None:
    new_vault(tmp_path).close()
    vault, store = through(tmp_path, Plan())
    point = backup(vault, "p1", {"vda": "AB"})
    assert isinstance(store, FaultyStore)
    store.plan = Plan(mangle=lambda name, data: data[::-1] if name.startswith("packs/") else data)
    with pytest.raises(VaultError):
        read_disk(vault, point.disks[0])


# --- many at once ------------------------------------------------------------------------------------------------


def in_threads(work: Callable[[int], None], count: int) -> None:
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_threads_share_a_writer(vault: Vault) -> None:
    blocks = [content(letter) + bytes([number % 50]) * 40 for number, letter in enumerate("ABCDEFGH" * 100)]
    with vault.writer(pack_size=20 * BLOCK) as writer:

        def work(number: int) -> None:
            for at in range(len(blocks)):
                writer.put(blocks[(at + number * 37) % len(blocks)])

        in_threads(work, 4)
        writer.finish()
        assert writer.new_bytes == len(set(blocks)) * len(blocks[0])
    reader = vault.reader()
    for block in set(blocks):
        assert reader.get(reader.block_id(block)) == block
    assert vault.stats().blocks == len(set(blocks))
    assert verify(vault, Level.FULL).ok


def test_writers_at_once_in_one_vault(tmp_path: Path) -> None:
    new_vault(tmp_path).close()

    def work(number: int) -> None:
        vault = reopened(tmp_path)
        picture = "ABCDEF" + "GHIJKLMN"[number] * 2
        for turn in range(3):
            point = backup(vault, f"p{number}-{turn}", {"vda": picture + "xyz"[turn]})
            assert read_disk(vault, point.disks[0]) == image(picture + "xyz"[turn])
        vault.close()

    in_threads(work, 4)
    vault = reopened(tmp_path)
    assert len(list(vault.points())) == 12
    assert verify(vault, Level.FULL).ok


def test_processes_at_once_in_one_vault_with_one_cache(tmp_path: Path) -> None:
    new_vault(tmp_path).close()
    code = (
        "import sys; from pathlib import Path; from tests.vault.pictures import *\n"
        "vault = reopened(Path(sys.argv[1]))\n"
        "name = sys.argv[2]\n"
        "for turn in range(4): backup(vault, f'{name}-{turn}', {'vda': 'ABC' + name.upper() + 'wxyz'[turn]})\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in ("g", "h", "i")]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    vault = reopened(tmp_path)
    points = list(vault.points())
    assert len(points) == 12
    for point in points:
        letter, turn = point.id.split("-")
        assert read_disk(vault, point.disks[0]) == image("ABC" + letter.upper() + "wxyz"[int(turn)])
    assert verify(vault, Level.FULL).ok


def test_one_of_two_commits_of_a_name_wins(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    base = backup(vault, "p0", {"vda": "A"})
    won: list[str] = []

    def work(number: int) -> None:
        try:
            vault.commit(base.model_copy(update={"id": "p1", "job": f"j{number}"}))
            won.append(f"j{number}")
        except VaultError:
            return

    in_threads(work, 4)
    assert [vault.point("p1").job] == won


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(VaultError):
        DirectoryStore(Path("/proc/sf-none"), create=True)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(VaultError):
        DirectoryStore(tmp_path / "file/below", create=True)
