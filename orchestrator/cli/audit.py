"""`stillframe audit`: who did what. The log only grows."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.options import command, group
from orchestrator.cli.output import moment
from orchestrator.cli.run import Session

app = group("The audit log: who did what.")


@command(app, "list")
def list_audit(
    session: Session,
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many, the newest.")] = 50,
    action: Annotated[
        str | None, typer.Option("--action", metavar="WORD", help="Only those that begin so: point, backup.run.")
    ] = None,
    actor: Annotated[str | None, typer.Option("--actor", metavar="NAME", help="Only of who is named so.")] = None,
) -> None:
    """List what was done to jobs, points and vaults, and by whom; newest last."""
    entries = session.peek().audit.recent(limit, action=action or "", actor=actor or "")[::-1]
    for entry in entries:
        session.out.record("audit", entry.model_dump(mode="json"))
    if not entries:
        session.out.say("Nothing is in the audit log.")
        return
    session.out.table(
        ("time", "who", "what", "subject", "detail"),
        [(moment(one.time), one.actor, one.action, one.subject, one.detail) for one in entries],
    )
