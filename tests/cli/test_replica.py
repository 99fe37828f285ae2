"""Replicas and mirrors as people use them, without any guest: the points are made with the vault alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import UNREACHABLE, Cli
from tests.vault.pictures import backup, image
from tests.vault.test_mirror import files
from workers.vault import Vault, read_key_file
from workers.vault.stores import DirectoryStore

PICTURES = {"p1": "ABCDEFGHIJ", "p2": "AB0Kk0", "p3": "Z"}


def configure(cli: Cli, vaults: str) -> Cli:
    cli.configure(
        f"""
        [paths]
        state = "state"
        runtime = "run"
        {vaults}
        [hypervisors.lab1]
        uri = "{UNREACHABLE}"
        """
    )
    return cli


MAIN = '[vaults.main]\nurl = "file://./vault"\nkey_file = "main.key"\n'
SECOND = '[vaults.second]\nurl = "file://./second"\nkey_file = "main.key"\n'


def main_vault(cli: Cli) -> Vault:
    key = read_key_file(cli.folder / "main.key")
    return Vault.open(DirectoryStore(cli.folder / "vault"), key=key, cache_dir=cli.folder / "cache")


def fill(cli: Cli) -> None:
    """Points in the vault, and in the catalog."""
    assert cli.run("init").code == 0
    vault = main_vault(cli)
    for point, picture in PICTURES.items():
        backup(vault, point, {"vda": picture})
    vault.close()
    assert cli.run("vault", "rebuild-catalog").code == 0


@pytest.fixture
def replicated(cli: Cli) -> Cli:
    """A vault with points, and a replica that has them."""
    configure(cli, MAIN + SECOND + 'replica_of = "main"\n')
    fill(cli)
    ran = cli.run("vault", "replicate", "--json")
    assert ran.code == 0, ran.err
    line = ran.line("replica")
    assert (line["vault"], line["to"], line["created"], line["points"]) == ("main", "second", True, 3)
    return cli


def test_a_replica_is_made_by_replication_only(cli: Cli) -> None:
    configure(cli, MAIN + SECOND + 'replica_of = "main"\n')
    made = cli.run("init")
    assert "stillframe vault replicate main --to second" in made.out
    assert not (cli.folder / "second").exists()
    assert cli.run("vault", "replicate", "--to", "second", "--dry-run").code == 0
    assert not (cli.folder / "second").exists()
    for command in (
        "backup run web --vault second",
        "vault sweep second",
        "vault rebuild-catalog second",
        "vault key add second --key-file another.key",
    ):
        refused = cli.run(*command.split())
        assert refused.code == 2, command
        assert "replica of main" in refused.err
        assert "replica_of" in refused.err


def test_points_say_where_they_are_and_are_restored_from_there(replicated: Cli) -> None:
    cli = replicated
    points = [line for line in cli.run("point", "list", "--json").lines if line["type"] == "point"]
    assert {line["id"]: line["replicas"] for line in points} == {point: ["second"] for point in PICTURES}
    assert "replicas     second" in cli.run("point", "show", "p1").out
    assert "replica of main" in cli.run("vault", "list").out
    (cli.folder / "vault").rename(cli.folder / "away")
    ran = cli.run("restore", "disk", "p1", "vda", "--to", "vda.raw")
    assert ran.code == 0, ran.err
    assert "restored from second" in ran.err
    assert (cli.folder / "vda.raw").read_bytes() == image(PICTURES["p1"])
    shutil.rmtree(cli.folder / "second")
    lost = cli.run("restore", "disk", "p1", "vda", "--to", "again.raw")
    assert lost.code == 10
    assert not (cli.folder / "again.raw").exists()


def test_a_chosen_vault_is_restored_from(replicated: Cli) -> None:
    ran = replicated.run("restore", "disk", "p2", "vda", "--to", "vda.raw", "--vault", "second", "--json")
    assert ran.code == 0, ran.err
    assert ran.line("restore")["warnings"] == []
    assert replicated.run("job", "show", ran.line("restore")["job"]).code == 0
    assert (replicated.folder / "vda.raw").read_bytes() == image(PICTURES["p2"])


def test_a_host_that_has_only_the_replica(replicated: Cli, tmp_path: Path) -> None:
    """The other site takes over: the replica is a vault like any other, once it is said to follow nobody."""
    there = tmp_path / "there"
    there.mkdir()
    (replicated.folder / "second").rename(there / "second")
    (replicated.folder / "main.key").rename(there / "main.key")
    cli = configure(Cli(there), SECOND)
    ran = cli.run("vault", "rebuild-catalog", "second", "--json")
    assert ran.code == 0, ran.err
    assert ran.line("catalog")["points"] == 3
    assert cli.run("restore", "disk", "p1", "vda", "--to", "vda.raw").code == 0
    assert (there / "vda.raw").read_bytes() == image(PICTURES["p1"])


def test_damage_and_deletions_are_told(replicated: Cli) -> None:
    cli = replicated
    vault = main_vault(cli)
    backup(vault, "p4", {"vda": "QRSTUV"})
    new = {path.name for path in (cli.folder / "vault/packs").iterdir()}
    pack = cli.folder / "vault/packs" / sorted(new - {path.name for path in (cli.folder / "second/packs").iterdir()})[0]
    pack.write_bytes(pack.read_bytes()[:-1])
    vault.delete_point("p3")
    ran = cli.run("vault", "replicate", "main", "--to", "second", "--bandwidth", "100MiB")
    assert ran.code == 3
    assert f"not copied: packs/{pack.name}" in ran.out
    assert "gone from the vault" in ran.out
    assert cli.run("vault", "replicate", "--bandwidth", "fast").code == 2
    assert cli.run("vault", "replicate", "--to", "main").code == 2


def test_a_vault_without_a_replica(cli: Cli) -> None:
    configure(cli, MAIN)
    for command, hint in (("replicate", 'replica_of = "main"'), ("mirror-sync", "mirrors =")):
        ran = cli.run("vault", command)
        assert ran.code == 2
        assert hint in ran.err


def test_a_new_mirror(cli: Cli) -> None:
    configure(cli, MAIN)
    fill(cli)
    configure(cli, MAIN + 'mirrors = ["file://./mirror"]\n')
    assert "mirror" in cli.run("vault", "list", "--json").line("vault")["problem"]
    assert cli.run("restore", "disk", "p1", "vda", "--to", "before.raw").code == 0
    refused = cli.run("vault", "key", "add", "--key-file", "another.key")
    assert refused.code == 1
    assert "try: bring it back, or, for a new or replaced one: stillframe vault mirror-sync" in refused.err
    unasked = cli.run("vault", "mirror-sync")
    assert unasked.code == 2
    assert "holds nothing yet" in unasked.err
    assert not (cli.folder / "mirror").exists()
    ran = cli.run("vault", "mirror-sync", "--yes", "--json")
    assert ran.code == 0, ran.err
    assert ran.line("mirror")["new"]
    assert ran.line("mirror_sync")["objects"] > 5
    assert files(cli.folder / "vault") == files(cli.folder / "mirror")
    assert cli.run("vault", "list", "--json").line("vault")["problem"] == ""
    assert cli.run("restore", "disk", "p1", "vda", "--to", "vda.raw").code == 0


def test_a_vault_is_made_on_all_its_stores(cli: Cli) -> None:
    configure(cli, MAIN + 'mirrors = ["file://./mirror"]\n')
    fill(cli)
    assert (cli.folder / "mirror/vault.json").exists()
    (cli.folder / "mirror").rename(cli.folder / "away")
    doctor = cli.run("doctor").out
    assert "stillframe vault mirror-sync main" in doctor
    assert cli.run("init").code == 0
    assert not (cli.folder / "mirror").exists()
