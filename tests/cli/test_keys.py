"""Keys on the command line: rotation, recovery, programs; and a wrong key, which touches nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.cli.conftest import Cli


@pytest.fixture
def made(configured: Cli) -> Cli:
    """With a vault; `phrase` holds its recovery phrase."""
    phrase = configured.run("init", "--json").line("vault")["recovery_phrase"]
    write(configured.folder / "phrase", f"{phrase}\n")
    return configured


def write(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)


def kinds(cli: Cli) -> list[str]:
    return sorted(slot["kind"] for slot in cli.run("vault", "key", "list", "--json").lines)


def tree(folder: Path) -> dict[str, str]:
    """Every file of the vault, its key and its configuration, but unfinished ones."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".staging" not in path.parts]
    kept = [path for path in files if not path.is_relative_to(folder / "state")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def test_rotate_replaces_the_key_in_its_file(made: Cli) -> None:
    old = (made.folder / "main.key").read_text()
    assert made.run("vault", "key", "rotate").code == 2  # nobody is there to confirm
    assert (made.folder / "main.key").read_text() == old
    done = made.run("vault", "key", "rotate", "--yes", "--json").line("rotated")
    assert len(done["removed"]) == 1
    assert (made.folder / "main.key").read_text() != old
    assert made.run("vault", "key", "verify", "--json").line("key")["slots"] == [done["added"]["id"]]
    write(made.folder / "main.key", old)
    assert made.run("vault", "key", "verify").code == 12


def test_rotate_a_passphrase(made: Cli) -> None:
    write(made.folder / "words", "correct horse\n")
    write(made.folder / "new words", "battery staple\n")
    assert made.run("vault", "key", "add", "--passphrase-file", "words").code == 0
    assert made.run("vault", "key", "rotate", "--passphrase-file", "new words", "--yes").code == 2
    made.file.write_text(made.file.read_text().replace('key_file = "main.key"', 'passphrase_file = "words"'))
    assert made.run("vault", "key", "rotate", "--passphrase-file", "new words", "--yes", "--keep-old").code == 0
    assert (made.folder / "words").read_text() == "battery staple\n"
    assert made.run("vault", "key", "verify").code == 0
    assert kinds(made) == ["keyfile", "passphrase", "passphrase", "recovery"]


def test_the_recovery_phrase_gets_back_in_without_the_configuration_being_touched(made: Cli) -> None:
    (made.folder / "main.key").unlink()
    before = made.file.read_text()
    done = made.run("vault", "key", "restore", "--phrase-file", "phrase", "--key-file", "main.key", "--json")
    assert done.line("key_slot")["configured"]
    assert made.file.read_text() == before
    assert made.run("vault", "key", "verify").code == 0
    again = made.run("vault", "key", "restore", "--phrase-file", "phrase", "--key-file", "main.key", "--json")
    assert again.line("key_slot")["id"] == done.line("key_slot")["id"]
    other = made.run("vault", "key", "restore", "--phrase-file", "phrase", "--key-file", "other.key")
    assert "key_file" in other.out
    assert (made.folder / "other.key").stat().st_mode & 0o777 == 0o600


def test_a_wrong_phrase_makes_no_key_file(made: Cli) -> None:
    write(made.folder / "phrase", "00000-00000-00000-00000-00000-00000-00000-00000-0\n")
    before = tree(made.folder)
    assert made.run("vault", "key", "restore", "--phrase-file", "phrase", "--key-file", "new.key").code == 12
    assert tree(made.folder) == before


def test_a_new_recovery_phrase_replaces_the_old_one(made: Cli) -> None:
    assert made.run("vault", "key", "recovery").code == 2
    assert kinds(made) == ["keyfile", "recovery"]
    kept = made.run("vault", "key", "recovery", "--keep-old", "--json").line("recovery")
    assert kinds(made) == ["keyfile", "recovery", "recovery"]
    done = made.run("vault", "key", "recovery", "--yes", "--json")
    assert kept["slot"] in done.line("removed")["slots"]
    assert kinds(made) == ["keyfile", "recovery"]
    assert made.run("vault", "key", "restore", "--phrase-file", "phrase", "--key-file", "x.key").code == 12
    write(made.folder / "phrase", done.line("recovery")["recovery_phrase"])
    assert made.run("vault", "key", "restore", "--phrase-file", "phrase", "--key-file", "x.key").code == 0


def test_rotate_the_data_key(made: Cli) -> None:
    assert made.run("vault", "key", "rotate-data", "--json").line("data_key")["version"] == 2
    assert made.run("vault", "verify").code == 0


def test_a_program_gives_the_key(made: Cli) -> None:
    text = made.file.read_text()
    made.file.write_text(text.replace('key_file = "main.key"', f'key_command = ["cat", "{made.folder}/main.key"]'))
    assert made.run("vault", "key", "verify").code == 0
    assert made.run("vault", "stats").code == 0
    assert [line["level"] for line in made.run("doctor", "--json").lines if "key of" in line["subject"]] == ["OK"]
    rotated = made.run("vault", "key", "rotate", "--yes")
    assert rotated.code == 2
    assert "vault key add" in rotated.err
    made.file.write_text(text.replace('key_file = "main.key"', 'key_command = ["false"]'))
    failed = made.run("vault", "stats")
    assert failed.code == 12
    assert "exit 1" in failed.err


def test_rebuild_index(made: Cli) -> None:
    assert made.run("vault", "rebuild-index", "--json").line("index")["unreadable"] == []


WITH_A_WRONG_KEY = [
    "vault stats",
    "vault key verify",
    "vault key list",
    "vault key add --key-file new.key",
    "vault key remove 0123456789abcdef --yes",
    "vault key rotate --yes",
    "vault key rotate-data",
    "vault key recovery --yes",
    "vault lock",
    "vault lock --days 30 --yes",
    "vault lock --extend",
    "vault rebuild-index",
    "vault rebuild-catalog",
    "vault verify",
    "init",
]


def test_a_wrong_key_touches_nothing(made: Cli) -> None:
    write(made.folder / "main.key", "ab" * 32 + "\n")
    before = tree(made.folder)
    for command in WITH_A_WRONG_KEY:
        ran = made.run(*command.split())
        assert ran.code == 12, (command, ran.err)
        assert "ab" * 32 not in ran.out + ran.err
        assert tree(made.folder) == before, command
