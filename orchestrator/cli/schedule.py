"""`stillframe schedule`: what begins next by itself, and what does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import command, group
from orchestrator.cli.output import moment
from orchestrator.cli.run import Session

if TYPE_CHECKING:
    from orchestrator.schedule_desk import NotComing
    from orchestrator.scheduler import Coming

app = group("Schedules: what begins by itself.")

Vm = Annotated[str | None, typer.Argument(metavar="VM", help="Only this machine; by name or UUID.")]
_NAMES = 8
"""So many machines of one reason are named."""


@command(app, "show")
def show_schedule(
    session: Session,
    vm: Vm = None,
    count: Annotated[
        int, typer.Option("--count", metavar="N", min=1, max=1_000_000, help="So many backups.", show_default=False)
    ] = 25,
) -> None:
    """Show the next backups of a machine, or the next one of each, with why; and those that have none coming."""
    from datetime import UTC, datetime
    from itertools import islice

    desk = session.peek().schedules
    now = datetime.now(UTC)
    found, left = desk.agenda(now, vm)
    coming = list(islice(found, count))
    more = sum(1 for _ in found) if vm is None else 0
    for one in coming:
        session.out.record("run", _record(one))
    for other in left:
        session.out.record("no_run", _no_record(other))
    if coming:
        session.out.table(
            ("begins", "machine", "hypervisor", "section", "policy", "vault", "because"),
            [
                (
                    moment(one.at) if one.at > now else f"due {moment(one.at)}",
                    one.machine.name,
                    one.machine.hypervisor,
                    one.section.name,
                    one.section.policy_name,
                    one.section.vault,
                    one.why,
                )
                for one in coming
            ],
        )
    if more:
        session.out.say(f"… and {more} more: --count {len(coming) + more} shows them")
    if not (coming or left):
        session.out.say("No machine is known yet: stillframe vm list asks the hypervisors.")
    for line in _reasons(left):
        session.out.say(line)
    if coming and not desk.leader():
        session.out.note("nothing begins by itself now: no controller runs (stillframe serve)")


def _reasons(left: list[NotComing]) -> list[str]:
    """One line for each reason, with the machines that it is for."""
    found: dict[str, list[str]] = {}
    for one in left:
        found.setdefault(one.why, []).append(one.machine.name)
    lines = []
    for why, names in found.items():
        more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
        lines.append(f"not: {', '.join(sorted(names)[:_NAMES])}{more}: {why}")
    return lines


def _record(one: Coming) -> dict[str, object]:
    return {
        "machine": one.machine.name,
        "uuid": one.machine.uuid,
        "hypervisor": one.machine.hypervisor,
        "section": one.section.name,
        "policy": one.section.policy_name,
        "vault": one.section.vault,
        "begins": one.at.isoformat(),
        "due": one.due.isoformat(),
        "why": one.why,
    }


def _no_record(one: NotComing) -> dict[str, object]:
    machine = one.machine
    return {
        "machine": machine.name,
        "uuid": machine.uuid,
        "hypervisor": machine.hypervisor,
        "section": one.section,
        "why": one.why,
    }
