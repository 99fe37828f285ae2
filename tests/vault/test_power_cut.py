"""The power fails after any call of a backup, a sweep, a key rotation or the making of a vault, and takes with it what
was not synced: what was promised is there, and work goes on."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.vault.pictures import backup, image, new_vault, read_disk
from tests.vault.powercut import Disk, build, traced
from tests.vault.powercut_steps import AFTER, FIRST, SWEPT, opened, two_points
from workers.contract.errors import VaultError
from workers.vault import Vault
from workers.vault.verify import Level, verify

BACKUPS = {"p1": FIRST, "p2": AFTER}
ROOT = Path(__file__).parents[2]
State = tuple[int, list[str], Path]


def cuts(folder: Path, steps: str) -> Iterator[State]:
    """Every different state that a cut can leave: after how many calls, what was promised by then, and where it is."""
    (folder / "vault").mkdir(exist_ok=True)
    disk = Disk(folder / "vault")
    argv = [sys.executable, "-m", "tests.vault.powercut_steps", steps, str(folder)]
    promised: list[str] = []
    seen: set[str] = set()
    for number, call in enumerate(traced(argv, folder / "trace", cwd=ROOT)):
        said = call.data.startswith(b"promised ")
        if said:
            promised.append(call.data.decode().split(" ", 1)[1].strip())
        if not said and not disk.apply(call):
            continue
        for state in disk.states(number):
            digest = hashlib.sha256(repr((sorted(state.items()), promised)).encode()).hexdigest()
            if digest not in seen:
                seen.add(digest)
                after = folder / f"cut-{len(seen)}"
                build(state, after / "vault")
                yield number, promised, after
    assert promised or steps == "sweep"
    assert len(seen) > 10, "hardly anything was seen"


def assert_whole(vault: Vault, where: int, content: Mapping[str, Mapping[str, str]]) -> set[str]:
    """No point is damaged; the points that are there."""
    assert vault.damaged_points() == [], where
    report = verify(vault, Level.FULL)
    assert report.ok, (where, report.findings)
    points = {point.id: point for point in vault.points()}
    for id, point in points.items():
        for disk in point.disks:
            assert read_disk(vault, disk) == image(content[id][disk.target]), where
    return set(points)


def goes_on(vault: Vault) -> None:
    point = backup(vault, "p9", {"vda": "AWXYZ", "vdb": "0q"})
    assert read_disk(vault, point.disks[0]) == image("AWXYZ")
    vault.close()


def test_backups(tmp_path: Path) -> None:
    new_vault(tmp_path).close()
    for number, promised, folder in cuts(tmp_path, "backup"):
        vault = opened(folder, cache="cold")
        assert assert_whole(vault, number, BACKUPS) >= set(promised)
        goes_on(vault)


def test_a_sweep(tmp_path: Path) -> None:
    two_points(tmp_path)
    before = set((tmp_path / "vault/packs").iterdir())
    last = set()
    for number, _, folder in cuts(tmp_path, "sweep"):
        vault = opened(folder, cache="cold")
        last = assert_whole(vault, number, SWEPT)
        assert "p2" in last
        goes_on(vault)
    assert last == {"p2"}
    assert len(before - set((tmp_path / "vault/packs").iterdir())) == 2, "one was dead, one was copied"


def test_keys_that_are_changed(tmp_path: Path) -> None:
    vault = new_vault(tmp_path)
    backup(vault, "p1", FIRST)
    vault.close()
    for number, _, folder in cuts(tmp_path, "rotate"):
        vault = opened(folder, cache="cold")
        assert assert_whole(vault, number, BACKUPS) == {"p1"}
        goes_on(vault)


def test_a_vault_in_the_making(tmp_path: Path) -> None:
    """It exists whole, or another can be made in its place."""
    for _, promised, folder in cuts(tmp_path, "create"):
        try:
            vault = opened(folder, cache="cold")
        except VaultError:
            assert not promised
            vault = new_vault(folder)
        goes_on(vault)


def test_the_model_forgets_what_was_not_synced(tmp_path: Path) -> None:
    """A file that is written and named, and nothing synced: gone, or empty, or whole."""
    root = tmp_path / "vault"
    root.mkdir()
    disk = Disk(root)
    program = (
        f"import os; open({str(root / 'a')!r}, 'xb').write(b'data'); os.link({str(root / 'a')!r}, {str(root / 'b')!r})"
    )
    for call in traced([sys.executable, "-c", program], tmp_path / "trace", cwd=ROOT):
        disk.apply(call)
    nothing, names, everything, *_ = disk.states(1)
    assert nothing == {}
    assert names == {"a": b"", "b": b""}
    assert everything == {"a": b"data", "b": b"data"}
