"""`vault sweep` as people and programs see it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.vault.pictures import backup
from workers.vault import Vault, open_store, read_key_file
from workers.vault.trash import delete


def opened(cli: Cli) -> Vault:
    store = open_store(f"file://{cli.folder}/vault")
    return Vault.open(store, key=read_key_file(cli.folder / "main.key"), cache_dir=cli.folder / "other-cache")


@pytest.fixture
def littered(configured: Cli) -> Cli:
    """A vault with a point that is deleted for good, one that can be taken back, and one that stays."""
    now = datetime(2026, 11, 23, tzinfo=UTC)
    assert configured.run("init").code == 0
    vault = opened(configured)
    for id, picture in (("gone", "ABCDEF"), ("going", "GHIJ"), ("stays", "ABXYZ")):
        backup(vault, id, {"vda": picture})
    delete(vault, "gone", now=now, until=now, by="anna", reason="asked")
    delete(vault, "going", now=now, until=now + timedelta(days=36500), by="anna", reason="asked")
    vault.close()
    assert configured.run("vault", "rebuild-catalog").code == 0
    return configured


def packs(cli: Cli) -> set[str]:
    return {path.name for path in (cli.folder / "vault/packs").iterdir()}


def test_it_looks_first_then_does(littered: Cli) -> None:
    before = packs(littered)
    told = littered.run("vault", "sweep", "--dry-run")
    assert told.code == 0, told.err
    assert "would become final: gone" in told.out
    assert packs(littered) == before
    done = littered.run("vault", "sweep")
    assert done.code == 0, done.err
    assert "became final: gone" in done.out
    assert "removed   2 packs" in done.out
    assert "condemned 2 packs" in told.out.replace("would condemn", "condemned"), "looking tells what doing does"
    assert len(packs(littered)) == len(before) - 1  # two went; what is needed of one of them was copied
    vault = opened(littered)
    assert {point.id for point in vault.points()} == {"going", "stays"}
    again = littered.run("vault", "sweep", "--json").line("sweep")
    assert (again["vault"], again["removed"], again["condemned"], again["final"]) == ("main", 0, 0, [])
    assert littered.run("vault", "verify", "--full").code == 0


def test_a_backup_elsewhere_is_waited_for_and_named(littered: Cli) -> None:
    vault = opened(littered)
    vault.announce("job-of-another", "p9")
    ran = littered.run("vault", "sweep")
    assert ran.code == 0, ran.err
    assert "waiting" in ran.out
    assert "job-of-another" in ran.out
    assert littered.run("vault", "sweep", "--json").line("sweep")["removed"] == 0
    assert "fenced    session job-of-another" in littered.run("vault", "sweep", "--fence-days", "0").out
    assert littered.run("vault", "sweep", "--json").line("sweep")["waiting"] == []


def test_what_it_cannot_do(littered: Cli, tmp_path: Path) -> None:
    assert littered.run("vault", "sweep", "--bandwidth", "fast").code == 2
    ran = littered.run("vault", "sweep", "elsewhere")
    assert (ran.code, "no vault is named 'elsewhere'" in ran.err) == (2, True)
    manifest = tmp_path / "vault/points/stays"
    manifest.write_bytes(b"x")
    before = packs(littered)
    ran = littered.run("vault", "sweep")
    assert ran.code == 1
    assert "point stays cannot be read" in ran.err
    assert "point delete stays" in ran.err
    assert packs(littered) == before
