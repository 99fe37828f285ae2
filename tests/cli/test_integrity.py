"""`vault verify --share`, `vault repair`, and what `vault stats` and `point show` tell of it; without a machine."""

from __future__ import annotations

import shutil
from datetime import date
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, write_configuration
from tests.vault.pictures import backup, damage_block, image, read_disk
from workers.vault import Vault, open_store, read_key_file


@pytest.fixture
def stocked(tmp_path: Path) -> Cli:
    """The command, with two points in its vault and a replica of it."""
    cli = write_configuration(Cli(tmp_path))
    cli.file.write_text(
        cli.file.read_text()
        + """
        [vaults.second]
        url = "file://./replica"
        key_file = "main.key"
        replica_of = "main"
        """
    )
    assert cli.run("init").code == 0
    shutil.rmtree(cli.folder / "replica", ignore_errors=True)
    vault = opened(cli)
    first = backup(vault, "first", {"vda": "AB0CD"})
    backup(vault, "second", {"vda": "-X---"}, first)
    vault.close()
    shutil.copytree(cli.folder / "vault", cli.folder / "replica")
    assert cli.run("vault", "rebuild-catalog", "main").code == 0
    return cli


def opened(cli: Cli) -> Vault:
    store = open_store(f"file://{cli.folder}/vault")
    return Vault.open(store, key=read_key_file(cli.folder / "main.key"), cache_dir=cli.folder / "other-cache")


def damaged_points(cli: Cli) -> list[str]:
    return [point["id"] for point in cli.run("point", "list", "--json").lines if point["damaged"]]


def test_what_is_damaged_is_found_told_and_repaired(stocked: Cli) -> None:
    damage_block(stocked.folder, opened(stocked), "B")
    assert stocked.run("vault", "verify", "--full", "main").code == 1
    assert damaged_points(stocked) == ["first"]
    told = stocked.run("vault", "stats", "main", "--json").line("vault_stats")["health"]
    assert (told["damaged_packs"], told["damaged_points"]) == (1, ["first"])
    assert "1 packs, 1 points" in stocked.run("vault", "stats", "main").out

    planned = stocked.run("vault", "repair", "main", "--dry-run", "--json")
    assert planned.code == 0
    assert len(planned.line("repair")["repaired"]) == 1
    assert stocked.run("vault", "verify", "--ids", "main").code == 1, "a dry run repairs nothing"

    done = stocked.run("vault", "repair", "main")
    assert done.code == 0, done.out + done.err
    assert "repaired packs/" in done.out
    assert damaged_points(stocked) == []
    assert stocked.run("vault", "verify", "--full", "main").code == 0
    vault = opened(stocked)
    assert read_disk(vault, vault.point("first").disks[0]) == image("AB0CD")
    assert "no damage is known" in stocked.run("vault", "repair", "main").out


def test_what_cannot_be_repaired_is_told_with_its_points(stocked: Cli) -> None:
    name = damage_block(stocked.folder, opened(stocked), "B")
    shutil.copyfile(stocked.folder / "vault" / name, stocked.folder / "replica" / name)
    assert stocked.run("vault", "verify", "--full", "main").code == 1
    ran = stocked.run("vault", "repair", "main", "--from", "second")
    assert ran.code == 1
    assert f"still damaged {name}" in ran.out
    assert "needed by first" in ran.out


def test_a_share_a_night(stocked: Cli) -> None:
    hashed = 0
    for number in (1, 2, 3):
        ran = stocked.run("vault", "verify", "main", "--share", f"{number}/3", "--json")
        assert ran.code == 0
        assert ran.line("verify")["share"] == f"{number}/3"
        hashed += ran.line("verify")["packs"]
    assert hashed == len(list((stocked.folder / "vault/packs").iterdir()))
    today = f"{date.today().toordinal() % 30 + 1}/30"
    assert stocked.run("vault", "verify", "main", "--share", "auto", "--json").line("verify")["share"] == today
    shares = stocked.run("vault", "stats", "main", "--json").line("vault_stats")["health"]["shares"]
    assert [share for share, time in shares.items() if time] == [today]
    assert "1 of 30 parts" in stocked.run("vault", "stats", "main").out
    assert stocked.run("vault", "verify", "main", "--packs").code == 0
    assert "all since" in stocked.run("vault", "stats", "main").out


def test_a_point_shows_when_it_was_verified(stocked: Cli) -> None:
    assert "verified     never" in stocked.run("point", "show", "first").out
    assert stocked.run("vault", "verify", "main", "--packs").code == 0
    assert "verified     never" in stocked.run("point", "show", "first").out, "no block of it was read"
    assert stocked.run("point", "verify", "first").code == 0
    assert "verified     2" in stocked.run("point", "show", "first").out
    assert "verified     never" in stocked.run("point", "show", "second").out


@pytest.mark.parametrize("share", ["0/3", "4/3", "x", "1/0", "-1/3", "1/99999"])
def test_a_share_that_cannot_be_meant(stocked: Cli, share: str) -> None:
    ran = stocked.run("vault", "verify", "main", f"--share={share}")
    assert ran.code == 2
    assert "no share" in ran.err


def test_repair_from_nowhere(stocked: Cli) -> None:
    assert stocked.run("vault", "repair", "main", "--from", "third").code == 2
    assert stocked.run("vault", "repair", "main", "--from", "main").code == 2
