"""`stillframe vm protect` and `unprotect`: a machine into the configuration, and out of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.extension import DryRun, Vm
from orchestrator.cli.options import command
from orchestrator.cli.output import moment
from orchestrator.cli.run import Session

if TYPE_CHECKING:
    from orchestrator.config_edit import Edit, Subject
    from orchestrator.scheduler import Machine


def register(app: typer.Typer) -> None:
    command(app, "protect")(protect)
    command(app, "unprotect")(unprotect)


def protect(
    session: Session,
    vm: Vm,
    policy: Annotated[str, typer.Option("--policy", metavar="POLICY", help="Name in the configuration.")],
    vault: Annotated[str | None, typer.Option("--vault", metavar="NAME", help="Default: the default vault.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Write a machine into the configuration, so that a policy backs it up. Comments and layout stay."""
    from orchestrator import config_edit

    machine = _machine(session, vm)
    edit = config_edit.protect(session.config, _subject(session, machine), policy, vault)
    _show(session, machine, edit, dry_run=dry_run)
    if edit.diff and not dry_run:
        session.service.audit.note("config.protect", machine.name, f"policy {policy}")
        edit.write()
    if dry_run:
        return
    done = "is protected" if edit.diff else "was protected so before"
    session.out.say(f"{machine.name} {done} by policy {policy}{_next(session, machine, edit)}")


def unprotect(
    session: Session,
    vm: Vm,
    dry_run: DryRun = False,
    keep_extension: Annotated[
        bool, typer.Option("--keep-extension", help="Leave the extension in the guest alone.")
    ] = False,
) -> None:
    """Take a machine out of the configuration, and the extension out of its guest. Points stay."""
    from orchestrator import config_edit
    from workers.contract.errors import StillframeError

    machine = _machine(session, vm)
    edit = config_edit.unprotect(session.config, _subject(session, machine))
    _show(session, machine, edit, dry_run=dry_run)
    record: dict[str, object] = {"dry_run": dry_run, "machine": machine.name, "uuid": machine.uuid, "removed": False}
    if not edit.diff:
        session.out.say(f"no [protect.*] section of {edit.file} covers {machine.name}")
    if dry_run:
        if not keep_extension:
            session.out.record("uninstalled", record)
            session.out.say(f"would take the extension out of {machine.name}")
        return
    whole = "" if keep_extension else f" and take the extension out of {machine.name}"
    session.confirm(f"Write that{whole}?" if edit.diff else f"Take the extension out of {machine.name}?")
    if edit.diff:
        session.service.audit.note("config.unprotect", machine.name)
    edit.write()
    if edit.diff:
        session.out.say(f"{machine.name} is no longer protected; its points stay")
    if keep_extension:
        return
    try:
        record["removed"] = session.service.guests.uninstall(machine.uuid)
    except StillframeError as error:
        session.out.record("uninstalled", {**record, "why": str(error)})
        session.out.note(f"the extension stays in {machine.name}: {error}")
        return
    session.out.record("uninstalled", record)
    state = "the extension is uninstalled" if record["removed"] else "there was no extension in it"
    session.out.say(f"{machine.name}: {state}")


def _machine(session: Session, wanted: str) -> Machine:
    """As its hypervisor has it, or last had it, if that does not answer. Raises NotFound, UsageError."""
    for error in session.service.look_at_machines().silent.values():
        session.out.note(f"{error.message}; its machines are taken as it last had them")
    return session.service.schedules.find(wanted)


def _subject(session: Session, machine: Machine) -> Subject:
    from orchestrator.config_edit import Subject

    same = [one for one in session.service.schedules.standing().machines if one.name == machine.name]
    alone = all(one.uuid == machine.uuid for one in same)
    return Subject(machine.hypervisor, machine.name, machine.tags, alone=alone)


def _show(session: Session, machine: Machine, edit: Edit, *, dry_run: bool) -> None:
    covering = edit.config.protections(machine.hypervisor, machine.name, machine.tags)
    session.out.record(
        "protection",
        {
            "dry_run": dry_run,
            "machine": machine.name,
            "uuid": machine.uuid,
            "file": str(edit.file),
            "sections": covering,
            "diff": edit.diff,
        },
    )
    for line in edit.diff.splitlines():
        session.out.say(line)


def _next(session: Session, machine: Machine, edit: Edit) -> str:
    from datetime import UTC, datetime

    found = session.service.schedules.next_runs(datetime.now(UTC), edit.config).get(machine.uuid)
    return f"; its next backup begins {moment(found)}" if found else ""
