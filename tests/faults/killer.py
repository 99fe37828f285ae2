"""Runs the real command line in a process that counts its steps, dies at one of them, or stands still there.

    python -m tests.faults.killer --count FILE            -- backup run VM …
    python -m tests.faults.killer --at "before link" 2    -- backup run VM …
    python -m tests.faults.killer --hold "before link" 2  -- backup run VM …
    python -m tests.faults.killer --serve

`--serve` reads requests, a JSON object a line, and answers each with how it ended. It imports what the commands
import, once, and forks for each request while it has one thread and no connection: the walk takes hundreds of runs,
and most of a run's time would be imports.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.steps import die, die_soon, stand_still, watch

_IMPORTS = (
    "orchestrator.cli.main",
    "orchestrator.service",
    "orchestrator.engine",
    "orchestrator.reconciler",
    "orchestrator.catalog.store",
    "alembic.command",
    "workers.tasks",
    "workers.vault",
    "workers.vault.verify",
    "workers.hypervisors.libvirt_host",
    "workers.guests.agent",
    "workers.disks.nbd_source",
    "workers.disks.targets",
    "celery.concurrency.thread",
    "celery.worker.worker",
    "kombu.transport.memory",
    "nbd",
    "rich.progress",
)


def _prepare() -> None:
    for name in _IMPORTS:
        importlib.import_module(name)


def _arm(count: str | None, at: tuple[str, int] | None, then: Callable[[], None] = die) -> None:
    if count is not None:
        record = os.open(count, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

        def write_down(label: str, _nth: int) -> None:
            os.write(record, f"{label}\n".encode())

        watch(write_down)
    elif at is not None:
        wanted = tuple(at)

        def end_there(label: str, nth: int) -> None:
            if (label, nth) == wanted:
                then()

        watch(end_there)


def _main(arguments: list[str]) -> None:
    """`stillframe arguments…`; exits."""
    from orchestrator.cli.main import main

    sys.argv = ["stillframe", *arguments]
    main()


def _serve() -> None:
    """Answer requests until the input ends. A child does not return here: it leaves by `sys.exit`, as the command
    does."""
    _prepare()
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.chdir("/")
            for number, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), number)
            late = float(request.get("late") or 0)
            _arm(request.get("count"), request.get("at"), partial(die_soon, late) if late else die)
            _main(request["argv"])
        code = _wait(pid, float(request["timeout"]))
        sys.stdout.write(json.dumps({"code": code}) + "\n")
        sys.stdout.flush()


def _wait(pid: int, seconds: float) -> int | None:
    """Exit code, or minus the signal; None: it had to be killed after `seconds`."""
    deadline = time.monotonic() + seconds
    late = False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return None if late else os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline and not late:
            late = True
            os.kill(pid, 9)
        time.sleep(0.005)


def main() -> None:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, command = sys.argv[1:at], sys.argv[at + 1 :]
    match own:
        case ["--serve"]:
            _serve()
        case ["--count", file]:
            _prepare()
            _arm(str(Path(file).absolute()), None)
            _main(command)
        case ["--at" | "--hold" as how, label, nth]:
            _prepare()
            _arm(None, (label, int(nth)), die if how == "--at" else stand_still)
            _main(command)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
