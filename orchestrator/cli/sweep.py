"""`stillframe vault sweep`: the space of what no point needs comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import command
from orchestrator.cli.output import moment, size
from orchestrator.cli.run import Session
from orchestrator.cli.verify import advancing

if TYPE_CHECKING:
    from workers.vault.sweep import SweepReport

VaultArgument = Annotated[
    str | None, typer.Argument(metavar="VAULT", help="Name in the configuration; default: the default vault.")
]


def register(app: typer.Typer) -> None:
    command(app, "sweep")(sweep_vault)


def sweep_vault(
    session: Session,
    vault: VaultArgument = None,
    empty: Annotated[bool, typer.Option("--empty", help="Also if no point is left: everything goes.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go, and why.")] = False,
    no_expire: Annotated[
        bool, typer.Option("--no-expire", help="Leave points alone that no rule of a policy keeps.")
    ] = False,
    no_compact: Annotated[
        bool, typer.Option("--no-compact", help="Leave packs alone of which a part is needed.")
    ] = False,
    bandwidth: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Copy no more than this a second: 20MiB for example.")
    ] = None,
    fence_days: Annotated[
        int | None,
        typer.Option(metavar="DAYS", min=0, help="Take sessions that began longer ago for dead; default: 7."),
    ] = None,
) -> None:
    """Give back the space of what no point needs. Backups may run meanwhile, here or elsewhere."""
    name = session.config.vault_name(vault)
    if not no_expire:
        _expire(session, name, dry_run=dry_run)
    with advancing(session, f"vault {name}") as advance:
        report = session.service.upkeep.sweep(
            name,
            compact=not no_compact,
            bandwidth=bytes_a_second(bandwidth),
            fence_days=fence_days,
            empty=empty,
            dry_run=dry_run,
            on_progress=advance,
        )
    session.out.record("sweep", {"vault": name, **report.model_dump(mode="json")})
    for line in [*_lines(report), *session.service.point_desk.forget(report.gone)]:
        session.out.say(line)


def _expire(session: Session, vault: str, *, dry_run: bool) -> None:
    """What `policy expire` does, for this vault. A clock that is wrong does not keep a sweep from the rest."""
    from workers.contract.errors import WrongClock

    try:
        gone = [view for view in session.service.point_desk.expire(vault, dry_run=dry_run) if not view.keep]
    except WrongClock as error:
        session.out.note(f"nothing expires: {error}")
        return
    for view in gone:
        session.out.record("expiry", {"dry_run": dry_run, **view.model_dump(mode="json")})
    if gone:
        verb, plural = "would expire" if dry_run else "expired", "" if len(gone) == 1 else "s"
        which = _ids([view.point for view in gone])
        session.out.say(f"{verb:<9} {len(gone)} point{plural} that no rule of a policy keeps: {which}")


def bytes_a_second(words: str | None) -> int | None:
    """What `--bandwidth` says. Raises UsageError."""
    from orchestrator.config_values import parse_size
    from workers.contract.errors import UsageError

    try:
        return None if words is None else parse_size(words)
    except ValueError as error:
        raise UsageError(f"--bandwidth: {error}") from None


def _packs(count: int) -> str:
    return f"{count} pack{'' if count == 1 else 's'}"


def _ids(points: list[str]) -> str:
    more = f" and {len(points) - 5} more" if len(points) > 5 else ""
    return ", ".join(point[:8] for point in points[:5]) + more


def _lines(report: SweepReport) -> list[str]:
    """What happened, in the order in which it did; nothing is said of what did not."""
    would = report.dry_run
    share = f", {report.live_bytes / report.bytes:.0%} of it needed" if report.bytes else ""
    lines = [f"{_packs(report.packs)} of {size(report.bytes)}{share}"]
    if report.no_points:
        lines.append("there is no point at all, so nothing was condemned: is points/ of the vault there? If all were")
        lines.append("deleted on purpose: stillframe vault sweep --empty")
    if report.clock:
        lines.append(report.clock)
    if report.final:
        verb, plural = "would become" if would else "became", "" if len(report.final) == 1 else "s"
        lines.append(f"deleted   {len(report.final)} point{plural}, whose deletion {verb} final: {_ids(report.final)}")
    lines += [f"waiting   point {one.point[:8]}, deleted: {one.waits}" for one in report.gone if one.waits]
    lines += [f"fenced    session {session}: it began too long ago to be alive" for session in report.fenced]
    if report.compacted:
        verb = "would copy" if would else "copied"
        lines.append(
            f"compacted {_packs(report.compacted)} of which a part is dead: {verb} {size(report.copied_bytes)}"
        )
    if report.skipped:
        lines.append(f"skipped   {_packs(report.skipped)} with damaged blocks (stillframe vault verify --full)")
    if report.condemned:
        verb = "would condemn" if would else "condemned"
        lines.append(f"{verb} {_packs(report.condemned)} of {size(report.condemned_bytes)}: no point needs them")
    if report.removed:
        lines.append(f"removed   {_packs(report.removed)} of {size(report.removed_bytes)}")
    if report.rescued:
        lines.append(f"kept      {report.rescued} condemned that are needed after all")
    if report.retained:
        lines.append(f"retained  {_packs(report.retained)} that nobody needs, until their lock ends")
    for wait in report.waiting:
        names = ", ".join(f"{one.session} on {one.host or '?'} since {moment(one.started)}" for one in wait.sessions)
        lines.append(f"waiting   {_packs(wait.packs)} of {size(wait.bytes)}, for: {names}")
        lines.append("          sweep again when they have ended")
    return lines if len(lines) > 1 else [f"{lines[0]}: nothing to give back"]
