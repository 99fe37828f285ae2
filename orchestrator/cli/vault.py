"""`stillframe vault`: what is stored, whether it can be trusted, and who can open it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import integrity, replica, sweep, vault_key, vault_lock
from orchestrator.cli.options import VaultArgument, command, group
from orchestrator.cli.output import duration, moment, size
from orchestrator.cli.run import Session
from orchestrator.cli.verify import advancing

if TYPE_CHECKING:
    from orchestrator.integrity_desk import VaultHealth

app = group("Vaults: contents, verification, keys.")
app.add_typer(vault_key.app, name="key")
integrity.register(app)
sweep.register(app)
replica.register(app)
vault_lock.register(app)


@command(app, "list")
def list_vaults(session: Session) -> None:
    """List configured vaults."""
    vaults = session.service.vaults()
    for vault in vaults:
        session.out.record("vault", vault.model_dump(mode="json"))
    if not vaults:
        session.out.say("No vault is configured: add a [vaults.main] section, then `stillframe init`.")
        return
    session.out.table(
        ("vault", "url", "points", "free", "state"),
        [
            (
                vault.name,
                vault.url,
                str(vault.points) if vault.points is not None else "–",
                size(vault.free_bytes),
                vault.problem or (f"replica of {vault.replica_of}" if vault.replica_of else "ok"),
            )
            for vault in vaults
        ],
        right=("points", "free"),
    )


@command(app, "stats")
def vault_stats(session: Session, vault: VaultArgument = None) -> None:
    """Show what a vault holds, what deduplication saves, and when it was last verified."""
    name = session.config.vault_name(vault)
    stats, health = session.service.vault_stats(name), session.service.integrity.health(name)
    shown = stats.model_dump(mode="json")
    session.out.record("vault_stats", {"vault": name, **shown, "health": health.model_dump(mode="json")})
    for key, value in shown.items():
        session.out.say(f"{key.replace('_', ' '):<16} {_figure(key, value)}")
    for key, text in _health(health):
        session.out.say(f"{key:<16} {text}")


def _health(health: VaultHealth) -> list[tuple[str, str]]:
    """What is known of its integrity, in words."""
    never = [share for share, time in health.shares.items() if time is None]
    known = {time: share for share, time in health.shares.items() if time is not None}
    lines = [("verified", moment(health.last) if health.last else "never: stillframe vault verify")]
    if health.oldest is not None:
        lines.append(("packs hashed", f"all since {moment(health.oldest)}; the oldest part is {known[health.oldest]}"))
    elif known:
        lines.append(
            (
                "packs hashed",
                f"{len(known)} of {len(health.shares)} parts; never: {', '.join(never[:5])}"
                + (f" and {len(never) - 5} more" if len(never) > 5 else ""),
            )
        )
    damage = "none known"
    if health.damaged_packs:
        damage = f"{health.damaged_packs} packs, {len(health.damaged_points)} points: stillframe vault repair"
    return [*lines, ("damage", damage)]


def _figure(key: str, value: object) -> str:
    if key.endswith("bytes") and isinstance(value, int):
        return size(value)
    if isinstance(value, dict):
        return "  ".join(f"{part} {_figure(key if 'bytes' in key else part, one)}" for part, one in value.items())
    return f"{value:.2f}" if isinstance(value, float) else str(value)


@command(app, "rebuild-catalog")
def rebuild_catalog(
    session: Session,
    vault: Annotated[str | None, typer.Argument(metavar="VAULT", help="Only from this one; default: all.")] = None,
) -> None:
    """Read the points back from the vaults, where the catalog was lost."""
    name = session.config.vault_name(vault) if vault else None
    found = session.service.rebuild_catalog(name)
    session.out.record("catalog", {"points": found})
    session.out.say(f"{found} point{'' if found == 1 else 's'} in the catalog.")


@command(app, "rebuild-index")
def rebuild_index(session: Session, vault: VaultArgument = None) -> None:
    """Write a vault's index anew from its packs, where it was lost or damaged. Backups may run meanwhile."""
    name = session.config.vault_name(vault)
    with advancing(session, f"vault {name}") as advance:
        done = session.service.rebuild_index(name, advance)
    session.out.record("index", {"vault": name, **done.model_dump(mode="json")})
    for pack in done.unreadable:
        session.out.note(f"{pack}: its footer cannot be read; `stillframe vault verify {name} --packs` says more")
    session.out.say(
        f"{done.entries} blocks in {done.packs} packs, {done.segments} index segments written in"
        f" {duration(done.seconds)}"
    )
