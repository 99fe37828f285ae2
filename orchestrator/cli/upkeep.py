"""`stillframe upkeep`: what is done to vaults by the clock, and how to do it now."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from orchestrator.cli.follow import follower, wait_for
from orchestrator.cli.options import VaultArgument, command, group
from orchestrator.cli.output import moment
from orchestrator.cli.run import DEGRADED, OK, Session

app = group("Upkeep of vaults: sweep, verify, replicate, lock.")


@command(app, "list")
def list_upkeep(session: Session) -> None:
    """List what is done to each vault, and when next. A controller does it (`stillframe serve`)."""
    views = session.service.upkeep_jobs.views(datetime.now(UTC))
    for view in views:
        session.out.record("upkeep", view.model_dump(mode="json"))
    if not views:
        session.out.say("No vault is configured.")
        return
    session.out.table(
        ("vault", "upkeep", "schedule", "next", "last turn"),
        [(one.vault, one.what, one.schedule, moment(one.next), one.outcome or "–") for one in views],
    )


@command(app, "run")
def run_upkeep(
    session: Session,
    kind: Annotated[str, typer.Argument(metavar="KIND", help="sweep, verify, replicate or lock.")],
    vault: VaultArgument = None,
) -> int:
    """Do now what is otherwise done by the clock, as a job of this process."""
    job = session.service.upkeep_jobs.start(kind, vault)
    [view] = wait_for(session, [job], follower(session.out), cancel=True)
    session.out.record("job", view.model_dump(mode="json"))
    for line in view.result.get("lines", []):
        session.out.say(line)
    for warning in view.warnings:
        session.out.note(f"warning: {warning}")
    if view.error is not None:
        session.out.error(view.error)
        return view.error.exit_code
    return DEGRADED if view.warnings else OK
