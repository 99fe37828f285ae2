"""The libvirt of this host, for machines that the demo and the tests own: connect, list, remove.

Everything here goes by name prefix, so that a demo or a test never touches a machine of somebody else.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from workers.contract.errors import HypervisorError, HypervisorUnreachable

if TYPE_CHECKING:
    import libvirt

URI = "qemu:///system"


def connect(uri: str = URI) -> libvirt.virConnect:
    """A connection to libvirt, which no longer writes its errors to our terminal. Raises HypervisorUnreachable."""
    import libvirt

    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    try:
        return libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise HypervisorUnreachable(f"{uri}: {error}", hint="try: deploy/libvirtd-up") from error


def machines(connection: libvirt.virConnect, prefix: str) -> list[libvirt.virDomain]:
    """Machines whose name begins with `prefix`."""
    return [domain for domain in connection.listAllDomains() if domain.name().startswith(prefix)]


def remove_machine(domain: libvirt.virDomain) -> None:
    """Stop the machine hard and forget it, with its checkpoints' metadata; its disks stay. Gone already: no error."""
    import libvirt

    gone = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)
    flags = (
        libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
        | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
    )
    for act in (domain.destroy, lambda: domain.undefineFlags(flags)):
        try:
            act()
        except libvirt.libvirtError as error:
            if error.get_error_code() not in gone:
                raise


def shut_down(domain: libvirt.virDomain, *, timeout: float = 60.0) -> None:
    """Ask the guest to power off, and wait until it has. Raises HypervisorError when it does not."""
    domain.shutdown()
    deadline = time.monotonic() + timeout
    while domain.isActive():
        if time.monotonic() > deadline:
            raise HypervisorError(f"{domain.name()} did not power off within {timeout:.0f} s")
        time.sleep(0.05)
