"""`stillframe vault verify` and `vault repair`: whether a vault can be trusted, and what to do if not."""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import command
from orchestrator.cli.run import DEGRADED, FAILED, OK, Session
from orchestrator.cli.verify import advancing, level_of, needed_by, show_report

if TYPE_CHECKING:
    from orchestrator.cli.verify import Advance
    from workers.vault.findings import Level, Share, VerifyReport
    from workers.vault.repair import RepairReport

VaultArgument = Annotated[
    str | None, typer.Argument(metavar="VAULT", help="Name in the configuration; default: the default vault.")
]


def register(app: typer.Typer) -> None:
    command(app, "verify")(verify_vault)
    command(app, "repair")(repair_vault)


def verify_vault(
    session: Session,
    vault: VaultArgument = None,
    ids: Annotated[bool, typer.Option("--ids", help="Every block of every point is in the index.")] = False,
    packs: Annotated[bool, typer.Option("--packs", help="Every pack's SHA-256; needs no key.")] = False,
    sample: Annotated[bool, typer.Option("--sample", help="Ids, and a sample of blocks read (the default).")] = False,
    full: Annotated[bool, typer.Option("--full", help="Ids, and every block read, decrypted and hashed.")] = False,
    share: Annotated[
        str | None,
        typer.Option(metavar="N/OF", help="Also the SHA-256 of this part of the packs: 3/30, or auto for today's."),
    ] = None,
) -> int:
    """Check that everything in a vault is what was written."""
    from workers.vault.findings import Share

    level = level_of(ids=ids, packs=packs, sample=sample, full=full, default="sample")
    part = None if share is None else Share.parse(share, date.today())
    name = session.config.vault_name(vault)
    what = f"vault {name}{f', share {part}' if part else ''}"
    with advancing(session, what) as advance:
        report = _verified(session, name, level, part, advance)
    return show_report(session, what, level, report)


def _verified(session: Session, name: str, level: Level, share: Share | None, advance: Advance) -> VerifyReport:
    """The report; packs can be checked by somebody who has no key, a host that keeps replicas for example."""
    from workers.contract.errors import WrongKey
    from workers.vault.findings import Level
    from workers.vault.places import open_place
    from workers.vault.verify import verify_packs

    try:
        return session.service.verify_vault(name, level, advance, share=share)
    except WrongKey:
        if level is not Level.PACKS:
            raise
        return verify_packs(open_place(session.config.worker.vaults[name]), on_progress=advance, share=share)


def repair_vault(
    session: Session,
    vault: VaultArgument = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="REPLICA", help="Only from this vault; default: all replicas, and mirrors."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be repaired.")] = False,
) -> int:
    """Put good copies in the place of what a verify found damaged or missing."""
    name = session.config.vault_name(vault)
    with advancing(session, f"vault {name}") as advance:
        report = session.service.integrity.repair(name, source=source, dry_run=dry_run, on_progress=advance)
    session.out.record("repair", {"vault": name, **report.model_dump(mode="json")})
    for line in _lines(report):
        session.out.say(line)
    if report.dry_run:
        return OK
    lost = any(finding.affected or finding.object.startswith("points/") for finding in report.findings)
    return FAILED if lost or report.failed else DEGRADED if report.findings else OK


def _lines(report: RepairReport) -> list[str]:
    verb = "would repair" if report.dry_run else "repaired"
    lines = [f"{verb} {one.object} in {one.place} from {one.source or 'the packs'}" for one in report.repaired]
    lines += [f"not repaired {one.object}: {one.problem}" for one in report.failed]
    would = {one.object for one in report.repaired} if report.dry_run else set()
    left = [one for one in report.findings if one.object not in would]
    lines += [f"still damaged {one.object}: {one.problem}{needed_by(one)}" for one in left]
    if not report.looked_at and not left:
        return ["no damage is known: stillframe vault verify --full looks for it"]
    if any(one.affected for one in left):
        lines.append("what their disks still have, the next backup heals; the rest is lost with its last copy")
    return lines
