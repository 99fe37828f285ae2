"""Hypervisor URIs, read strictly: what is in them ends up on command lines, and `ssh -oProxyCommand=…` is a host name
to a careless program."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qs, urlsplit

from workers.contract.errors import ConfigError

_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?|[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9._-]{1,16})?")
_SOCKET = re.compile(r"/[A-Za-z0-9._/-]{1,106}")


@dataclass(frozen=True, slots=True)
class SshAddress:
    """Whom to log in to."""

    host: str
    user: str | None = None
    """None: whom ssh itself would take."""
    port: int | None = None

    def __str__(self) -> str:
        return (f"{self.user}@" if self.user else "") + self.host + (f":{self.port}" if self.port else "")

    @property
    def typed(self) -> str:
        """The beginning of an ssh command, for people to try."""
        return f"ssh {f'-p {self.port} ' if self.port else ''}{f'{self.user}@' if self.user else ''}{self.host}"


@dataclass(frozen=True, slots=True)
class RemoteLibvirt:
    """`qemu+ssh://root@lab1:22/system`."""

    ssh: SshAddress
    socket: str | None
    """Of libvirtd there, if it is not in a usual place."""


def remote_libvirt(uri: str) -> RemoteLibvirt:
    """Raises ConfigError for a URI that cannot be meant, or that asks for what is set elsewhere."""
    parts, port = _split(uri)
    host, user = parts.hostname or "", parts.username
    if not _HOST.fullmatch(host):
        raise ConfigError(f"hypervisor URI {uri!r} names no host", hint="write it like qemu+ssh://root@lab1/system")
    if parts.password is not None:
        raise ConfigError(f"hypervisor URI {uri!r} holds a password", hint="log in with a key: key_file")
    if user is not None and not _USER.fullmatch(user):
        raise ConfigError(f"hypervisor URI {uri!r}: {user!r} is no user's name")
    if parts.path != "/system" or parts.fragment:
        raise ConfigError(f"hypervisor URI {uri!r} does not end in /system", hint="write qemu+ssh://root@lab1/system")
    asked = parse_qs(parts.query, keep_blank_values=True)
    socket = asked.pop("socket", [None])[0]
    if asked:
        raise ConfigError(
            f"hypervisor URI {uri!r}: {', '.join(sorted(asked))} is not used here",
            hint="the key to log in with is key_file, the host's own is host_key; the rest belongs into ~/.ssh/config",
        )
    if socket is not None and not _SOCKET.fullmatch(socket):
        raise ConfigError(f"hypervisor URI {uri!r}: {socket!r} is no path of a socket")
    return RemoteLibvirt(SshAddress(host, user, port), socket)


def _split(uri: str) -> tuple[SplitResult, int | None]:
    try:
        parts = urlsplit(uri)
        return parts, parts.port
    except ValueError as error:
        raise ConfigError(f"hypervisor URI {uri!r} cannot be read: {error}") from None
