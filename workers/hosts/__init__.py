"""Where hypervisors run: implementations of `contract.hosts.Host`, chosen by the scheme of a hypervisor's URI."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from workers.config import HypervisorConfig
from workers.contract.hosts import Host
from workers.hosts.local import LOCAL


def open_host(config: HypervisorConfig, *, name: str, runtime_dir: Path) -> Host:
    """The host of the hypervisor `name`; nothing is connected before it is needed. `runtime_dir` (here) is for
    sockets. Raises ConfigError for a URI that cannot be meant."""
    scheme = config.uri.partition("://")[0]
    return _BY_SCHEME.get(scheme, _here)(config, name, runtime_dir)


def _here(_config: HypervisorConfig, _name: str, _runtime_dir: Path) -> Host:
    return LOCAL


def _over_ssh(config: HypervisorConfig, name: str, runtime_dir: Path) -> Host:
    from workers.hosts.address import remote_libvirt
    from workers.hosts.ssh import SshHost
    from workers.hosts.ssh_link import Login, SshLink

    login = Login(remote_libvirt(config.uri).ssh, name, key_file=config.key_file, host_key=config.host_key)
    return SshHost(SshLink(login, runtime_dir))


_BY_SCHEME: dict[str, Callable[[HypervisorConfig, str, Path], Host]] = {"qemu+ssh": _over_ssh}
