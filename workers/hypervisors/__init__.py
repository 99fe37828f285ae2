"""What runs machines. libvirt is imported when the first one is opened: `--help` must stay fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from workers.contract.errors import ConfigError
from workers.contract.hosts import Host
from workers.hosts.local import LOCAL

if TYPE_CHECKING:
    from workers.hypervisors.libvirt_host import LibvirtHypervisor

_LOCAL_SCHEMES = ("qemu", "qemu+unix")


def open_hypervisor(
    uri: str, *, name: str = "", runtime_dir: Path | None = None, host: Host = LOCAL
) -> LibvirtHypervisor:
    """Connect to the hypervisor at libvirt `uri`, known as `name` in the configuration (default: the URI).

    `host` is where it runs. `runtime_dir` (there) is for NBD sockets where libvirt keeps no folder per machine. Raises
    ConfigError for a URI that cannot be meant, HypervisorUnreachable with libvirt's own words.
    """
    parts = urlsplit(uri)
    if parts.scheme not in _LOCAL_SCHEMES or parts.netloc or parts.path not in ("/system", "/session"):
        raise ConfigError(
            f"hypervisor URI {uri!r} is not one of a local libvirt",
            hint="write qemu:///system, and run stillframe on the hypervisor itself",
        )
    from workers.hypervisors.libvirt_host import LibvirtHypervisor

    return LibvirtHypervisor(uri, name=name or uri, host=host, runtime_dir=runtime_dir)
