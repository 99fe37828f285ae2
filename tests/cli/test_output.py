"""What names and texts of machines may do to a terminal: nothing."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli.output import Output, on_one_line, printable
from workers.contract.errors import ErrorInfo

HOSTILE = "\x1b[2J\x1b]0;owned\x07web\r\u202egnp\u2066\u200b\x9b31m\nforged  running\n"


def output(*, as_json: bool = False) -> Output:
    return Output(as_json=as_json, quiet=False, verbose=False)


def harmless(text: str) -> bool:
    """No control characters but the end of lines and tabs, and none of the invisible ones of Unicode."""
    return not any(unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp") for one in text if one not in "\n\t\xad")


def test_a_table_keeps_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    output().table(("name", "power"), [(HOSTILE, "off"), ("x" * (10 << 20), "off")])
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 3
    assert harmless(shown)
    assert len(shown) < 3000
    assert "web" in shown


def test_messages_and_hints(capsys: pytest.CaptureFixture[str]) -> None:
    output().error(ErrorInfo(code="NotFound", message=f"no machine {HOSTILE}", hint=f"did you mean {HOSTILE}?"))
    output().error(ErrorInfo(code="NotFound", message=f"no machine {'y' * (10 << 20)}"))
    output().say(HOSTILE)
    output().note(HOSTILE)
    shown = capsys.readouterr()
    assert harmless(shown.out + shown.err)
    assert "forged" in shown.err
    assert len(shown.err) < 20_000


def test_programs_get_names_as_they_are_in_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    output(as_json=True).record("machine", {"name": HOSTILE})
    shown = capsys.readouterr().out
    assert shown.isascii()
    assert len(shown.splitlines()) == 1
    assert json.loads(shown)["name"] == HOSTILE


@given(st.text())
def test_whatever_is_written(text: str) -> None:
    assert "\x1b" not in printable(text)
    line = on_one_line(text)
    assert len(line.splitlines()) <= 1
    assert isinstance(line.encode(), bytes)


@pytest.mark.parametrize("text", ["web-01", "Büro", "データ", "a b", "🦀", "x\u0301"])
def test_honest_names_stay(text: str) -> None:
    assert on_one_line(text) == printable(text) == text
