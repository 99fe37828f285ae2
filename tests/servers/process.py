"""A server of a test: a process group of its own, that ends with the test, however that ends, or is killed in its
middle."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`answers` raises OSError, or returns False, as long as it is not up."""

    def __init__(self, argv: Sequence[str | Path], log: Path, answers: Callable[[], bool]) -> None:
        self._argv = ["setpriv", "--pdeathsig", "KILL", *(str(word) for word in argv)]
        self._log = log
        self._answers = answers
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Until it answers. Raises AssertionError with what it said."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + 60
        while time.monotonic() < end and self._process.poll() is None:
            with suppress(OSError):
                if self._answers():
                    return
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.02)
        said = self._log.read_text(errors="replace")[-2000:]
        self.kill()
        raise AssertionError(f"{self._argv[3]} did not come up: {said}")

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """It and its children, all at once."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, how)
            self._process.wait(60)
            self._process = None

    @property
    def group(self) -> int:
        """Id of its process group."""
        assert self._process is not None
        return self._process.pid
