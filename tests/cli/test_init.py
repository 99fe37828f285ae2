"""`init`, `doctor` and the vault's commands, without any hypervisor."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, Ran


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_init_makes_a_configuration_and_all_that_it_names(cli: Cli) -> None:
    made = cli.run("init", "--config", cli.file, "--json")
    assert made.code == 0
    vault = made.line("vault")
    assert vault["created"]
    assert len(vault["recovery_phrase"].split("-")) == 9
    assert mode(cli.folder / "main.key") == 0o600
    assert (cli.folder / "vault/vault.json").is_file()
    assert (cli.folder / "state/catalog.sqlite").is_file()
    assert cli.run("vault", "key", "verify").code == 0


def test_init_again_keeps_what_there_is(configured: Cli) -> None:
    first = configured.run("init", "--json")
    written = configured.file.read_text()
    key = (configured.folder / "main.key").read_text()
    again = configured.run("init", "--json")
    assert (first.code, again.code) == (0, 0)
    assert first.line("vault")["created"]
    assert not again.line("vault")["created"]
    assert again.line("vault")["recovery_phrase"] is None
    assert configured.file.read_text() == written
    assert (configured.folder / "main.key").read_text() == key
    assert "(kept)" in configured.run("init").out


def test_init_shows_the_recovery_phrase_once_and_it_opens_the_vault(configured: Cli) -> None:
    shown = configured.run("init").out
    [phrase] = [line.strip() for line in shown.splitlines() if line.count("-") == 8]
    (configured.folder / "phrase").write_text(phrase + "\n")
    configured.file.write_text(
        configured.file.read_text().replace('key_file = "main.key"', 'passphrase_file = "phrase"')
    )
    (configured.folder / "main.key").unlink()
    (configured.folder / "phrase").chmod(0o644)
    assert "chmod 600" in configured.run("vault", "key", "verify").err
    (configured.folder / "phrase").chmod(0o600)
    assert configured.run("vault", "key", "verify").code == 0


def test_init_takes_an_existing_key_for_a_new_vault(configured: Cli) -> None:
    (configured.folder / "main.key").write_text("ab" * 32 + "\n")
    (configured.folder / "main.key").chmod(0o600)
    assert configured.run("init").code == 0
    assert (configured.folder / "main.key").read_text() == "ab" * 32 + "\n"


def test_a_vault_whose_key_is_gone_gets_no_second_one_and_no_catalog(configured: Cli) -> None:
    assert configured.run("init").code == 0
    (configured.folder / "main.key").unlink()
    shutil.rmtree(configured.folder / "state")
    (configured.folder / "state").mkdir()
    refused = configured.run("init", "--json")
    assert refused.code == 12
    assert refused.line("error")["code"] == "WrongKey"
    assert not (configured.folder / "main.key").exists()
    assert list((configured.folder / "state").iterdir()) == []


def test_a_wrong_key(configured: Cli) -> None:
    assert configured.run("init").code == 0
    (configured.folder / "main.key").write_text("ab" * 32 + "\n")
    for command in ("init", "vault stats", "vault key verify", "vault verify"):
        assert configured.run(*command.split()).code == 12, command


def test_a_key_that_others_can_read(configured: Cli) -> None:
    assert configured.run("init").code == 0
    (configured.folder / "main.key").chmod(0o644)
    ran = configured.run("vault", "stats")
    assert ran.code == 12
    assert "try: chmod 600" in ran.err


def test_no_vault_there(configured: Cli) -> None:
    assert configured.run("init").code == 0
    (configured.folder / "vault").rename(configured.folder / "elsewhere")
    assert configured.run("vault", "stats").code == 10
    listed = configured.run("vault", "list", "--json").line("vault")
    assert listed["points"] is None
    assert "no vault" in listed["problem"]


def test_init_does_not_change_a_vault_of_an_existing_configuration(configured: Cli) -> None:
    ran = configured.run("init", "--vault", "other")
    assert ran.code == 2
    assert not (configured.folder / "other").exists()


def test_init_where_nothing_can_be_written(cli: Cli) -> None:
    ran = cli.run("init", "--config", "/proc/none/stillframe.toml")
    assert ran.code == 2
    assert "cannot be written" in ran.err


# --- keys ------------------------------------------------------------------------------------------------------


def test_keys_are_added_listed_and_removed(configured: Cli) -> None:
    assert configured.run("init").code == 0
    (configured.folder / "words").write_text("correct horse\n")
    assert configured.run("vault", "key", "add", "--passphrase-file", "words").code == 0
    added = configured.run("vault", "key", "add", "--key-file", "second.key", "--json").line("key_slot")
    assert mode(configured.folder / "second.key") == 0o600
    kinds = [slot["kind"] for slot in configured.run("vault", "key", "list", "--json").lines]
    assert sorted(kinds) == ["keyfile", "keyfile", "passphrase", "recovery"]
    assert configured.run("vault", "key", "remove", added["id"]).code == 2
    assert configured.run("vault", "key", "remove", added["id"], "--dry-run").code == 0
    assert len(configured.run("vault", "key", "list", "--json").lines) == 4
    assert configured.run("vault", "key", "remove", added["id"], "--yes").code == 0
    assert len(configured.run("vault", "key", "list", "--json").lines) == 3
    unknown = configured.run("vault", "key", "remove", added["id"], "--yes")
    assert unknown.code == 2
    assert "stillframe vault key list main" in unknown.err


def test_the_slot_of_the_configured_key_stays(configured: Cli) -> None:
    assert configured.run("init").code == 0
    [own] = [one for one in configured.run("vault", "key", "list", "--json").lines if one["kind"] == "keyfile"]
    refused = configured.run("vault", "key", "remove", own["id"], "--yes")
    assert refused.code == 2
    assert "vault key add" in refused.err
    assert configured.run("vault", "key", "verify").code == 0


def test_a_passphrase_is_not_asked_for_without_a_terminal(configured: Cli) -> None:
    assert configured.run("init").code == 0
    ran = configured.run("vault", "key", "add", stdin="secret\nsecret\n")
    assert ran.code == 2
    assert "--passphrase-file" in ran.err


# --- every command of an empty vault ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "types"),
    [
        ("init", {"configuration", "catalog", "vault", "extension"}),
        ("doctor", {"check"}),
        ("point list", set()),
        ("job list", set()),
        ("job watch", set()),
        ("vault list", {"vault"}),
        ("vault stats", {"vault_stats"}),
        ("vault verify", {"verify"}),
        ("vault verify --packs", {"verify"}),
        ("vault verify --full", {"verify"}),
        ("vault key list", {"key_slot"}),
        ("vault key verify", {"key"}),
        ("vault rebuild-catalog", {"catalog"}),
        ("extension build", {"package"}),
        ("extension list", {"package"}),
        ("extension uninstall web --dry-run", {"error"}),
        ("vm unprotect web --dry-run", {"error"}),
        ("vm list", {"error"}),
        ("backup run web", {"error"}),
        ("point show web@latest", {"error"}),
        ("restore disk web@latest vda --to x", {"error"}),
        ("job show 00", {"error"}),
    ],
)
def test_json_lines_have_types(ready: Cli, command: str, types: set[str]) -> None:
    assert {line["type"] for line in ready.run(*command.split(), "--json").lines} == types


@pytest.mark.parametrize("command", ["vm list", "vm show web", "backup run web", "backup run web --detach"])
def test_a_hypervisor_that_cannot_be_reached(ready: Cli, command: str) -> None:
    ran = ready.run(*command.split())
    assert ran.code == 1
    assert "error: cannot connect to lab1" in ran.err
    assert ready.run("job", "list", "--json").lines == []


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("point show 00aa", "stillframe point list"),
        ("point show web@latest", ""),
        ("job show 00aa", "stillframe job list"),
        ("job cancel 00aa", "stillframe job list"),
        ("vault stats mian", "did you mean main?"),
    ],
)
def test_what_is_not_there(ready: Cli, command: str, hint: str) -> None:
    ran = ready.run(*command.split())
    assert ran.code == 2
    assert hint in ran.err


@pytest.mark.parametrize(
    "typed", ["backup run web --consistency aplication", "restore disk a@latest vda --to f --format vdi"]
)
def test_a_word_that_is_no_choice(ready: Cli, typed: str) -> None:
    ran = ready.run(*typed.split())
    assert ran.code == 2
    assert "cannot be" in ran.err


# --- doctor ----------------------------------------------------------------------------------------------------


def levels(ran: Ran) -> dict[str, str]:
    return {line["subject"]: line["level"] for line in ran.lines}


def test_doctor_finds_what_is_wrong_and_says_how_to_mend_it(configured: Cli) -> None:
    before = configured.run("doctor", "--json")
    assert before.code == 1
    found = levels(before)
    assert found["configuration"] == "OK"
    assert found["catalog"] == "WARN"
    assert found["vault main"] == "FAIL"
    assert found["hypervisor lab1"] == "FAIL"
    assert all(line["mend"] for line in before.lines if line["level"] == "FAIL")
    assert not (configured.folder / "state").exists()
    assert configured.run("init").code == 0
    after = levels(configured.run("doctor", "--json"))
    assert (after["catalog"], after["vault main"], after["key of vault main"]) == ("OK", "OK", "OK")
    (configured.folder / "main.key").chmod(0o640)
    assert levels(configured.run("doctor", "--json"))["key of vault main"] == "FAIL"
    (configured.folder / "main.key").unlink()
    ran = configured.run("doctor")
    assert "FAIL  key of vault main" in ran.out
    assert "→" in ran.out


def test_doctor_tells_of_schedules_that_do_not_run_and_of_a_bad_configuration(configured: Cli) -> None:
    text = configured.file.read_text()
    used = '[protect.all]\nmachines = ["*"]\npolicy = "gold"\n'
    configured.configure(f'{text}[policies.gold]\nschedule = "hourly"\n{used}')
    found = levels(configured.run("doctor", "--json"))
    assert (found["schedules"], found["alerts"]) == ("WARN", "WARN")
    assert not (configured.folder / "state/catalog.sqlite").exists()
    configured.configure(text + '[policies.gold]\nschedule = "now"\n')
    bad = configured.run("doctor", "--json")
    assert bad.code == 1
    assert levels(bad)["configuration"] == "FAIL"


def test_doctor_finds_files_of_a_job_that_does_not_run(configured: Cli) -> None:
    assert configured.run("init").code == 0
    stray = configured.folder / "state/scratch/sf-0123456789ab"
    stray.mkdir(parents=True)
    ran = configured.run("doctor", "--json")
    [found] = [line for line in ran.lines if line["subject"] == "leftovers"]
    assert "0123456789ab" in found["detail"]
    assert str(stray) in found["mend"]
    assert stray.is_dir()
