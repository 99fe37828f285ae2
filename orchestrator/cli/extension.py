"""`stillframe extension`: what is put into guests, and in which guests it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import command, group
from orchestrator.cli.output import Output
from orchestrator.cli.run import FAILED, OK, Session

if TYPE_CHECKING:
    from orchestrator.views import InstalledView, PackageView
    from workers.contract.guests import ExtensionState, GuestOs

app = group("The extension that is put into guests: packages, and where it is installed.")

Vm = Annotated[str, typer.Argument(metavar="VM", help="Name, hypervisor/name, or UUID.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")]


@command(app, "build")
def build_packages(
    session: Session,
    os: Annotated[
        str | None, typer.Option("--os", metavar="OS", help="Only for this one: linux or windows (default: both).")
    ] = None,
) -> None:
    """Build and sign the packages; the signing key is made if there is none.

    The same content stays the same package. `init`, and each backup that finds something changed, do this by
    themselves.
    """
    from orchestrator.config import load_config
    from orchestrator.extension_build import make_packages
    from orchestrator.extension_content import replaced
    from orchestrator.guest_desk import view_package

    systems = [_system(os)] if os else None
    settings = session.config.extension
    made = make_packages(settings, systems)
    config = load_config(session.config.path)  # the key may have been made just now
    for path in made:
        view = view_package(config, path)
        session.out.record("package", view.model_dump(mode="json"))
        session.out.say(f"{view.os:<8} {view.version}  {view.files} files  {path}")
    for app_folder in replaced(settings.apps):
        session.out.note(f"{app_folder} takes the place of the shipped application {app_folder.name}")
    if not made:
        session.out.say("This Stillframe ships no extension.")


def _system(word: str) -> GuestOs:
    from orchestrator.extension_content import SYSTEMS
    from workers.contract.errors import UsageError

    for system in SYSTEMS:
        if system.value == word:
            return system
    raise UsageError(f"--os cannot be {word!r}: it is linux or windows", hint="stillframe extension build --os linux")


@command(app, "list")
def list_extensions(session: Session) -> None:
    """List packages, and machines with the state of the extension in them as the last backup found it."""
    desk = session.service.guests
    packages, installed = desk.packages(), desk.installed()
    for package in packages:
        session.out.record("package", package.model_dump(mode="json"))
    for one in installed:
        session.out.record("installed", one.model_dump(mode="json"))
    out = session.out
    if packages:
        out.table(("package for", "version", "serial", "state"), [_package_row(one) for one in packages])
    else:
        out.say("No package is built: stillframe extension build")
    if session.config.extension.public_key:
        out.say(f"trusted key  {session.config.extension.public_key}")
    out.say()
    if installed:
        out.table(
            ("machine", "hypervisor", "extension", "version", "channel", "guest"),
            [_installed_row(one) for one in installed],
        )
    else:
        out.say("No backup has looked into a guest yet.")


def _package_row(package: PackageView) -> tuple[str, ...]:
    return package.os, package.version or "–", str(package.serial or "–"), package.refused or "signed"


def _installed_row(one: InstalledView) -> tuple[str, ...]:
    state = one.state
    use = f"{state.use} ({state.detail})" if state.detail and not state.version else str(state.use)
    return one.machine, one.hypervisor, use, state.version or "–", state.channel or "–", state.release or str(state.os)


def show_state(out: Output, state: ExtensionState | None) -> None:
    """One line of `vm show`."""
    if state is None:
        out.say("extension   not known: no backup has looked into the guest yet")
        return
    version = f" {state.version}" if state.version else ""
    channel = f" over {state.channel}" if state.channel else ""
    release = f", {state.release}" if state.release else ""
    until = ", until its next boot" if state.transient else ""
    detail = f" ({state.detail})" if state.detail else ""
    out.say(f"extension   {state.use}{version}{channel}{release}{until}{detail}")


@command(app, "verify")
def verify_packages(
    session: Session, files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Packages to look at.")]
) -> int:
    """Check signature and content of packages, as a worker does before it puts one into a guest."""
    from orchestrator.guest_desk import view_package

    code = OK
    for file in files:
        view = view_package(session.config, file)
        session.out.record("package", view.model_dump(mode="json"))
        if view.refused:
            code = FAILED
            session.out.say(view.refused, label="FAIL")
        else:
            session.out.say(f"{file}: {view.os} {view.version}, serial {view.serial}, signed", label="OK")
    return code


@command(app, "uninstall")
def uninstall(session: Session, vm: Vm, dry_run: DryRun = False) -> None:
    """Take the extension out of a guest. Points stay, and so do the logs in the guest."""
    machine = session.service.machine(vm)
    take_out(session, machine.uuid, machine.name, dry_run=dry_run)
    if not dry_run and session.config.worker.extension is not None:
        stays = f'extension = false under [guests."{machine.name}"]'
        session.out.note(f"the next backup of {machine.name} installs it again, unless you write {stays}")


def take_out(session: Session, uuid: str, name: str, *, dry_run: bool) -> None:
    """Ask, uninstall, and tell. Raises what `GuestDesk.uninstall` does."""
    removed = False
    if not dry_run:
        session.confirm(f"Take the extension out of {name}?")
        removed = session.service.guests.uninstall(uuid)
    session.out.record("uninstalled", {"dry_run": dry_run, "machine": name, "uuid": uuid, "removed": removed})
    if dry_run:
        session.out.say(f"would take the extension out of {name}")
    else:
        session.out.say(f"{name}: {'the extension is uninstalled' if removed else 'there was no extension in it'}")
