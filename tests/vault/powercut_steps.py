"""What is done when the power fails: `python -m tests.vault.powercut_steps STEPS FOLDER`. A line on standard output
says that something is promised from here on."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tests.vault.pictures import BLOCK, KEY, backup, new_vault, reopened
from workers.vault import Vault, open_store
from workers.vault.sweep import Settings, sweep

FIRST = {"vda": "ABCDE", "vdb": "0K"}
SECOND = {"vda": "-0-LM", "vdb": "Qq"}
AFTER = {"vda": "A0CLM", "vdb": "Qq"}
SWEPT = {"p1": {"vda": "ABCDEFGHIJ", "vdb": "RST"}, "p2": {"vda": "ABCDE", "vdb": "0S"}}
"""One segment names a pack that the second point needs and one that it does not; another pack is mostly dead."""
NEW_KEY = bytes(range(1, 33))
NOW = datetime(2026, 11, 24, tzinfo=UTC)


def promise(what: str) -> None:
    sys.stdout.write(f"promised {what}\n")
    sys.stdout.flush()


def make_backups(folder: Path) -> None:
    """The first of a vault, which makes its folders, and one on top of it."""
    vault = reopened(folder)
    backup(vault, "p1", FIRST)
    promise("p1")
    vault.announce("job", "p2", reads=["p1"])
    backup(vault, "p2", SECOND, vault.point("p1"))
    promise("p2")
    vault.withdraw("job")


def create(folder: Path) -> None:
    new_vault(folder)
    promise("vault")


def rotate(folder: Path) -> None:
    vault = reopened(folder)
    [old] = [slot for slot in vault.slots.all() if slot.kind == "keyfile"]
    vault.slots.add(key=NEW_KEY)
    promise("new key")
    vault.rotate_data_key()
    vault.slots.remove(old.id)


def two_points(folder: Path) -> None:
    vault = new_vault(folder)
    for id, pictures in SWEPT.items():
        backup(vault, id, pictures)
    vault.close()


def sweep_twice(folder: Path) -> None:
    """The first point is gone; its blocks are condemned, then removed, and half-empty packs are made into others."""
    vault = reopened(folder)
    vault.delete_point("p1")
    for _ in range(2):
        sweep(vault, now=NOW + timedelta(days=30), settings=Settings(empty=True, pack_size=6 * BLOCK))


STEPS = {"backup": make_backups, "create": create, "rotate": rotate, "sweep": sweep_twice}


def opened(folder: Path, *, cache: str) -> Vault:
    """By whichever of the two keys fits."""
    from workers.contract.errors import WrongKey

    store = open_store(f"file://{folder}/vault")
    try:
        return Vault.open(store, key=KEY, cache_dir=folder / cache)
    except WrongKey:
        return Vault.open(store, key=NEW_KEY, cache_dir=folder / cache)


if __name__ == "__main__":
    STEPS[sys.argv[1]](Path(sys.argv[2]))
