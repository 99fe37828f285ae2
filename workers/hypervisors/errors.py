"""libvirt's errors as ours.

libvirt tells kinds of failure apart by a code, and sometimes only by its English text (a bitmap that is gone is an
"internal error"). All reading of codes and texts is here, so that a new libvirt has one place to be checked against.
The texts are those of libvirt 9.0 with QEMU 7.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import libvirt

from workers.contract.errors import (
    Busy,
    CheckpointUnusable,
    GuestError,
    HypervisorError,
    HypervisorUnreachable,
    NoSpace,
    NotFound,
    StillframeError,
    TargetExists,
)

LOST = "stillframe hypervisor check"
_DISK = re.compile(r"(?:disk|backing chain of) '([^']+)'")
_BITMAP = re.compile(
    r"bitmap\b.*\b(?:not found|missing|broken|inconsistent)|(?:missing|broken|inconsistent)\b.*\bbitmap"
)


_SILENT = {libvirt.VIR_ERR_AGENT_UNSYNCED, libvirt.VIR_ERR_OPERATION_TIMEOUT}


def code(error: libvirt.libvirtError) -> int:
    return int(error.get_error_code() or 0)


def text(error: libvirt.libvirtError) -> str:
    return str(error.get_error_message() or error)


def disk_named(words: str) -> str | None:
    """Target of the disk that an error text names, if it names one."""
    found = _DISK.search(words)
    return found.group(1) if found else None


def unusable_bitmap(error: libvirt.libvirtError) -> bool:
    """Whether a bitmap or a checkpoint is what failed."""
    if code(error) in (libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT, libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT):
        return True
    return bool(_BITMAP.search(text(error)))


def lost_connection(error: libvirt.libvirtError) -> bool:
    return bool(error.get_error_domain() == libvirt.VIR_FROM_RPC)


def translate(error: libvirt.libvirtError, doing: str) -> StillframeError:
    """`error` in our tree; `doing` says what was tried, for people (`starting the backup of web-1`)."""
    words = text(error)
    message = f"{doing}: {words}"
    kind = code(error)
    if lost_connection(error):
        return HypervisorUnreachable(message, hint=LOST)
    if kind in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_NO_STORAGE_POOL):
        return NotFound(message)
    if unusable_bitmap(error):
        return CheckpointUnusable(message, target=disk_named(words))
    if kind == libvirt.VIR_ERR_OPERATION_TIMEOUT:
        return Busy(message, hint="another program works on this machine: see `virsh domjobinfo`")
    if 'Failed to get "' in words or "Failed to get shared" in words:
        return Busy(message, hint="another process has the image open")
    if "No space left" in words:
        return NoSpace(message)
    if "already exists with uuid" in words or "already defined with uuid" in words:
        return TargetExists(message)
    hint = "QEMU's user must be able to enter the folder" if "Permission denied" in words else ""
    return HypervisorError(message, hint=hint)


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Raise libvirt's errors inside as ours."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise translate(error, doing) from None


def guest_error(error: libvirt.libvirtError) -> StillframeError:
    """An error of an agent command, in words that say which part is missing."""
    words, kind = text(error), code(error)
    if "encode message payload" in words:
        return GuestError(f"the guest agent's answer is longer than libvirt carries ({words})")
    if lost_connection(error) or kind == libvirt.VIR_ERR_NO_DOMAIN:
        return translate(error, "the guest agent")
    if "not configured" in words:
        return GuestError(
            "the machine has no guest agent channel", hint="add the channel org.qemu.guest_agent.0 to its definition"
        )
    if kind in _SILENT or "timed out" in words or "not available for now" in words:
        return GuestError(f"the guest agent did not answer in time ({words}); what it was told may still happen")
    if kind == libvirt.VIR_ERR_AGENT_UNRESPONSIVE:
        return GuestError(
            f"the guest agent is not connected ({words})", hint="install and start qemu-guest-agent in the guest"
        )
    if kind == libvirt.VIR_ERR_OPERATION_INVALID:
        return GuestError(f"the guest agent cannot be asked: {words}")
    return GuestError(words)
