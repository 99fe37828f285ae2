"""What people do with guests and the extension in them: see what is there, build what is put there, take it out.

The half of `Service` that concerns guests and not jobs. Only `uninstall` goes into a guest; the rest is what the
catalog and the folder of packages know.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.catalog.jobs import refuse_locked
from orchestrator.catalog.points import extensions, put_extension, seen_machines
from orchestrator.catalog.store import Catalog
from orchestrator.config import Config
from orchestrator.desk import Desk
from orchestrator.views import InstalledView, PackageView
from workers.context import Context
from workers.contract.errors import ConfigError, GuestError, PackageRefused, UsageError
from workers.contract.guests import ExtensionState, ExtensionUse
from workers.contract.machines import MachineRef, MachineSummary, Power

if TYPE_CHECKING:
    from workers.contract.seams import Package
    from workers.visit import Visit


class GuestDesk(Desk):
    """`find`: the machine that people mean by a name."""

    def __init__(
        self, config: Config, catalog: Catalog, context: Context, find: Callable[[str], MachineSummary]
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._context = context
        self._find = find

    def refresh_packages(self) -> list[str]:
        """Build what is missing before a backup; warnings. Whatever is wrong with it, a backup is better than none:
        the packages that were built last are used then."""
        from orchestrator.extension_build import ensure_packages

        try:
            ensure_packages(self._config.extension)
        except ConfigError as error:
            return [f"extension packages are not brought up to date: {error}; {error.hint}"]
        return []

    def packages(self) -> list[PackageView]:
        """What lies in the folder of packages, and whether it can be put into guests."""
        from workers.guests.package import packages

        return [view_package(self._config, path) for path in packages(self._config.extension.packages)]

    def installed(self) -> list[InstalledView]:
        """Machines whose guest a job has looked into, by name."""
        with self._catalog.read() as session:
            known = extensions(session)
            seen = [row for row in seen_machines(session) if row.uuid in known]
        return [
            InstalledView(machine=row.name, uuid=row.uuid, hypervisor=row.hypervisor, state=known[row.uuid])
            for row in sorted(seen, key=lambda row: (row.name, row.hypervisor))
        ]

    def uninstall(self, wanted: str) -> bool:
        """Take the extension out of the guest of a machine. False: it had none. Points stay. Raises NotFound,
        UsageError, Busy while a job works on the machine, GuestError."""
        summary = self._find(wanted)
        machine = summary.machine
        with self._catalog.read() as session:
            refuse_locked(session, f"machine:{machine.uuid}")
        if summary.power is not Power.RUNNING:
            raise UsageError(
                f"{machine.name} is {summary.power}: its extension can be removed only from inside",
                hint=f"virsh start {machine.name}",
            )
        with self._context.visit(machine, secrets.token_hex(6)) as visit:
            removed, state = _taken_out(machine, visit)
        with self._catalog.write() as session:
            put_extension(session, machine.uuid, state)
        return removed


def _taken_out(machine: MachineRef, visit: Visit) -> tuple[bool, ExtensionState]:
    commands = visit.ways.commands
    if commands is None:
        raise GuestError(f"there is no way into the guest of {machine.name}: {visit.ways.why_not}")
    info = commands.info()
    extension = visit.extension(info.os)
    removed = extension.uninstall() if extension is not None else False
    state = ExtensionState(
        use=ExtensionUse.ABSENT,
        detail="uninstalled" if removed else "it had none to uninstall",
        channel=visit.ways.described,
        os=info.os,
        release=info.release,
    )
    return removed, state


def view_package(config: Config, path: Path) -> PackageView:
    """A package as `extension list` shows it, refused or not."""
    try:
        package = verified(config, path)
    except PackageRefused as error:
        system = path.stem.rpartition("-")[2]
        return PackageView(path=str(path), os=system, version="", refused=str(error))
    return PackageView(
        path=str(path),
        os=package.os.value,
        version=package.version,
        serial=package.serial,
        signed_by=config.extension.public_key or "",
        files=len(package.files),
    )


def verified(config: Config, path: Path) -> Package:
    """Raises PackageRefused."""
    from workers.guests.package import open_package

    trusted = config.extension.public_key
    if trusted is None:
        raise PackageRefused(
            f"{path}: no key is trusted: {config.extension.signing_key}.pub is not there",
            hint="stillframe extension build, or public_key under [extension]",
        )
    return open_package(path, trusted)
