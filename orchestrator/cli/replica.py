"""`stillframe vault replicate` and `vault mirror-sync`: the second copy of what a vault holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import command
from orchestrator.cli.output import size
from orchestrator.cli.run import DEGRADED, OK, Session, worst
from orchestrator.cli.sweep import VaultArgument, bytes_a_second
from orchestrator.cli.verify import advancing

if TYPE_CHECKING:
    from orchestrator.replica_desk import MirrorState
    from workers.vault.mirror_sync import SyncReport
    from workers.vault.replicate import ReplicaReport


def register(app: typer.Typer) -> None:
    command(app, "replicate")(replicate_vault)
    command(app, "mirror-sync")(sync_mirrors)


def replicate_vault(
    session: Session,
    vault: VaultArgument = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="NAME", help="Only this replica; default: all of the vault's.")
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Copy no more than this a second: 20MiB for example.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be copied, and what go.")] = False,
) -> int:
    """Copy to a vault's replicas what they lack; what the vault no longer has goes there after a delay.

    Needs no key. With --yes, even more than half of a replica's points may go at once.
    """
    desk = session.service.replicas
    source, targets = desk.targets(vault, to)
    codes = []
    for target in targets:
        with advancing(session, f"{source} → {target}") as advance:
            report = desk.replicate(
                source,
                target,
                bandwidth=bytes_a_second(bandwidth),
                force=session.settings.yes,
                dry_run=dry_run,
                on_progress=advance,
            )
        codes.append(DEGRADED if report.not_copied or report.held_back or report.kept else OK)
        shown = {"vault": source, "to": target, "dry_run": dry_run, **report.model_dump(mode="json")}
        session.out.record("replica", {**shown, "exit_code": codes[-1]})
        for line in _lines(target, report, dry_run=dry_run):
            session.out.say(line)
    return worst(codes)


def _lines(target: str, report: ReplicaReport, *, dry_run: bool) -> list[str]:
    would = "would be " if dry_run else ""
    lines = [f"{target}: {report.points} new points, {size(report.bytes)} {would}copied"]
    if report.noted:
        lines.append(f"{target}: {report.noted} objects are gone from the vault since the last time, and go here later")
    if report.removed:
        lines.append(f"{target}: {report.removed_points} points and what only they need {would}removed: they are due")
    if report.kept:
        lines.append(
            f"{target}: {report.kept} packs are kept that the vault has lost, or that no backup completed: "
            "stillframe vault verify"
        )
    if report.held_back:
        lines.append(f"{target}: nothing more is removed: {report.held_back}")
    lines += [f"{target}: not copied: {one.problem}" for one in report.not_copied]
    return lines


def sync_mirrors(
    session: Session,
    vault: VaultArgument = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell how far the stores are apart.")] = False,
) -> int:
    """Make a new, replaced or outdated mirror of a vault like the first of its stores that holds it.

    Until then nothing is written to the vault. If the first is the one that is out of date, name the other first.
    """
    desk = session.service.replicas
    name = session.config.vault_name(vault)
    states = desk.mirrors(name)
    for state in states:
        session.out.record("mirror", {"vault": name, "dry_run": dry_run, **state.model_dump(mode="json")})
        if question := _question(name, state):
            session.out.note(question)
            if not dry_run:
                session.confirm("Go on?")
    if dry_run:
        if not any(_question(name, state) for state in states):
            session.out.say(f"{len(states)} mirror{'' if len(states) == 1 else 's'} of vault {name}: none is outdated")
        return OK
    with advancing(session, f"mirrors of {name}") as advance:
        reports = desk.sync_mirrors(name, states, advance)
    for report in reports:
        session.out.record("mirror_sync", {"vault": name, **report.model_dump(mode="json")})
        for line in _synced(report):
            session.out.say(line)
    return DEGRADED if any(report.not_copied for report in reports) else OK


def _question(name: str, state: MirrorState) -> str:
    if state.new:
        return f"{state.url} holds nothing yet: all of vault {name} is copied to it"
    if state.outdated:
        points = sum(1 for one in state.outdated if one.startswith("points/"))
        return f"{state.url} has {len(state.outdated)} objects, {points} points among them, that vault {name} has not"
    return ""


def _synced(report: SyncReport) -> list[str]:
    removed = f", {report.removed} removed" if report.removed else ""
    lines = [f"{report.place}: {report.objects} objects, {size(report.bytes)} copied{removed}"]
    return lines + [f"{report.place}: not copied: {one.problem}" for one in report.not_copied]
