"""`stillframe alert`: what stands, what stood, and who sees to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import command, group
from orchestrator.cli.output import moment
from orchestrator.cli.run import Session

if TYPE_CHECKING:
    from orchestrator.status_desk import AlertView

app = group("Alerts: what stands, what stood, who sees to it.")

AlertId = Annotated[int, typer.Argument(metavar="ALERT", help="Its number, as `alert list` shows it.", min=1)]


@command(app, "list")
def list_alerts(
    session: Session,
    all: Annotated[bool, typer.Option("--all", help="Also those that have passed, newest first.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="With --all: at most so many.")] = 50,
) -> None:
    """List alerts that stand, worst first."""
    alerts = session.service.status.alerts(all=all, limit=limit)
    for alert in alerts:
        session.out.record("alert", alert.model_dump(mode="json"))
    if not alerts:
        session.out.say("No alert yet." if all else "No alert stands.")
        return
    session.out.table(
        ("alert", "severity", "subject", "since", "times", "text"),
        [_row(alert) for alert in alerts],
        right=("alert", "times"),
    )


def _row(alert: AlertView) -> tuple[str, ...]:
    state = "passed" if alert.resolved else "seen" if alert.acknowledged else alert.severity.value
    text = f"{alert.ending}; was: {alert.text}" if alert.resolved and alert.ending else alert.text
    return (str(alert.id), state, alert.subject, moment(alert.first), str(alert.count), " ".join(text.split())[:200])


@command(app, "show")
def show_alert(session: Session, alert: AlertId) -> None:
    """Show one alert, whole."""
    _show(session, session.service.status.alert(alert))


@command(app, "acknowledge")
def acknowledge_alert(session: Session, alert: AlertId) -> None:
    """You have seen it and will see to it: `status` counts it no more, until it becomes worse."""
    from orchestrator.actor import whoami

    _show(session, session.service.status.acknowledge(alert, whoami()))


def _show(session: Session, view: AlertView) -> None:
    out = session.out
    out.record("alert", view.model_dump(mode="json"))
    out.say(f"{view.severity.value.upper()}  {view.subject}: {view.text}")
    out.say(f"key           {view.key}")
    out.say(f"since         {moment(view.first)}, last {moment(view.last)}, {view.count} times")
    out.say(f"sent out      {moment(view.told) if view.told else 'not yet'}")
    if view.acknowledged:
        out.say(f"acknowledged  by {view.acknowledged}")
    if view.resolved:
        out.say(f"passed        {moment(view.resolved)}{f': {view.ending}' if view.ending else ''}")
    if view.hint and not view.resolved:
        out.say(f"try           {view.hint}")
