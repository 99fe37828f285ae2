"""A program that prints the key: what it may do wrong, and that the key is never shown."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from workers.config import VaultConfig
from workers.contract.errors import WrongKey
from workers.key_sources import secrets_of

KEY = bytes(range(32))


def configured(*argv: str) -> VaultConfig:
    return VaultConfig(url="file:///none", key_command=list(argv))


def python(code: str) -> VaultConfig:
    return configured(sys.executable, "-c", code)


def test_what_the_program_prints_is_the_key(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY.hex() + "\n")
    assert secrets_of("main", configured("cat", str(file))) == (KEY, None)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (f"print('{KEY.hex()}'); raise SystemExit(3)", "exit 3"),
        (f"import sys; sys.stderr.write('no agent {KEY.hex()}'); raise SystemExit(1)", "no agent …"),
        ("print('00')", "is not a key file"),
        ("pass", "is not a key file"),
        (f"print('{KEY.hex()}x')", "is not a key file"),
        ("import os\nwhile True: os.write(1, b'0' * 4096)", "prints more"),
        ("import sys; sys.stderr.write('x' * 10**6); raise SystemExit(1)", "failed"),
    ],
)
def test_what_goes_wrong_is_told_and_the_key_is_not(code: str, why: str) -> None:
    with pytest.raises(WrongKey, match=why) as caught:
        secrets_of("main", python(code))
    assert KEY.hex()[:16] not in f"{caught.value} {caught.value.hint}"
    assert "[vaults.main]" in caught.value.hint or "64 hex digits" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("argv", [["/nonexistent/program"], [os.devnull], ["/"]])
def test_a_program_that_cannot_be_run(argv: list[str]) -> None:
    with pytest.raises(WrongKey, match="cannot be run"):
        secrets_of("main", configured(*argv))


def test_a_program_that_hangs_is_stopped_with_what_it_has_started(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    command = configured("sh", "-c", f"sleep 1000 & echo $! > {file}; sleep 1000")
    with pytest.raises(WrongKey, match="did not end"):
        secrets_of("main", command, seconds=1)
    child = int(file.read_text())
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}/stat").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < deadline, "it lives on"
