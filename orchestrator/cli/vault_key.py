"""`stillframe vault key`: who can open a vault, and how that changes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import VaultArgument, command, group
from orchestrator.cli.output import is_terminal, moment
from orchestrator.cli.run import Session

if TYPE_CHECKING:
    from workers.vault.keys import SlotInfo

app = group("Who can open a vault: its key slots.")


@command(app, "list")
def list_slots(session: Session, vault: VaultArgument = None) -> None:
    """List the slots that open a vault."""
    name = session.config.vault_name(vault)
    slots = session.service.keys.slots(name)
    for slot in slots:
        session.out.record("key_slot", {"vault": name, **slot.model_dump(mode="json")})
    session.out.table(("slot", "kind", "made"), [_slot_row(slot) for slot in slots])


def _slot_row(slot: SlotInfo) -> tuple[str, ...]:
    return slot.id, slot.kind, moment(slot.created)


@command(app, "add")
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
        slot = service.keys.add_key_file(name, key_file.expanduser().absolute())
    else:
        slot = service.keys.add_passphrase(name, _passphrase(passphrase_file))
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


@command(app, "remove")
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
    slots = {one.id: one for one in service.keys.slots(name)}
    if slot not in slots:
        raise NotFound(f"vault {name} has no key slot {slot!r}", hint=f"stillframe vault key list {name}")
    if not dry_run:
        session.confirm(f"Remove slot {slot} ({slots[slot].kind}) of vault {name}?")
        service.keys.remove(name, slot)
    session.out.record("removed", {"dry_run": dry_run, "vault": name, "slot": slot})
    session.out.say(f"{'would remove' if dry_run else 'removed'} slot {slot} ({slots[slot].kind}) of vault {name}")


@command(app, "verify")
def verify_key(session: Session, vault: VaultArgument = None) -> None:
    """Check that the configured key opens a vault."""
    name = session.config.vault_name(vault)
    slots = [slot.id for slot in session.service.keys.verify(name)]
    session.out.record("key", {"vault": name, "opens": True, "slots": slots})
    session.out.say(f"the configured key opens vault {name} (slot {', '.join(slots)})")


# --- rotation ----------------------------------------------------------------------------------------------------


@command(app, "rotate")
def rotate_key(
    session: Session,
    vault: VaultArgument = None,
    passphrase_file: Annotated[
        Path | None,
        typer.Option(
            "--passphrase-file", metavar="FILE", help="Where the configured key is a passphrase: the new one."
        ),
    ] = None,
    keep_old: Annotated[
        bool, typer.Option("--keep-old", help="The old key opens the vault too, until its slot is removed.")
    ] = False,
) -> None:
    """Put a new key into the configured key file (or passphrase file), and remove the slot of the old one."""
    from workers.contract.errors import UsageError

    name = session.config.vault_name(vault)
    keys = session.service.keys
    keys.verify(name)
    file, is_passphrase = keys.secret_file(name)
    if passphrase_file is not None and not is_passphrase:
        raise UsageError(f"vault {name} is opened with a key file: --passphrase-file is not for it")
    new = _passphrase(passphrase_file) if is_passphrase else None
    gone = "the old key opens the vault no more, neither here nor on other hosts" if not keep_old else "both open it"
    session.confirm(f"Replace the key of vault {name} in {file}? After that {gone}.")
    done = keys.rotate(name, new, keep_old=keep_old)
    session.out.record("rotated", {"vault": name, "file": str(file), **done.model_dump(mode="json")})
    session.out.say(f"{file} holds a new key of vault {name}: slot {done.added.id}; the configuration stays as it is")
    if done.removed:
        session.out.say(f"removed slot {', '.join(done.removed)}; copy {file} to every other host of this vault now")
    for slot in done.kept:
        session.out.say(f"when every host has it: stillframe vault key remove {slot} {name}")
    _tell_of_lock(session, name)


def _tell_of_lock(session: Session, name: str) -> None:
    """A new slot approves nothing before another holder has agreed."""
    if session.service.locks.show(name).days:
        session.out.note(
            f"the vault is locked, and new keys may not approve yet: stillframe vault lock {name} --approvers"
        )


@command(app, "rotate-data")
def rotate_data_key(session: Session, vault: VaultArgument = None) -> None:
    """Seal what is written from now on under a new data key; what is there stays readable."""
    name = session.config.vault_name(vault)
    version = session.service.keys.rotate_data_key(name)
    session.out.record("data_key", {"vault": name, "version": version})
    session.out.say(f"vault {name} writes under data key {version} from now on; jobs that run go on with the old one")


# --- the recovery phrase -----------------------------------------------------------------------------------------


@command(app, "recovery")
def new_recovery(
    session: Session,
    vault: VaultArgument = None,
    keep_old: Annotated[bool, typer.Option("--keep-old", help="Older phrases open the vault too.")] = False,
) -> None:
    """Make a new recovery phrase, shown once, and remove the older ones."""
    from workers.contract.errors import Cancelled, UsageError

    name = session.config.vault_name(vault)
    keys = session.service.keys
    keys.verify(name)
    if not (keep_old or session.settings.yes or (sys.stdin.isatty() and is_terminal(sys.stderr))):
        raise UsageError("nobody is there to say that the new phrase is written down", hint="add --yes, or --keep-old")
    if not keep_old:
        keys.check_may_go(name, keys.recoveries(name))
    slot, phrase = keys.new_recovery(name)
    session.out.record("recovery", {"vault": name, "slot": slot.id, "recovery_phrase": phrase})
    session.out.say(f"New recovery phrase of vault {name}, shown only this once:\n\n    {phrase}\n")
    gone: list[str] = []
    if not keep_old:
        try:
            session.confirm("Is it written down? The older recovery phrases are removed now.")
        except Cancelled:
            raise Cancelled(
                f"the older recovery phrases stay, and so does the new one (slot {slot.id})",
                hint=f"stillframe vault key remove {slot.id} {name}",
            ) from None
        gone = keys.drop_recoveries(name, but=slot.id)
    session.out.record("removed", {"dry_run": False, "vault": name, "slots": gone})
    session.out.say(f"removed: {', '.join(gone) or 'none'}")
    _tell_of_lock(session, name)


@command(app, "restore")
def restore_key(
    session: Session,
    phrase_file: Annotated[
        Path, typer.Option("--phrase-file", metavar="FILE", help="The recovery phrase: first line of FILE, mode 600.")
    ],
    key_file: Annotated[
        Path, typer.Option("--key-file", metavar="NEW", help="The key file to open it with; made if there is none.")
    ],
    vault: VaultArgument = None,
) -> None:
    """Get back into a vault whose key is lost, with its recovery phrase."""
    name = session.config.vault_name(vault)
    file = key_file.expanduser().absolute()
    slot, configured = session.peek().keys.restore(name, phrase_file.expanduser(), file)
    session.out.record("key_slot", {"vault": name, "configured": configured, **slot.model_dump(mode="json")})
    session.out.say(f"{file} opens vault {name}: slot {slot.id}")
    if not configured:
        session.out.say(f'now set key_file = "{file}" under [vaults.{name}] in {session.config.path}')
    session.out.say(f"the slot of the key that was lost is there still: stillframe vault key list {name}")
