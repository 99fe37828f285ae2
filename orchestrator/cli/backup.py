"""`stillframe backup`: run backups, several at once, waited for or in the background.

In the background means a process of its own session that starts the jobs, says which, and lives until they end: the
embedded worker runs in whichever process started a job, so a job cannot outlive its process, and must not depend on
a terminal that closes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.follow import follower, wait_for
from orchestrator.cli.options import command, group
from orchestrator.cli.output import moment, size
from orchestrator.cli.run import DEGRADED, OK, Session, consistency, worst

if TYPE_CHECKING:
    from orchestrator.views import JobView, PointView
    from workers.contract.errors import ErrorInfo

app = group("Run backups.")

Machines = Annotated[list[str], typer.Argument(metavar="VM", help="Machines, by name or UUID.")]
Full = Annotated[bool, typer.Option("--full", help="Read everything, even where changes are tracked.")]
Goal = Annotated[
    str | None,
    typer.Option(
        "--consistency",
        metavar="GOAL",
        help="application, filesystem or crash; a point worth less ends with exit code 3.",
    ),
]
Require = Annotated[
    bool | None,
    typer.Option(
        "--require/--no-require",
        help="Fail rather than make a point worth less than the goal; or take what can be had (default: its policy).",
        show_default=False,
    ),
]
Exclude = Annotated[list[str] | None, typer.Option("--exclude", metavar="TARGET", help="Leave this disk out (vdb).")]
VaultName = Annotated[str | None, typer.Option("--vault", metavar="NAME", help="Vault to write to.")]


@dataclass(frozen=True, slots=True)
class Asked:
    """What `backup run` was asked for."""

    machines: list[str]
    full: bool
    goal: str | None
    require: bool | None
    exclude: list[str]
    vault: str | None

    def arguments(self) -> list[str]:
        """The same as a command line."""
        options = ["--full"] if self.full else []
        options += [f"--consistency={self.goal}"] if self.goal else []
        options += [] if self.require is None else ["--require" if self.require else "--no-require"]
        options += [f"--vault={self.vault}"] if self.vault else []
        return [*options, *(f"--exclude={target}" for target in self.exclude), "--", *self.machines]


@dataclass(frozen=True, slots=True)
class Started:
    """Jobs that began, and machines whose job did not."""

    jobs: list[tuple[str, str]]
    """(job, machine as typed)"""
    refused: list[tuple[str, ErrorInfo]]
    """(machine as typed, why)"""


@command(app, "run")
def run_backup(
    session: Session,
    machines: Machines,
    full: Full = False,
    detach: Annotated[bool, typer.Option("--detach/--wait", help="Run in the background, or wait (default).")] = False,
    goal: Goal = None,
    require: Require = None,
    exclude: Exclude = None,
    vault: VaultName = None,
) -> int:
    """Back up machines: a full point first, only changed blocks after that."""
    asked = Asked(machines, full, goal, require, exclude or [], vault)
    consistency(goal)
    if detach:
        return _detach(session, asked)
    started = start(session, asked)
    for _, error in started.refused:
        session.out.error(error)
    codes = [error.exit_code for _, error in started.refused]
    watcher = follower(session.out, several=len(started.jobs) > 1)
    views = wait_for(session, [job for job, _ in started.jobs], watcher, cancel=True)
    return worst(codes + [show_result(session, view, goal) for view in views])


def start(session: Session, asked: Asked) -> Started:
    """Start a job per machine. A machine that is not known stops all before anything began (a mistyped name must
    not give half of what was asked for); one that is busy stops only itself."""
    from workers.contract.errors import StillframeError, UsageError

    service = session.service
    goal = consistency(asked.goal)
    if len(set(asked.machines)) < len(asked.machines):
        raise UsageError("a machine is named twice")
    if len(asked.machines) > 1:
        for machine in asked.machines:
            service.machine(machine)
    started = Started([], [])
    for machine in asked.machines:
        try:
            job = service.start_backup(
                machine, full=asked.full, goal=goal, require=asked.require, exclude=asked.exclude, vault=asked.vault
            )
        except StillframeError as error:
            started.refused.append((machine, error.info()))
        else:
            started.jobs.append((job, machine))
    return started


def show_result(session: Session, view: JobView, goal: str | None) -> int:
    """Show how a backup ended; its exit code."""
    out = session.out
    point = session.service.point(view.point) if view.point and view.error is None else None
    code = view.error.exit_code if view.error else _degraded(view, point, goal)
    out.record("backup", _result(view, point, code))
    if view.error is not None:
        if not out.as_json:
            named = view.error.model_copy(update={"message": f"{view.machine}: {view.error.message}"})
            out.error(named)
        return code
    if point is not None:
        show_point_made(session, point)
    for warning in view.warnings:
        out.note(f"warning: {view.machine}: {warning}")
    return code


def _result(view: JobView, point: PointView | None, code: int) -> dict[str, object]:
    shown = point.model_dump(mode="json") if point else {}
    return {
        **shown,
        "id": point.id if point else None,
        "point": point.id if point else None,
        "job": view.id,
        "machine": view.machine,
        "state": str(view.state),
        "error": view.error.model_dump(mode="json") if view.error else None,
        "warnings": list(view.warnings),
        "job_seconds": round((view.updated - view.created).total_seconds(), 3),
        "exit_code": code,
    }


def _degraded(view: JobView, point: PointView | None, goal: str | None) -> int:
    """3 if the point is worth less than was asked for in so many words, or if something has to be looked at."""
    if point is None:
        return OK
    wanted = consistency(goal) or view.goal
    if point.alerts or (wanted is not None and point.consistency.rank < wanted.rank):
        return DEGRADED
    return OK


def show_point_made(session: Session, point: PointView) -> None:
    """The new point, for people."""
    out = session.out
    frozen = f", frozen {point.frozen_ms} ms" if point.frozen_ms is not None else ""
    worth = f"{point.consistency.value}{frozen}"
    if point.consistency.rank < point.consistency_goal.rank:
        worth += f" ({point.consistency_reason})"
    out.say(f"{point.machine}  point {point.id[:8]}  {moment(point.time)}  {worth}")
    out.table(
        ("disk", "read", "new", "stored", "mode", "because"),
        [
            (disk.target, size(disk.read_bytes), size(disk.new_bytes), size(disk.stored_bytes), disk.mode, disk.reason)
            for disk in point.disks
        ],
        right=("read", "new", "stored"),
    )
    for left_out in point.not_included:
        out.say(f"not included: {left_out.target}: {left_out.reason}")
    for alert in point.alerts:
        out.note(f"alert: {alert}")


# --- in the background -----------------------------------------------------------------------------------------


def _detach(session: Session, asked: Asked) -> int:
    """Start a process that works on its own, and tell what it began."""
    from workers.contract.errors import ErrorInfo, StillframeError

    config = session.config
    config.state_dir.mkdir(parents=True, exist_ok=True)
    log = config.state_dir / "background.log"
    argv = [sys.executable, "-m", "orchestrator.cli.main", "--config", str(config.path), "--json", "job", "work"]
    with log.open("a") as errors:
        child = subprocess.Popen(
            [*argv, *asked.arguments()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            text=True,
        )
    assert child.stdout is not None
    with child.stdout:
        lines = [json.loads(line) for line in child.stdout]
    codes = [OK]
    for line in lines:
        if line.pop("type") == "started":
            session.out.record("started", line)
            session.out.say(f"{line['machine']}: job {line['job']}")
        else:
            error = ErrorInfo.model_validate(line)
            session.out.error(error)
            codes.append(error.exit_code)
    if not lines:
        raise StillframeError(f"the background process ended without a word (exit {child.wait()})", hint=f"less {log}")
    if not session.settings.json and len(codes) == 1:
        session.out.note("watch: stillframe job watch")
    return worst(codes)


def work(
    session: Session,
    machines: Machines,
    full: Full = False,
    goal: Goal = None,
    require: Require = None,
    exclude: Exclude = None,
    vault: VaultName = None,
) -> int:
    """The background side of `backup run --detach`: say on standard output what was begun, close it, and work."""
    started = start(session, Asked(machines, full, goal, require, exclude or [], vault))
    for job, machine in started.jobs:
        session.out.record("started", {"job": job, "machine": machine})
    for _, error in started.refused:
        session.out.error(error)
    sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    views = wait_for(session, [job for job, _ in started.jobs], follower(session.out), cancel=True)
    return worst(
        [error.exit_code for _, error in started.refused] + [show_result(session, view, goal) for view in views]
    )
