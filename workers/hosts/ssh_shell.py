"""A shell on another host that is asked one thing after the other.

What it is told is written into its input, and it answers between marks that cannot occur by chance. This is the one
place where words become a shell's words: every one is quoted by `shlex`, data travels as base64, and the login shell
(which may be anything) sees nothing but `exec /bin/sh`.
"""

from __future__ import annotations

import base64
import os
import secrets
import selectors
import shlex
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from workers.contract.errors import DiskError

_START = 'export LC_ALL=C PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"; cd /; umask 077'


class Gone(Exception):
    """The shell, or the connection, ended; `words`: what ssh said."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.words = words


class TooSlow(Exception):
    """No answer in time; the shell is in the middle of something, and of no more use."""


@dataclass(frozen=True, slots=True)
class Answer:
    code: int
    out: bytes
    err: bytes


class Shell:
    """Not thread-safe. `argv` is an ssh command that ends in a /bin/sh."""

    def __init__(self, argv: Sequence[str], *, timeout: float) -> None:
        """Raises Gone if it cannot connect."""
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us
        )
        self.ready = False
        """Nothing is under way."""
        try:
            self.ask(":", timeout=timeout)
        except TooSlow:
            self.close()
            raise Gone(f"no answer within {timeout:.0f} s") from None
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, script: str, *arguments: str, stdin: bytes = b"", timeout: float) -> Answer:
        """Run a script, of our own making, with hostile `arguments` as "$1" and so on. Raises Gone, TooSlow."""
        if any("\0" in word for word in arguments):
            raise DiskError("a name with a zero byte is no name")
        mark = secrets.token_hex(16)
        words = " ".join(shlex.quote(word) for word in arguments)
        body = f"{_START}\nset -- {words}\n{script}"
        feed = "</dev/null"
        if stdin:
            feed = f"<<'{mark}'\n{base64.encodebytes(stdin).decode()}{mark}\n"
            body = f"base64 -d | (\n{body}\n)"
        # The script stands on lines of its own; a pair of marks, one on each stream, ends the answer.
        text = f"({body}\n) {feed}\n" if stdin else f"(\n{body}\n) {feed}\n"
        text += f"code=$?; printf '\\n%s %s\\n' {mark} $code; printf '\\n%s\\n' {mark} >&2\n"
        self.ready = False
        answer = self._exchange(text.encode(errors="surrogateescape"), mark.encode(), time.monotonic() + timeout)
        self.ready = True
        return answer

    def _exchange(self, text: bytes, mark: bytes, deadline: float) -> Answer:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        out, err = process.stdout.fileno(), process.stderr.fileno()
        got: dict[int, bytearray] = {out: bytearray(), err: bytearray()}
        wanted = {out: b"\n" + mark + b" ", err: b"\n" + mark + b"\n"}
        todo = memoryview(text)
        os.set_blocking(process.stdin.fileno(), False)
        with selectors.DefaultSelector() as selector:
            for stream in (out, err):
                selector.register(stream, selectors.EVENT_READ)
            selector.register(process.stdin, selectors.EVENT_WRITE)
            while not all(_ended(got[stream], wanted[stream]) for stream in got):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TooSlow
                for key, _ in selector.select(left):
                    if key.fileobj is process.stdin:
                        todo = self._feed(todo, got[err])
                        if not todo:
                            selector.unregister(process.stdin)
                        continue
                    piece = os.read(key.fd, 1 << 16)
                    if not piece:
                        raise self._gone(got[err])
                    got[key.fd] += piece
        body, _, code = bytes(got[out]).rpartition(wanted[out])
        return Answer(int(code), body, bytes(got[err]).rpartition(wanted[err])[0])

    def _feed(self, todo: memoryview, err: bytearray) -> memoryview:
        assert self._process.stdin is not None
        try:
            return todo[os.write(self._process.stdin.fileno(), todo[: 1 << 16]) :]
        except BlockingIOError:
            return todo
        except BrokenPipeError:
            raise self._gone(err) from None

    def _gone(self, err: bytearray) -> Gone:
        """With all that ssh still has to say."""
        assert self._process.stdin is not None
        assert self._process.stderr is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(2)
        if self.alive:
            self._process.kill()
        err += self._process.stderr.read()
        self.close()
        return Gone(err.decode(errors="replace").strip())

    def close(self) -> None:
        """End it, and with it what still runs in it."""
        process = self._process
        self.ready = False
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()


def _ended(got: bytearray, mark: bytes) -> bool:
    """Whether an answer is whole: the mark, and for the first stream the number behind it."""
    at = got.rfind(mark)
    return at >= 0 and (mark.endswith(b"\n") or got.endswith(b"\n"))
