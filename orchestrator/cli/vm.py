"""`stillframe vm`: the machines that the configured hypervisors have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.extension import Vm, show_state
from orchestrator.cli.options import command, group
from orchestrator.cli.output import moment, size
from orchestrator.cli.run import OK, Session

if TYPE_CHECKING:
    from orchestrator.views import MachineView

app = group("Machines on the hypervisors.")


@command(app, "list")
def list_machines(
    session: Session,
    hypervisor: Annotated[str | None, typer.Option("--hypervisor", metavar="NAME", help="Only this one's.")] = None,
    refresh: Annotated[
        bool | None,
        typer.Option(
            "--refresh/--cached",
            help="Ask the hypervisors now, or show what they last said.",
            show_default="ask, unless workers elsewhere keep it up to date",
        ),
    ] = None,
) -> int:
    """List machines with their disks and last point."""
    found = session.service.look_at_machines(hypervisor, ask=refresh)
    for error in found.silent.values():
        # The machines of the others are worth showing all the same.
        session.out.error(error)
    for machine in found.machines:
        session.out.record("machine", machine.model_dump(mode="json"))
    code = max((error.exit_code for error in found.silent.values()), default=OK)
    if not found.machines:
        if code == OK:
            session.out.say("No machines.")
        return code
    columns = ["name", "hypervisor", "power", "disks", "size", "last point", "consistency"]
    tagged = any(machine.tags for machine in found.machines)
    session.out.table(
        [*columns, "tags"] if tagged else columns,
        [_row(machine)[: None if tagged else -1] for machine in found.machines],
        right=("size",),
    )
    for name in sorted({machine.hypervisor for machine in found.machines if machine.stale}):
        as_of = next(machine.as_of for machine in found.machines if machine.hypervisor == name)
        session.out.note(f"{name} does not answer: its machines are shown as they were at {moment(as_of)}")
    return code


def _row(machine: MachineView) -> tuple[str, ...]:
    included = [disk for disk in machine.disks if not disk.excluded]
    last = machine.last_point
    return (
        machine.name,
        machine.hypervisor,
        f"{machine.power}?" if machine.stale else machine.power,
        " ".join(disk.target for disk in included) or "–",
        size(sum(disk.capacity for disk in included)),
        moment(last.time) if last else "never",
        last.consistency if last else "",
        " ".join(machine.tags),
    )


@command(app, "show")
def show_machine(session: Session, vm: Vm) -> None:
    """Show one machine, its disks, and the extension in its guest as the last backup found it."""
    machine = session.service.machine(vm)
    out = session.out
    out.record("machine", machine.model_dump(mode="json"))
    out.say(f"{machine.name}  {machine.power} on {machine.hypervisor}  {machine.uuid}")
    last = machine.last_point
    out.say(
        f"last point {last.id[:8]}  {moment(last.time)}  {last.consistency}"
        if last
        else f"no point yet: stillframe backup run {machine.name}"
    )
    if machine.tags:
        out.say(f"tags {' '.join(machine.tags)}")
    show_state(out, machine.extension)
    out.table(
        ("disk", "format", "size", "source", "included"),
        [
            (disk.target, disk.format, size(disk.capacity), disk.source or "–", disk.excluded or "yes")
            for disk in machine.disks
        ],
        right=("size",),
    )
