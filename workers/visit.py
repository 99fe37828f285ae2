"""A visit to a guest: the way in, the extension there, and what a snapshot may do with both.

One command makes one visit. What is found is never remembered between visits: a guest's administrator may forbid
commands, remove the extension or restart the machine at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from workers.contract.errors import ExtensionError, StillframeError
from workers.contract.guests import (
    CONTRACT_VERSION,
    ExtensionState,
    ExtensionUse,
    GuestInfo,
    GuestOs,
    Status,
)
from workers.contract.seams import Extension, Package
from workers.guests.linux import LinuxExtension
from workers.guests.package import is_older
from workers.guests.ways import Ways
from workers.quiesce import Guest

Packages = Callable[[GuestOs], Package | None]
"""The newest trusted package for an operating system. Raises PackageRefused."""


@dataclass(frozen=True, slots=True)
class Visit:
    """`ways`: how to get in; `off`: why the extension is not to be used here, if it is not; `found`: what was in the
    way; `thaw_command`: see `Hypervisor.thaw_command`."""

    ways: Ways
    uuid: str
    packages: Packages
    off: str = ""
    found: str = ""
    thaw_command: tuple[str, ...] = ()

    def see_to_extension(self) -> ExtensionState:
        """Install or upgrade it where that is due. Never raises StillframeError: a guest that cannot have it is backed
        up all the same, and the state says why it has none."""
        if self.off:
            return ExtensionState(use=ExtensionUse.OFF, detail=self.off)
        if self.ways.commands is None:
            return ExtensionState(use=ExtensionUse.ABSENT, detail=self.ways.why_not)
        state = ExtensionState(use=ExtensionUse.ABSENT, channel=self.ways.described)
        try:
            info = self.ways.commands.info()
            state = state.model_copy(update={"os": info.os, "release": info.release})
            status, done = self._installed(info)
        except StillframeError as error:
            return state.model_copy(update={"detail": str(error)})
        return state.model_copy(
            update={
                "use": ExtensionUse.ENABLED,
                "version": status.version,
                "transient": status.transient,
                "detail": "; ".join(part for part in (self.found, done) if part),
            }
        )

    def _installed(self, info: GuestInfo) -> tuple[Status, str]:
        """The extension in force after this, and what was done. Raises StillframeError."""
        extension = self.extension(info.os)
        if extension is None:
            raise StillframeError(f"there is no extension for this kind of guest ({info.release or info.os})")
        package = self.packages(info.os)
        status = self._status(extension, mended=package is not None)
        if package is None:
            if status is None or status.contract != CONTRACT_VERSION:
                raise StillframeError("no package is built: stillframe extension build")
            return status, "no package to compare with is built"
        if status is None:
            return extension.install(package, self.uuid), "installed"
        if status.version == package.version and status.contract == CONTRACT_VERSION:
            return status, ""
        if is_older(package, status) and status.contract == CONTRACT_VERSION:
            return status, f"newer than the package {package.version} here"
        return extension.install(package, self.uuid), f"upgraded from {status.version}"

    def _status(self, extension: Extension, *, mended: bool) -> Status | None:
        """None: there is none, or (`mended`: it will be replaced) one that answers nonsense."""
        try:
            return extension.status(self.uuid)
        except ExtensionError:
            if mended:
                return None
            raise

    def extension(self, os: GuestOs) -> Extension | None:
        """The driver for a guest of that kind; None: there is none, or no way to run commands."""
        if self.ways.commands is None:
            return None
        match os:
            case GuestOs.LINUX:
                return LinuxExtension(self.ways.commands)
            case GuestOs.WINDOWS:
                from workers.guests.windows import WindowsExtension

                return WindowsExtension(self.ways.commands)
            case _:
                return None

    def guest(self, state: ExtensionState | None) -> Guest:
        """What a snapshot may do, given what the preparation of this job has found."""
        enabled = state is not None and state.use is ExtensionUse.ENABLED
        os = state.os if state else GuestOs.OTHER
        guest = Guest(
            freezer=self.ways.freezer,
            extension=self.extension(os) if enabled else None,
            why_no_extension=f"the extension is {state.use}: {state.detail}" if state else "nobody asked for it",
            thaw_command=self.thaw_command,
            os=os,
        )
        if self.ways.freezer is None:
            guest = replace(guest, why_no_freezer=self.ways.why_not)
        if os is GuestOs.WINDOWS:
            from workers.guests.vss import failed_writers
            from workers.guests.windows import HOLD_SECONDS

            return replace(guest, point_seconds=HOLD_SECONDS, failed_writers=failed_writers)
        return guest

    def let_go(self, job: str) -> None:
        """Resume what a job that has died may have held. Where that cannot be done, the watchdog in the guest does it
        at its deadline."""
        if self.ways.commands is None:
            return
        with suppress(StillframeError):
            extension = self.extension(self.ways.commands.info().os)
            if extension is not None:
                extension.resume(job)
