"""What is typed wrongly, and what is not there: message, next command, exit code; nothing asked, nothing made."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Cli

COMMANDS = [
    "init",
    "doctor",
    "demo",
    *(f"vm {name}" for name in ("list", "show", "unprotect")),
    *(f"extension {name}" for name in ("build", "list", "verify", "uninstall")),
    "backup run",
    *(f"point {name}" for name in ("list", "show", "verify", "delete", "undelete", "pin", "unpin", "diff", "export")),
    *(f"policy {name}" for name in ("list", "show", "simulate", "expire")),
    *(f"restore {name}" for name in ("vm", "disk")),
    *(f"job {name}" for name in ("list", "show", "watch", "cancel")),
    *(f"vault {name}" for name in ("list", "stats", "verify", "rebuild-catalog", "replicate", "mirror-sync")),
    *(f"vault key {name}" for name in ("list", "add", "remove", "verify")),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_takes_the_common_options(cli: Cli, command: str) -> None:
    shown = cli.run(*command.split(), "--help")
    assert shown.code == 0
    for option in ("--config", "--json", "--quiet", "--yes"):
        assert option in shown.out


@pytest.mark.parametrize(
    ("typed", "words", "hint"),
    [
        ("vm lst", "No such command 'lst'", "stillframe vm --help"),
        ("vmm list", "No such command 'vmm'", "stillframe --help"),
        ("vm list --colour", "No such option", "stillframe vm list --help"),
        ("backup run", "Missing argument", "stillframe backup run --help"),
        ("restore disk a@latest vda", "Missing option", "stillframe restore disk --help"),
    ],
)
def test_a_mistyped_command(cli: Cli, typed: str, words: str, hint: str) -> None:
    ran = cli.run(*typed.split())
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert words in ran.err
    assert f"try: {hint}" in ran.err


def test_a_mistyped_command_for_programs(cli: Cli) -> None:
    ran = cli.run("vm", "lst", "--json")
    assert ran.code == 2
    assert ran.line("error")["exit_code"] == 2


def test_no_configuration(cli: Cli, tmp_path: Path) -> None:
    ran = cli.run("--config", tmp_path / "none.toml", "vm", "list", "--json")
    assert ran.code == 2
    assert "none.toml: no such configuration file" in ran.err
    assert "try: `stillframe init" in ran.err
    assert ran.line("error")["code"] == "ConfigError"
    assert list(tmp_path.iterdir()) == []


def test_the_configuration_is_found_by_option_environment_and_folder(cli: Cli, tmp_path: Path) -> None:
    for name in ("option", "environment"):
        (tmp_path / name).write_text(f"[{name}]\n")
    cli.configure("[folder]\n")
    environment = {"STILLFRAME_CONFIG": str(tmp_path / "environment")}
    for arguments, extra, found in (
        (("vm", "list", "--config", tmp_path / "option"), environment, "option:1: unknown section"),
        (("--config", tmp_path / "option", "vm", "list"), environment, "option:1: unknown section"),
        (("vm", "list"), environment, "environment:1: unknown section"),
        (("vm", "list"), {}, "stillframe.toml:1: unknown section"),
    ):
        ran = cli.run(*arguments, env=extra)
        assert ran.code == 2
        assert found in ran.err


def test_a_mistake_in_the_configuration_changes_nothing(cli: Cli) -> None:
    cli.configure('[vaults.main]\nurl = "file://./vault"\nkey_fle = "main.key"\n')
    ran = cli.run("init")
    assert ran.code == 2
    assert f"{cli.file}:3: unknown key 'key_fle' in [vaults.main]; did you mean key_file?" in ran.err
    assert sorted(path.name for path in cli.folder.iterdir()) == ["stillframe.toml"]
