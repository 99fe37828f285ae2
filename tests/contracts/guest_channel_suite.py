"""What every GuestChannel must do, written once: an implementation is held to it by a class and a fixture.

    class TestMine(GuestChannelSuite, FreezeSuite):
        @pytest.fixture
        def subject(self, …) -> Subject: …

The guest's own words (how one says `print this` there) come with the subject: the rules are the same for every guest,
its programs are not. A channel that must never freeze leaves FreezeSuite out; nothing is skipped in silence.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from workers.contract.errors import GuestError, GuestTimeout
from workers.contract.guests import GuestOs
from workers.contract.seams import GuestChannel

MIB = 1 << 20
PATIENCE = 120.0
"""Seconds for a program that ends at once, in an emulated guest on a busy host."""
ODD_WORDS = [
    *("", " ", "a b", "  two  spaces  ", "'", '"', "it's", 'say "so"', "\\", "\\\\", "\\n", "trailing\\", '\\"'),
    *("new\nline", "tab\there", "$HOME", "%PATH%", "`id`", "$(id)", "a;b", "a|b", "a&b", "<a>", "*", "?", "[a-z]", "~"),
    *("!x", "#", "{a,b}", "-n", "--", "/dev/null", "schön", "日本語", "€", "\U0001f512", "%s%d", "^", "a=b"),
]


@dataclass(frozen=True)
class Words:
    """How things are said in one kind of guest: each is, or makes, the argv of `run`."""

    say: Callable[[str, str, int], list[str]]
    """(out, err, code): print exactly `out` and `err` on the two streams, exit with `code`."""
    echo: list[str]
    """Print standard input, byte for byte."""
    arguments: Callable[[Sequence[str]], list[str]]
    """Print each of these arguments with a zero byte after it, in UTF-8."""
    zeros: Callable[[int], list[str]]
    """Print that many zero bytes."""
    sleep: Callable[[int], list[str]]
    """Do nothing for that many seconds."""


POSIX = Words(
    say=lambda out, err, code: [
        *("/bin/sh", "-c"),
        f"printf %s {shlex.quote(out)}; printf %s {shlex.quote(err)} >&2; exit {code}",
    ],
    echo=["cat"],
    arguments=lambda words: ["printf", "%s\\0", *words],
    zeros=lambda count: ["head", "-c", str(count), "/dev/zero"],
    sleep=lambda seconds: ["sleep", str(seconds)],
)


@dataclass(frozen=True)
class Subject:
    """A channel to test, and its guest."""

    channel: GuestChannel
    words: Words
    os: GuestOs
    folder: str
    """A folder that may be written, with its separator at the end."""
    unwritable: str
    """Path of a file that cannot be made, in a folder that is there."""
    whole_output: int = 8 * MIB
    """So many bytes of output come back whole."""
    too_much_output: int = 17 * MIB
    """So many do not …"""
    cuts: bool = True
    """… and their beginning comes back, marked; False: there is an error instead."""
    mounts: Sequence[str] = ()
    """The mount points that a freeze of everything freezes."""
    runs_while_frozen: bool = False
    """A guest agent runs nothing then."""


class GuestChannelSuite:
    # --- what it is --------------------------------------------------------------------------------------------

    def test_it_answers(self, subject: Subject) -> None:
        assert subject.channel.ping()

    def test_it_says_what_it_can(self, subject: Subject) -> None:
        info = subject.channel.info()
        assert info.os is subject.os
        assert info.release
        assert info.agent
        assert info.can_run
        assert info.can_copy
        assert info.can_freeze is bool(subject.mounts)

    # --- commands ----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("code", [0, 1, 75, 255])
    def test_output_and_exit_code(self, subject: Subject, code: int) -> None:
        ran = subject.channel.run(subject.words.say("some words", "and others", code), timeout=PATIENCE)
        assert (ran.code, ran.out, ran.err, ran.truncated) == (code, b"some words", b"and others", False)

    def test_no_output(self, subject: Subject) -> None:
        ran = subject.channel.run(subject.words.say("", "", 0), timeout=PATIENCE)
        assert (ran.code, ran.out, ran.err, ran.truncated) == (0, b"", b"", False)

    @pytest.mark.parametrize("stdin", [b"\0", b"\r\n", b"\xff\xfe\x00\xc3(", bytes(range(256)) * 128])
    def test_input_and_output_are_bytes(self, subject: Subject, stdin: bytes) -> None:
        ran = subject.channel.run(subject.words.echo, stdin=stdin, timeout=PATIENCE)
        assert (ran.code, ran.out) == (0, stdin)

    def test_input_that_is_empty_ends_at_once(self, subject: Subject) -> None:
        assert subject.channel.run(subject.words.echo, timeout=PATIENCE).out == b""

    def test_arguments_arrive_as_they_are(self, subject: Subject) -> None:
        ran = subject.channel.run(subject.words.arguments(ODD_WORDS), timeout=PATIENCE)
        assert ran.out.decode().split("\0") == [*ODD_WORDS, ""]

    def test_a_zero_byte_is_no_part_of_an_argument(self, subject: Subject) -> None:
        with pytest.raises(GuestError, match="zero byte"):
            subject.channel.run(subject.words.arguments(["a\0b"]), timeout=PATIENCE)

    def test_a_program_that_is_not_there(self, subject: Subject) -> None:
        """An agent refuses it, a shell has a code for it."""
        try:
            code = subject.channel.run(["no-such-program"], timeout=PATIENCE).code
        except GuestError as error:
            code, said = 127, str(error)
        else:
            said = "no-such-program"
        assert (code, "no-such-program" in said) == (127, True)

    def test_much_output(self, subject: Subject) -> None:
        ran = subject.channel.run(subject.words.zeros(subject.whole_output), timeout=PATIENCE)
        assert (ran.code, ran.truncated) == (0, False)
        assert ran.out == bytes(subject.whole_output)

    def test_too_much_output_never_passes_for_all_of_it(self, subject: Subject) -> None:
        argv = subject.words.zeros(subject.too_much_output)
        if subject.cuts:
            ran = subject.channel.run(argv, timeout=PATIENCE)
            assert ran.truncated
            assert subject.whole_output <= len(ran.out) < subject.too_much_output
            assert ran.out == bytes(len(ran.out))
        else:
            with pytest.raises(GuestError):
                subject.channel.run(argv, timeout=PATIENCE)
        assert subject.channel.run(subject.words.say("on", "", 0), timeout=PATIENCE).out == b"on"

    def test_the_time_limit(self, subject: Subject) -> None:
        started = time.monotonic()
        with pytest.raises(GuestTimeout):
            subject.channel.run(subject.words.sleep(60), timeout=0.5)
        assert 0.5 <= time.monotonic() - started < 30
        assert subject.channel.run(subject.words.say("on", "", 0), timeout=PATIENCE).out == b"on"

    def test_one_that_takes_a_while(self, subject: Subject) -> None:
        assert subject.channel.run(subject.words.sleep(1), timeout=PATIENCE).code == 0

    def test_several_at_once(self, subject: Subject) -> None:
        def said(number: int) -> tuple[bytes, int]:
            ran = subject.channel.run(subject.words.say(f"number {number}", "", number), timeout=PATIENCE)
            return ran.out, ran.code

        with ThreadPoolExecutor(3) as threads:
            found = list(threads.map(said, range(9)))
        assert found == [(f"number {number}".encode(), number) for number in range(9)]

    # --- files -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("size", [0, 1, 3 * MIB + 7])
    def test_there_and_back(self, subject: Subject, size: int) -> None:
        data, path = os.urandom(size), f"{subject.folder}a file, schön.bin"
        subject.channel.put_file(path, data)
        assert subject.channel.get_file(path, limit=8 * MIB) == data

    def test_a_file_takes_the_place_of_a_longer_one(self, subject: Subject) -> None:
        path = f"{subject.folder}replaced"
        subject.channel.put_file(path, b"long" * 1000)
        subject.channel.put_file(path, b"short")
        assert subject.channel.get_file(path, limit=MIB) == b"short"

    def test_no_more_than_the_limit(self, subject: Subject) -> None:
        data, path = os.urandom(200_000), f"{subject.folder}limited"
        subject.channel.put_file(path, data)
        for limit in (0, 1, 131_072, 199_999, 200_000, 200_001):
            assert subject.channel.get_file(path, limit=limit) == data[:limit]

    def test_a_file_that_is_not_there(self, subject: Subject) -> None:
        with pytest.raises(GuestError, match="absent"):
            subject.channel.get_file(f"{subject.folder}absent", limit=10)

    def test_a_folder_is_no_file(self, subject: Subject) -> None:
        with pytest.raises(GuestError):
            subject.channel.get_file(subject.folder, limit=10)
        with pytest.raises(GuestError):
            subject.channel.put_file(subject.folder, b"x")

    def test_a_file_that_cannot_be_made(self, subject: Subject) -> None:
        with pytest.raises(GuestError):
            subject.channel.put_file(subject.unwritable, b"x")
        with pytest.raises(GuestError):
            subject.channel.put_file(f"{subject.folder}no-such-folder/file", b"x")
        assert subject.channel.ping()


class FreezeSuite:
    """For channels whose guest may be frozen. All is thawed after each test."""

    @pytest.fixture(autouse=True)
    def thawed_afterwards(self, subject: Subject) -> Iterator[None]:
        assert not subject.channel.frozen()
        try:
            yield
        finally:
            subject.channel.thaw()
            assert not subject.channel.frozen()

    def test_as_many_are_thawed_as_were_frozen(self, subject: Subject) -> None:
        assert subject.channel.freeze() == len(subject.mounts)
        assert subject.channel.frozen()
        assert subject.channel.ping()
        assert subject.channel.thaw() == len(subject.mounts)
        assert not subject.channel.frozen()
        assert subject.channel.run(subject.words.say("on", "", 0), timeout=PATIENCE).out == b"on"

    def test_again_and_again(self, subject: Subject) -> None:
        for _ in range(3):
            assert subject.channel.freeze() == len(subject.mounts)
            assert subject.channel.thaw() == len(subject.mounts)

    def test_only_some(self, subject: Subject) -> None:
        if not subject.channel.info().can_freeze_some:
            with pytest.raises(GuestError):
                subject.channel.freeze(subject.mounts[:1])
            return
        assert subject.channel.freeze(subject.mounts[:1]) == 1
        assert subject.channel.frozen()
        assert subject.channel.thaw() == 1
        assert not subject.channel.frozen()

    def test_a_thaw_is_always_allowed(self, subject: Subject) -> None:
        assert subject.channel.thaw() == 0
        assert subject.channel.thaw() == 0

    def test_a_second_freeze_is_refused_and_the_first_one_holds(self, subject: Subject) -> None:
        assert subject.channel.freeze() == len(subject.mounts)
        with pytest.raises(GuestError):
            subject.channel.freeze()
        assert subject.channel.frozen()
        assert subject.channel.thaw() == len(subject.mounts)

    def test_a_thaw_from_another_thread(self, subject: Subject) -> None:
        """The governor's timer does so, when the one who froze hangs."""
        assert subject.channel.freeze() == len(subject.mounts)
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(subject.channel.thaw).result(60) == len(subject.mounts)
        assert not subject.channel.frozen()

    def test_commands_while_frozen(self, subject: Subject) -> None:
        subject.channel.freeze()
        argv = subject.words.say("on", "", 0)
        if subject.runs_while_frozen:
            assert subject.channel.run(argv, timeout=PATIENCE).out == b"on"
        else:
            with pytest.raises(GuestError, match="frozen"):
                subject.channel.run(argv, timeout=PATIENCE)
