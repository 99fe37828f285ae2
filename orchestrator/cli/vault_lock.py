"""`stillframe vault lock` and `vault approve`: how long points cannot be deleted, and how two people shorten that."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import VaultArgument, command
from orchestrator.cli.output import is_terminal, moment
from orchestrator.cli.run import Session

if TYPE_CHECKING:
    from orchestrator.lock_desk import LockView


def register(app: typer.Typer) -> None:
    """Add both commands to the group of vaults."""
    command(app, "lock")(lock_vault)
    command(app, "approve")(approve_request)


def lock_vault(
    session: Session,
    vault: VaultArgument = None,
    days: Annotated[
        int | None, typer.Option("--days", metavar="N", min=0, help="Points cannot be deleted for N days.")
    ] = None,
    approvers: Annotated[
        bool, typer.Option("--approvers", help="Ask that the keys there are now may approve the next change.")
    ] = False,
    approval: Annotated[
        str | None, typer.Option("--approval", metavar="CODE", help="What `vault approve` gave another key holder.")
    ] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Renew the retention of what locked points need, as each sweep does.")
    ] = False,
) -> None:
    """Show, set or change for how long a vault's points cannot be deleted, by anybody."""
    from workers.contract.errors import UsageError

    if extend and (days is not None or approvers or approval):
        raise UsageError("--extend goes alone")
    if approvers and days is not None:
        raise UsageError("--days and --approvers exclude each other: one request is for one thing")
    if approval is not None and days is None and not approvers:
        raise UsageError("--approval is for a change", hint="repeat --days N, or --approvers, beside it")
    name = session.config.vault_name(vault)
    view = session.service.locks.show(name)
    wanted = view.days if approvers else days
    if extend:
        _extend(session, name)
    elif wanted is None:
        _show(session, view)
    elif approval is not None:
        _change(session, name, wanted, approval)
    elif approvers or wanted < view.days:
        _request(session, view, wanted)
    elif wanted == view.days:
        _show(session, view)
    else:
        _lengthen(session, view, wanted)


def _show(session: Session, view: LockView) -> None:
    session.out.record("lock", view.model_dump(mode="json"))
    for line in view.wrong:
        session.out.note(line)
    if not view.days:
        session.out.say(f"vault {view.vault} has no lock: `stillframe vault lock {view.vault} --days N` sets one")
        return
    session.out.say(f"points of vault {view.vault} cannot be deleted for {view.days} days after their time")
    session.out.say(f"may approve that it is shortened: {_slots(view.approvers, view.own)}")
    if view.new:
        session.out.say(f"may not: {_slots(view.new, view.own)}; `stillframe vault lock --approvers` asks for them")


def _slots(slots: list[str], own: list[str]) -> str:
    return ", ".join(f"slot {slot}{' (yours)' if slot in own else ''}" for slot in slots) or "nobody"


def _lengthen(session: Session, view: LockView, days: int) -> None:
    then = "You alone cannot undo this" if view.others or not view.days else "NOBODY can undo this"
    session.confirm(
        f"Lock every point that is made from now on in vault {view.vault} for {days} days? {then},"
        f" and space comes back only when points are free."
    )
    session.service.locks.lengthen(view.vault, days)
    now = session.service.locks.show(view.vault)
    if not now.others:
        session.out.note("no other key may approve a change: nobody can ever shorten this lock")
    _show(session, now)
    _extend(session, view.vault)


def _request(session: Session, view: LockView, days: int) -> None:
    asked = session.service.locks.request(view.vault, days)
    session.out.record("request", {"request": asked.text(), **asked.model_dump(mode="json")})
    what = f"--days {days}" if days != view.days else "--approvers"
    session.out.say(
        f"Another key holder must approve this, until {moment(asked.expires)}. Let them run, with their own key:\n\n"
        f"    stillframe vault approve {asked.text()} {view.vault}\n\nand then enter what they got:\n\n"
        f"    stillframe vault lock {view.vault} {what} --approval CODE"
    )


def _change(session: Session, name: str, days: int, approval: str) -> None:
    session.service.locks.change(name, days, approval)
    _show(session, session.service.locks.show(name))
    session.out.say("points that are locked already stay so until their own date")


def _extend(session: Session, name: str) -> None:
    if session.out.quiet or session.out.as_json or not is_terminal(sys.stderr):
        done = session.service.locks.extend(name, None)
    else:
        from rich.progress import Progress as Bars

        with Bars(console=session.out.console(stderr=True), transient=True) as bars:
            task = bars.add_task(f"vault {name}: retention", total=None)
            done = session.service.locks.extend(name, lambda at, total: bars.update(task, completed=at, total=total))
    session.out.record("extended", {"vault": name, **done.model_dump(mode="json")})
    if done.until is None:
        session.out.say(f"nothing in vault {name} is locked")
    else:
        session.out.say(f"retained until {moment(done.until)}: {done.objects} objects now, {done.covered} before")


def approve_request(
    session: Session,
    request: Annotated[str, typer.Argument(metavar="REQUEST", help="As `vault lock` printed it.")],
    vault: VaultArgument = None,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", metavar="FILE", help="Your key; default: the configured one.")
    ] = None,
    phrase_file: Annotated[
        Path | None,
        typer.Option("--phrase-file", metavar="FILE", help="Your passphrase, or the recovery phrase; mode 600."),
    ] = None,
) -> None:
    """Approve what another key holder asks for, with your own key; what it prints is for them to enter."""
    from workers.contract.errors import UsageError
    from workers.vault.approval import parse_request

    if key_file is not None and phrase_file is not None:
        raise UsageError("--key-file and --phrase-file exclude each other")
    name = session.config.vault_name(vault)
    asked = parse_request(request)
    what = (
        f"shorten the lock from {asked.days_before} to {asked.days} days"
        if asked.days != asked.days_before
        else "change who may approve"
    )
    may = ", ".join(asked.approvers)
    session.confirm(f"{asked.by} asks to {what} (vault {name}). After it these slots may approve: {may}. Approve?")
    code = session.peek().locks.approve(
        name, asked, key_file and key_file.expanduser(), phrase_file and phrase_file.expanduser()
    )
    session.out.record("approval", {"vault": name, "approval": code})
    session.out.say(f"Give this to {asked.by}:\n\n    {code}")
