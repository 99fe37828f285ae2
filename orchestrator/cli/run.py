"""One run of one command: opens configuration and service when they are first needed, and turns whatever happens
into words on standard error and an exit code.

Everything that can end a command passes `Session.__exit__`, in one place: so there is no way to fail without a message,
and none that shows a traceback instead of one (it is saved, and its place is told).
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import typer

from orchestrator.cli.output import Output, is_terminal, printable

if TYPE_CHECKING:
    from orchestrator.config import Config
    from orchestrator.service import Service
    from workers.contract.points import Consistency

OK = 0
FAILED = 1
DEGRADED = 3
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Settings:
    """The options that every command takes."""

    config: Path | None = None
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    yes: bool = False


class Session:
    """What a command works with. `code` is the exit code, also set by what goes wrong."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.out = Output(as_json=settings.json, quiet=settings.quiet, verbose=settings.verbose)
        self.code = OK
        self._service: Service | None = None
        self._reconciled = False

    @cached_property
    def config(self) -> Config:
        from orchestrator.config import load_config

        return load_config(self.settings.config)

    @property
    def service(self) -> Service:
        """The service; what it had to settle after a crash is told, once."""
        service = self.peek()
        if not self._reconciled:
            self._reconciled = True
            for line in service.reconcile():
                self.out.note(f"settled: {line}")
        return service

    def peek(self) -> Service:
        """The service as it is, with nothing settled: for looking only."""
        if self._service is None:
            from orchestrator.service import Service

            self._service = Service.open(self.config, reconcile=False)
        return self._service

    def confirm(self, question: str) -> None:
        """Ask before something is destroyed; `--yes` answers. Raises UsageError without a terminal, Cancelled on a
        no."""
        if self.settings.yes:
            return
        from workers.contract.errors import Cancelled, UsageError

        if not (sys.stdin.isatty() and is_terminal(sys.stderr)):
            raise UsageError(f"nobody is there to answer: {question}", hint="add --yes, or --dry-run to look first")
        sys.stderr.write(f"{printable(question)} [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise Cancelled("nothing was changed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        handled = self._settle(error)
        if self._service is not None:
            self._service.close()
        return handled

    def _settle(self, error: BaseException | None) -> bool:
        if error is None or isinstance(error, typer.Exit | SystemExit):
            return False
        from workers.contract.errors import ErrorInfo, StillframeError

        error = _for_people(error)
        if isinstance(error, BrokenPipeError):
            # Whoever read our output has enough of it (`| head`): not worth a word, but the interpreter must not
            # try to flush into the closed pipe at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.code = FAILED
        elif isinstance(error, KeyboardInterrupt):
            self.code = INTERRUPTED
            self.out.error(ErrorInfo(code="Interrupted", message="interrupted", exit_code=INTERRUPTED))
        elif isinstance(error, StillframeError):
            self.code = error.exit_code
            self.out.error(error.info())
        else:
            self.code = FAILED
            self.out.error(
                ErrorInfo(
                    code="Internal",
                    message=f"{type(error).__name__}: {error}".partition("\n")[0],
                    hint=f"this is a defect; please report it with {self._save_traceback(error)}",
                )
            )
        return True

    def _save_traceback(self, error: BaseException) -> Path:
        text = "".join(traceback.format_exception(error))
        name = time.strftime("stillframe-crash-%Y%m%dT%H%M%S-")
        handle, path = tempfile.mkstemp(prefix=name, suffix=".txt")
        with os.fdopen(handle, "w") as file:
            file.write(f"{' '.join(sys.argv)}\n{text}")
        return Path(path)


def _for_people(error: BaseException) -> BaseException:
    """A catalog or a broker that went away under a command is no defect of ours."""
    if "kombu" in sys.modules:
        from kombu.exceptions import OperationalError as NoBroker

        from workers.contract.errors import BrokerUnreachable

        if isinstance(error, NoBroker):
            words = f"the broker does not answer: {error}".partition("\n")[0]
            return BrokerUnreachable(words, hint="start Redis, or correct `url` under [broker]")
    if "sqlalchemy" not in sys.modules:
        return error
    from sqlalchemy.exc import OperationalError

    if not isinstance(error, OperationalError):
        return error
    from orchestrator.catalog.store import unreachable

    return unreachable(error)


def consistency(word: str | None) -> Consistency | None:
    """The consistency named on the command line. Raises UsageError."""
    from workers.contract.errors import UsageError
    from workers.contract.points import Consistency

    if word is None:
        return None
    if word not in list(Consistency):
        import difflib

        near = difflib.get_close_matches(word, list(Consistency), n=1)
        raise UsageError(
            f"--consistency cannot be {word!r}: it is application, filesystem or crash",
            hint=f"--consistency {near[0] if near else 'filesystem'}",
        )
    return Consistency(word)


def worst(codes: list[int]) -> int:
    """Exit code of several: a failure over a degraded success over 0; among failures the highest."""
    failures = [code for code in codes if code not in (OK, DEGRADED)]
    return max(failures or codes or [OK])
