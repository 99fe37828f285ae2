"""Every way in which Stillframe refuses or fails, in one tree.

    StillframeError                 exit  retryable
    ├── UsageError                    2            what was typed or configured cannot be meant
    │   ├── ConfigError               2            a mistake in the configuration file, with its line
    │   └── NotFound                  2            no machine, point, disk, job, vault of that name
    ├── VaultError                    1
    │   ├── VaultMissing             10            no vault there (or its path is not mounted)
    │   ├── WrongKey                 12            the key does not open this vault, or is absent or exposed
    │   ├── NewerFormat               1            written by a newer Stillframe
    │   ├── Corrupt                   1            an object is not what was written
    │   ├── ObjectMissing             1            an object that should be there is not
    │   ├── StoreUnreachable          1     yes    an object store does not answer, or refuses us
    │   ├── Locked                    1            it may not be deleted or shortened yet, or not by one person alone
    │   └── WrongClock                1            the clock says a time before something in the vault was made
    ├── CatalogUnreachable            1     yes    the catalog's database does not answer
    ├── BrokerUnreachable             1     yes    the broker between controllers and workers does not answer
    ├── Busy                         11     yes    somebody else works on this machine or file
    ├── HypervisorError               1     yes    libvirt or QEMU refused, or cannot be reached
    │   ├── HypervisorUnreachable     1     yes
    │   │   └── HypervisorRefused     1            its host key is not the known one, or it does not let us in
    │   └── CheckpointUnusable        1     yes    the base of one disk cannot be used: read it in full
    ├── GuestError                    1     yes    the guest agent or SSH server refused or is silent
    │   ├── GuestTimeout              1     yes    a command in the guest did not end in time, and may still run
    │   ├── HostKeyRefused            1            an SSH host key is not the one that is pinned
    │   └── ExtensionError            1     yes    the extension in a guest cannot be put in place, or speaks nonsense
    ├── PackageRefused                1            an extension package is unsigned, changed, old, or for another system
    ├── DiskError                     1     yes    an export, image or extent map is not as it must be
    ├── NoSpace                       1     yes    scratch, vault or restore target is too small
    ├── TargetExists                  2            a restore would overwrite something
    ├── Yielded                      11     yes    the machine was started during its offline backup
    └── Cancelled                     1            somebody asked for it

An error says what, why, and what to do next: `str(error)` is the first two, `hint` the third. Errors cross
process borders as `ErrorInfo`, plain data.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class ErrorInfo(BaseModel):
    """An error as plain data, to be stored in the catalog or sent between processes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: str
    """Name of the class, one of the tree above; `Internal` for an error that is not ours."""
    message: str
    hint: str = ""
    retryable: bool = False
    exit_code: int = 1


class StillframeError(Exception):
    """Base of all errors that are shown to people without a traceback."""

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def info(self) -> ErrorInfo:
        return ErrorInfo(
            code=type(self).__name__,
            message=str(self),
            hint=self.hint,
            retryable=self.retryable,
            exit_code=self.exit_code,
        )


class UsageError(StillframeError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class NotFound(UsageError):
    pass


class VaultError(StillframeError):
    pass


class VaultMissing(VaultError):
    exit_code = 10


class WrongKey(VaultError):
    exit_code = 12


class NewerFormat(VaultError):
    pass


class Corrupt(VaultError):
    pass


class ObjectMissing(VaultError):
    pass


class StoreUnreachable(VaultError):
    retryable = True


class Locked(VaultError):
    pass


class WrongClock(VaultError):
    pass


class CatalogUnreachable(StillframeError):
    retryable = True


class BrokerUnreachable(StillframeError):
    retryable = True


class Busy(StillframeError):
    exit_code = 11
    retryable = True


class HypervisorError(StillframeError):
    retryable = True


class HypervisorUnreachable(HypervisorError):
    pass


class HypervisorRefused(HypervisorUnreachable):
    retryable = False


class CheckpointUnusable(HypervisorError):
    """The base cannot serve as one on `target` (DESIGN section 8: error 109 names checkpoint and disk)."""

    def __init__(self, message: str, *, target: str | None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.target = target


class GuestError(StillframeError):
    retryable = True


class GuestTimeout(GuestError):
    pass


class HostKeyRefused(GuestError):
    retryable = False


class ExtensionError(GuestError):
    pass


class PackageRefused(StillframeError):
    pass


class DiskError(StillframeError):
    retryable = True


class NoSpace(StillframeError):
    retryable = True


class TargetExists(StillframeError):
    exit_code = 2


class Yielded(StillframeError):
    exit_code = 11
    retryable = True


class Cancelled(StillframeError):
    pass


def describe(error: BaseException) -> ErrorInfo:
    """`error` as plain data; one that is not ours keeps its type's name in the message."""
    if isinstance(error, StillframeError):
        return error.info()
    return ErrorInfo(
        code="Internal",
        message=f"{type(error).__name__}: {error}",
        hint="this is a defect: please report it with the output of `stillframe job show JOB`",
    )
