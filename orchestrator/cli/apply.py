"""`stillframe policy apply`: shows what a configuration changes for whom, asks, and puts it in force."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import command
from orchestrator.cli.output import moment
from orchestrator.cli.run import Session

if TYPE_CHECKING:
    from orchestrator.apply_plan import Change, Plan
    from orchestrator.config_edit import Edit

SHOWN = 25
"""Machines of each kind that are shown; -v shows all."""

File = Annotated[
    Path | None,
    typer.Argument(metavar="FILE", help="A new configuration to take the place of the one in use; default: that one."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what would change.")]


def register(app: typer.Typer) -> None:
    command(app, "apply")(apply)


def apply(session: Session, file: File = None, dry_run: DryRun = False) -> None:
    """Show what changes for which machine, ask, and put it in force."""
    from datetime import UTC, datetime

    edit = _replacement(session, file) if file is not None else None
    service = session.service
    if service.config.worker.hypervisors:
        for error in service.look_at_machines().silent.values():
            session.out.error(error)
    plan = service.schedules.plan(datetime.now(UTC), edit.config if edit else None)
    _show(session, plan, dry_run=dry_run or not (plan.changes or edit))
    if dry_run or not (plan.changes or edit):
        return
    session.confirm(f"Put that in force{f', and write it into {edit.file}' if edit else ''}?")
    service.audit.note("policy.apply", str(edit.file if edit else session.config.path), f"{len(plan.changes)} machines")
    if edit is not None:
        edit.write()
    if edit is not None and service.schedules.leader():
        session.out.say(f"{edit.file} is written; the controller that runs takes it up in a few seconds")
        return
    service.schedules.put_in_force(plan.decisions)
    session.out.say(f"in force for {len(plan.changes)} machines")


def _replacement(session: Session, file: Path) -> Edit:
    from orchestrator.config_edit import replacement
    from workers.contract.errors import ConfigError

    try:
        text = file.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is not UTF-8 text") from None
    return replacement(session.config, text, shown=file)


def _show(session: Session, plan: Plan, *, dry_run: bool) -> None:
    from orchestrator.apply_plan import Kind

    out = session.out
    for change in plan.changes:
        out.record("change", _record(change))
    figures = {kind.value: sum(1 for one in plan.changes if one.kind is kind) for kind in Kind}
    rest = {"unchanged": plan.unchanged, "not_protected": plan.unprotected, "away": plan.away}
    out.record("plan", {"dry_run": dry_run, **figures, **rest})
    if plan.changes:
        rows, hidden = [], 0
        for kind in Kind:
            found = [one for one in plan.changes if one.kind is kind]
            shown = found if out.verbose else found[:SHOWN]
            hidden += len(found) - len(shown)
            rows += [_row(one) for one in shown]
        out.table(("change", "machine", "hypervisor", "what", "next backup"), rows)
        if hidden:
            out.say(f"… and {hidden} more: -v shows them")
    changed = ", ".join(f"{count} {kind}" for kind, count in figures.items() if count) or "nothing changes"
    out.say(f"{changed}; {plan.unchanged} protected as before, {plan.unprotected} not protected, {plan.away} away")


def _row(change: Change) -> tuple[str, ...]:
    from orchestrator.apply_plan import Kind

    if change.kind is Kind.UNPROTECTED:
        what = ", ".join(f"{one.field} {one.before}" for one in change.differences if one.field in ("policy", "vault"))
    elif change.kind is Kind.PROTECTED:
        what = ", ".join(f"{one.field} {one.after}" for one in change.differences if one.field in ("policy", "vault"))
    else:
        fields = {one.field for one in change.differences}
        told = [one for one in change.differences if one.field != "schedule" or "policy" not in fields]
        what = ", ".join(f"{one.field} {one.before or 'none'} → {one.after or 'none'}" for one in told)
    next_run = moment(change.next) if change.next else "none"
    return change.kind.value, change.machine.name, change.machine.hypervisor, what, next_run


def _record(change: Change) -> dict[str, object]:
    return {
        "change": change.kind.value,
        "machine": change.machine.name,
        "uuid": change.machine.uuid,
        "hypervisor": change.machine.hypervisor,
        "differences": [{"field": d.field, "before": d.before, "after": d.after} for d in change.differences],
        "next": change.next.isoformat() if change.next else None,
    }
