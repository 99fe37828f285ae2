"""`stillframe job`: what runs, what ran, and how to follow or end it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import backup
from orchestrator.cli.follow import disk_line, follower, wait_for
from orchestrator.cli.options import command, group
from orchestrator.cli.output import duration, moment
from orchestrator.cli.run import Session

if TYPE_CHECKING:
    from orchestrator.views import JobView

app = group("Jobs: list, watch, cancel.")
command(app, "work", hidden=True)(backup.work)

JobRef = Annotated[str, typer.Argument(metavar="JOB", help="Id, or its first characters.")]


@command(app, "list")
def list_jobs(
    session: Session,
    active: Annotated[bool, typer.Option("--active", help="Only those that run.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many, the newest.")] = 20,
) -> None:
    """List jobs, newest last."""
    jobs = session.service.jobs(active_only=active, limit=limit)[::-1]
    for view in jobs:
        session.out.record("job", view.model_dump(mode="json"))
    if not jobs:
        session.out.say("No job runs." if active else "No jobs yet.")
        return
    session.out.table(
        ("job", "kind", "machine", "state", "begun", "took", "result"), [_row(view) for view in jobs], right=("took",)
    )


def _row(view: JobView) -> tuple[str, ...]:
    result = view.error.message.partition("\n")[0] if view.error else f"point {view.point[:8]}" if view.point else ""
    result = view.waits or result or "; ".join(view.result.get("lines", []))
    took = duration((view.updated - view.created).total_seconds())
    return (view.id, view.kind, view.machine, view.state.value, moment(view.created), took, result)


@command(app, "show")
def show_job(session: Session, job: JobRef) -> None:
    """Show one job and everything that happened in it."""
    view = session.service.job(job)
    out = session.out
    out.record("job", view.model_dump(mode="json"))
    waits = f": {view.waits}" if view.waits else ""
    out.say(f"job {view.id}  {view.kind} of {view.machine}: {view.state.value}{waits}")
    for disk in view.disks:
        why = f": {disk['mode']}, because {disk['reason']}" if "mode" in disk else ""
        out.say(f"  {disk['target']}{why}")
    for progress in view.progress:
        out.say(f"  {disk_line(progress)}")
    for event in view.events:
        out.say(f"  {moment(event.time)}  {event.kind:<16} {event.text}".rstrip())
    for line in view.result.get("lines", []):
        out.say(f"  {line}")
    if view.guest is not None and view.guest.log:
        out.say("  from the scripts in the guest:")
        for line in view.guest.log.splitlines():
            out.say(f"    {line}")
    for warning in view.warnings:
        out.say(f"warning: {warning}")
    if view.error is not None and not out.as_json:
        out.error(view.error)


@command(app, "watch")
def watch_job(
    session: Session, job: Annotated[str | None, typer.Argument(metavar="JOB", help="Default: all that run.")] = None
) -> int:
    """Follow a job to its end. An interruption ends the watching, not the job."""
    service = session.service
    jobs = [service.job(job)] if job else service.jobs(active_only=True)
    if not jobs:
        session.out.say("No job runs.")
    watcher = follower(session.out, several=len(jobs) > 1, json_progress=True)
    ended = wait_for(session, [view.id for view in jobs], watcher, cancel=False)
    for view in ended:
        session.out.record("job", view.model_dump(mode="json"))
        if view.error is None:
            session.out.say(f"{view.machine}: {view.state.value}{f', point {view.point[:8]}' if view.point else ''}")
        elif not session.out.as_json:
            session.out.error(view.error)
    return max((view.error.exit_code for view in ended if view.error), default=0)


@command(app, "cancel")
def cancel_job(session: Session, job: JobRef) -> None:
    """End a job: what it holds is released, what it wrote is forgotten."""
    service = session.service
    view = service.job(job)
    service.cancel(view.id)
    session.out.record("cancelled", {"job": view.id, "machine": view.machine})
    session.out.say(f"asked job {view.id} of {view.machine} to end; follow it with: stillframe job watch {view.id}")
