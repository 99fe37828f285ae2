"""`stillframe notify`: whether somebody would be told."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from orchestrator.cli.options import command, group
from orchestrator.cli.run import FAILED, OK, Session

app = group("Who is told of alerts.")


@command(app, "test")
def try_targets(
    session: Session,
    target: Annotated[
        str | None, typer.Argument(metavar="TARGET", help="email, or webhook:NAME; default: all that are configured.")
    ] = None,
) -> int:
    """Send an example to whoever is told of alerts. Fails if one of them does not take it."""
    results = session.service.notify.test(target, datetime.now(UTC))
    for name, problem, remark in results:
        session.out.record("notified", {"target": name, "ok": not problem, "problem": problem, "remark": remark})
        words = problem or ("sent" + (f", but {remark}" if remark else ""))
        session.out.say(f"{name}: {words}", label="FAIL" if problem else "WARN" if remark else "OK")
        if problem and remark:
            session.out.say(f"      try: {remark}")
    return FAILED if any(problem for _, problem, _ in results) else OK
