"""`stillframe vault`: what is stored, whether it can be trusted, and who can open it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import integrity, replica, sweep
from orchestrator.cli.options import command, group
from orchestrator.cli.output import is_terminal, moment, size
from orchestrator.cli.run import Session

if TYPE_CHECKING:
    from orchestrator.integrity_desk import VaultHealth
    from workers.vault.keys import SlotInfo

app = group("Vaults: contents, verification, keys.")
keys = group("Who can open a vault: its key slots.")
app.add_typer(keys, name="key")
integrity.register(app)
sweep.register(app)
replica.register(app)

VaultArgument = Annotated[
    str | None, typer.Argument(metavar="VAULT", help="Name in the configuration; default: the default vault.")
]


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


# --- keys ------------------------------------------------------------------------------------------------------


@command(keys, "list")
def list_slots(session: Session, vault: VaultArgument = None) -> None:
    """List the slots that open a vault."""
    name = session.config.vault_name(vault)
    slots = session.service.key_slots(name)
    for slot in slots:
        session.out.record("key_slot", {"vault": name, **slot.model_dump(mode="json")})
    session.out.table(("slot", "kind", "made"), [_slot_row(slot) for slot in slots])


def _slot_row(slot: SlotInfo) -> tuple[str, ...]:
    return slot.id, slot.kind, moment(slot.created)


@command(keys, "add")
def add_slot(
    session: Session,
    vault: VaultArgument = None,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", metavar="FILE", help="A key file; it is made if there is none.")
    ] = None,
    passphrase_file: Annotated[
        Path | None, typer.Option("--passphrase-file", metavar="FILE", help="A passphrase: the first line of FILE.")
    ] = None,
) -> None:
    """Add a slot: a key file, or a passphrase (asked for, or read from a file)."""
    from workers.contract.errors import UsageError

    if key_file is not None and passphrase_file is not None:
        raise UsageError("--key-file and --passphrase-file exclude each other")
    name = session.config.vault_name(vault)
    service = session.service
    if key_file is not None:
        slot = service.add_key_file(name, key_file.expanduser().absolute())
    else:
        slot = service.add_passphrase(name, _passphrase(passphrase_file))
    session.out.record("key_slot", {"vault": name, **slot.model_dump(mode="json")})
    session.out.say(f"slot {slot.id} ({slot.kind}) opens vault {name} now")


def _passphrase(file: Path | None) -> bytes:
    """From `file`, or typed twice on the terminal. Raises UsageError."""
    from workers.contract.errors import UsageError

    if file is not None:
        try:
            first = file.expanduser().read_bytes().split(b"\n", 1)[0]
        except OSError as error:
            raise UsageError(f"passphrase file {file}: {error.strerror}") from None
        if not first:
            raise UsageError(f"passphrase file {file} begins with an empty line")
        return first
    if not (sys.stdin.isatty() and is_terminal(sys.stderr)):
        raise UsageError("a passphrase is needed, and nobody is there to type it", hint="--passphrase-file FILE")
    from getpass import getpass

    typed = getpass("New passphrase: ")
    if not typed:
        raise UsageError("an empty passphrase protects nothing")
    if getpass("Once more: ") != typed:
        raise UsageError("the two differ: nothing was changed")
    return typed.encode()


@command(keys, "remove")
def remove_slot(
    session: Session,
    slot: Annotated[str, typer.Argument(metavar="SLOT", help="As in `vault key list`.")],
    vault: VaultArgument = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
) -> None:
    """Remove a slot: its key or passphrase opens the vault no more."""
    from workers.contract.errors import NotFound

    name = session.config.vault_name(vault)
    service = session.service
    slots = {one.id: one for one in service.key_slots(name)}
    if slot not in slots:
        raise NotFound(f"vault {name} has no key slot {slot!r}", hint=f"stillframe vault key list {name}")
    if not dry_run:
        session.confirm(f"Remove slot {slot} ({slots[slot].kind}) of vault {name}?")
        service.remove_slot(name, slot)
    session.out.record("removed", {"dry_run": dry_run, "vault": name, "slot": slot})
    session.out.say(f"{'would remove' if dry_run else 'removed'} slot {slot} ({slots[slot].kind}) of vault {name}")


@command(keys, "verify")
def verify_key(session: Session, vault: VaultArgument = None) -> None:
    """Check that the configured key opens a vault."""
    name = session.config.vault_name(vault)
    session.service.verify_key(name)
    session.out.record("key", {"vault": name, "opens": True})
    session.out.say(f"the configured key opens vault {name}")
