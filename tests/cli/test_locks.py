"""A vault is locked by one person, and that is shortened by two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cli.conftest import Cli
from tests.cli.test_keys import write
from workers.vault.immutable import set_immutable


@pytest.fixture
def made(configured: Cli) -> Iterator[Cli]:
    """With a vault; `phrase` holds its recovery phrase: the second key holder."""
    phrase = configured.run("init", "--json").line("vault")["recovery_phrase"]
    write(configured.folder / "phrase", f"{phrase}\n")
    yield configured
    for path in configured.folder.rglob("*"):
        set_immutable(path, False)


def lock(cli: Cli, *arguments: str) -> dict[str, object]:
    ran = cli.run("vault", "lock", *arguments, "--json")
    assert ran.code == 0, ran.err
    return ran.line("lock")


def test_one_locks_and_two_shorten(made: Cli) -> None:
    assert lock(made)["days"] == 0
    assert made.run("vault", "lock", "--days", "30").code == 2  # nobody is there to confirm
    assert lock(made, "--days", "30", "--yes")["days"] == 30
    asked = made.run("vault", "lock", "--days", "7", "--json").line("request")
    assert lock(made)["days"] == 30
    own = made.run("vault", "approve", asked["request"], "--yes")
    assert own.code == 1
    assert "another key holder" in own.err
    assert made.run("vault", "approve", asked["request"], "--phrase-file", "phrase").code == 2
    given = made.run("vault", "approve", asked["request"], "--phrase-file", "phrase", "--yes", "--json")
    code = given.line("approval")["approval"]
    assert made.run("vault", "lock", "--days", "6", "--approval", code).code == 1
    assert lock(made, "--days", "7", "--approval", code)["days"] == 7
    again = made.run("vault", "lock", "--days", "7", "--approval", code)
    assert again.code == 1
    assert "used already" in again.err
    assert lock(made, "--days", "8", "--yes")["days"] == 8


def test_a_key_that_is_added_later_needs_an_approval_before_it_gives_one(made: Cli) -> None:
    lock(made, "--days", "30", "--yes")
    assert made.run("vault", "key", "add", "--key-file", "second.key").code == 0
    shorter = made.run("vault", "lock", "--days", "7", "--json").line("request")["request"]
    assert made.run("vault", "approve", shorter, "--key-file", "second.key", "--yes").code == 1
    asked = made.run("vault", "lock", "--approvers", "--json").line("request")["request"]
    given = made.run("vault", "approve", asked, "--phrase-file", "phrase", "--yes", "--json").line("approval")
    assert lock(made, "--approvers", "--approval", given["approval"])["new"] == []
    shorter = made.run("vault", "lock", "--days", "7", "--json").line("request")["request"]
    assert made.run("vault", "approve", shorter, "--key-file", "second.key", "--yes").code == 0


def test_the_last_key_that_may_approve_is_not_removed(made: Cli) -> None:
    lock(made, "--days", "30", "--yes")
    refused = made.run("vault", "key", "recovery", "--yes", "--json")
    assert refused.code == 1
    assert [line["type"] for line in refused.lines] == ["error"]
    assert made.run("vault", "key", "recovery", "--keep-old").code == 0


def test_extend_and_what_does_not_go_together(made: Cli) -> None:
    assert "nothing" in made.run("vault", "lock", "--extend").out
    lock(made, "--days", "30", "--yes")
    assert made.run("vault", "lock", "--extend", "--json").line("extended")["covered"] == 1
    for wrong in ("--extend --days 3", "--approvers --days 3", "--approval x", "--days -1", "--approvers --approval x"):
        assert made.run("vault", "lock", *wrong.split()).code == 2, wrong
    assert made.run("vault", "approve", "nonsense", "--yes").code == 2
