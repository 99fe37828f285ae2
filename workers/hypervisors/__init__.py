"""What runs machines, by the scheme of its URI. libvirt and QMP are imported when the first one is opened: `--help`
must stay fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from workers.contract.errors import ConfigError
from workers.contract.hosts import Host
from workers.contract.seams import Hypervisor
from workers.hosts.local import LOCAL

RUNTIME = Path("/run/stillframe")
EXAMPLES = (
    "qemu:///system, qemu+ssh://root@lab1/system for another host, "
    "or qmp+unix:///run/qemu/web.sock for a QEMU without libvirt"
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an opener is told; `host` is where it runs, and `runtime_dir` is a folder there."""

    uri: str
    name: str
    runtime_dir: Path | None
    host: Host


def open_hypervisor(uri: str, *, name: str = "", runtime_dir: Path | None = None, host: Host = LOCAL) -> Hypervisor:
    """Connect to the hypervisor at `uri`, known as `name` in the configuration (default: the URI).

    `host` is where it runs. `runtime_dir` (there) is for NBD sockets where the hypervisor keeps no folder per machine.
    Raises ConfigError for a URI that cannot be meant, HypervisorUnreachable with its own words.
    """
    return _opener(uri)(Wanted(uri, name or uri, runtime_dir, host))


def _opener(uri: str) -> Callable[[Wanted], Hypervisor]:
    scheme = uri.partition("://")[0]
    if scheme == "qemu+tls":
        raise ConfigError(
            f"hypervisor URI {uri!r}: libvirt over TLS gives orders, but no way to the disks",
            hint="write qemu+ssh://root@lab1/system",
        )
    opener = _OPENERS.get(scheme)
    if opener is None:
        raise ConfigError(f"hypervisor URI {uri!r} is of no kind known here", hint=f"write {EXAMPLES}")
    return opener


def require_known(uri: str) -> None:
    """Raises ConfigError for a URI of no kind that is known here, or of another host that cannot be meant."""
    _opener(uri)
    if uri.startswith("qemu+ssh://"):
        from workers.hosts.address import remote_libvirt

        remote_libvirt(uri)


def _libvirt(wanted: Wanted) -> Hypervisor:
    parts = urlsplit(wanted.uri)
    if parts.netloc or parts.path not in ("/system", "/session"):
        raise ConfigError(
            f"hypervisor URI {wanted.uri!r} is not one of a local libvirt",
            hint="write qemu:///system for this host, qemu+ssh://root@lab1/system for another",
        )
    from workers.hypervisors.libvirt_host import LibvirtHypervisor
    from workers.hypervisors.wires import DirectWire

    wire = DirectWire(wanted.uri)
    return LibvirtHypervisor(wire, name=wanted.name, host=wanted.host, runtime_dir=wanted.runtime_dir)


def _libvirt_over_ssh(wanted: Wanted) -> Hypervisor:
    from workers.hosts.address import remote_libvirt
    from workers.hypervisors.libvirt_host import LibvirtHypervisor
    from workers.hypervisors.wires import SocketWire

    remote = remote_libvirt(wanted.uri)
    socket = Path(remote.socket) if remote.socket else None
    wire = SocketWire(
        wanted.host,
        f"{remote.ssh.typed} systemctl start libvirtd; its sshd must allow AllowStreamLocalForwarding",
        socket,
    )
    return LibvirtHypervisor(wire, name=wanted.name, host=wanted.host, runtime_dir=wanted.runtime_dir)


def _qmp(wanted: Wanted) -> Hypervisor:
    parts = urlsplit(wanted.uri)
    path = Path(unquote(parts.path))
    if parts.netloc or parts.query or parts.fragment or not path.is_absolute() or path == Path("/"):
        raise ConfigError(
            f"hypervisor URI {wanted.uri!r} names no local socket",
            hint="write qmp+unix:///run/qemu/web.sock, or the folder of such sockets",
        )
    from workers.hypervisors.qmp_host import QmpHypervisor

    return QmpHypervisor(path, name=wanted.name, runtime_dir=wanted.runtime_dir or RUNTIME)


_OPENERS = {"qemu": _libvirt, "qemu+unix": _libvirt, "qemu+ssh": _libvirt_over_ssh, "qmp+unix": _qmp}
