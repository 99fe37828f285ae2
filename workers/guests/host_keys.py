"""Which SSH host key a guest must show before anything is sent to it.

Either the configuration says it, or the one seen first is pinned under the machine's UUID: an address can pass to
another machine, a UUID cannot. It is pinned only after the guest has accepted our own key, so that a mistyped address
does not pin a stranger. A key that differs is refused, never replaced: only a person knows whether the guest was
reinstalled or somebody stands in between.

The file holds a line per machine, `UUID kind base64`, like `known_hosts`, for people to read and cut. It is replaced
as a whole (a reader never sees half of it) under a lock (two processes that pin at once both stay pinned). A file that
cannot be understood, or that others may write to, trusts nobody.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from workers.contract.errors import HostKeyRefused


@dataclass(frozen=True, slots=True)
class HostKey:
    """A public key of an SSH server."""

    kind: str
    """`ssh-ed25519`."""
    data: bytes

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` prints it."""
        return "SHA256:" + base64.b64encode(hashlib.sha256(self.data).digest()).decode().rstrip("=")

    def __str__(self) -> str:
        return f"{self.kind} {base64.b64encode(self.data).decode()}"

    @classmethod
    def parse(cls, text: str) -> HostKey:
        """`ssh-ed25519 AAAA… comment`, as in a `.pub` file. Raises ValueError."""
        words = text.split()
        if len(words) < 2:
            raise ValueError("it must be `ssh-ed25519 AAAA…`, as in /etc/ssh/ssh_host_ed25519_key.pub")
        try:
            data = base64.b64decode(words[1], validate=True)
        except binascii.Error:
            raise ValueError(f"its second word is not base64: {words[1][:40]}") from None
        # The data begins with the length and the name of the kind: half a key, or two mixed up, shows here.
        name = words[0].encode()
        if not data.startswith(len(name).to_bytes(4, "big") + name):
            raise ValueError(f"it does not hold a key of the kind {words[0]}")
        return cls(words[0], data)


class HostKeyPolicy(Protocol):
    """Which host key is right for one guest. Raises HostKeyRefused."""

    def expected(self) -> HostKey | None:
        """The only key that is right; None: any, this once."""
        ...

    def check(self, seen: HostKey) -> None:
        """Called before anything is sent. Raises HostKeyRefused if `seen` is not the expected one."""
        ...

    def accept(self, seen: HostKey) -> None:
        """Called after the guest has let us in: what is right from now on."""
        ...


class ConfiguredKey:
    """The key that `host_key` in the configuration names."""

    def __init__(self, text: str) -> None:
        """Raises HostKeyRefused for a text that is no key."""
        try:
            self._key = HostKey.parse(text)
        except ValueError as error:
            raise HostKeyRefused(f"host_key in the configuration is not a key: {error}", hint=_CONFIGURE) from None

    def expected(self) -> HostKey:
        return self._key

    def check(self, seen: HostKey) -> None:
        if seen != self._key:
            raise HostKeyRefused(
                f"the guest shows the SSH host key {seen.fingerprint} ({seen.kind}), and the configuration says "
                f"{self._key.fingerprint} ({self._key.kind}): nothing was sent",
                hint=f"if the guest was reinstalled: {_CONFIGURE}",
            )

    def accept(self, seen: HostKey) -> None:
        self.check(seen)


class PinnedKey:
    """The key that was seen first at the machine `uuid`, kept in `path`."""

    def __init__(self, path: Path, uuid: str) -> None:
        self._path = path
        self._uuid = uuid.lower()
        if len(self._uuid.split()) != 1 or self._uuid.startswith("#"):
            raise ValueError(f"{uuid!r} is no UUID")

    def expected(self) -> HostKey | None:
        return self._read().get(self._uuid)

    def check(self, seen: HostKey) -> None:
        known = self.expected()
        if known is not None and known != seen:
            raise HostKeyRefused(
                f"the guest shows the SSH host key {seen.fingerprint} ({seen.kind}), and {known.fingerprint} "
                f"({known.kind}) was seen first: nothing was sent",
                hint=f"if the guest was reinstalled, type: sed -i '/^{self._uuid} /d' {self._path}; "
                "if not, somebody may stand in between",
            )

    def accept(self, seen: HostKey) -> None:
        if self.expected() == seen:
            return
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(self._path.with_name(self._path.name + ".lock")):
            # Another process may have pinned one since the last look.
            self.check(seen)
            self._append(f"{self._uuid} {seen}\n")

    def _append(self, line: str) -> None:
        """Through a new file; `mkstemp` gives it the mode 0600."""
        before = self._path.read_text() if self._path.exists() else ""
        if before and not before.endswith("\n"):
            before += "\n"
        handle, name = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
        fresh = Path(name)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(before + line)
                file.flush()
                os.fsync(file.fileno())
            fresh.rename(self._path)
        except BaseException:
            fresh.unlink()
            raise

    def _read(self) -> dict[str, HostKey]:
        found: dict[str, HostKey] = {}
        for number, line in enumerate(self._text().splitlines(), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            uuid, _, key = line.partition(" ")
            try:
                if uuid in found:
                    raise ValueError("a machine has two lines")
                found[uuid] = HostKey.parse(key)
            except ValueError as error:
                raise HostKeyRefused(
                    f"{self._path}, line {number}, cannot be understood ({error}): no host key is trusted",
                    hint=f"correct it or remove it: sed -i {number}d {self._path}",
                ) from None
        return found

    def _text(self) -> str:
        try:
            with self._path.open() as file:
                mode = os.fstat(file.fileno()).st_mode
                if mode & (stat.S_IWGRP | stat.S_IWOTH):
                    raise HostKeyRefused(
                        f"{self._path} can be written by others: no host key in it is trusted",
                        hint=f"look at it, then: chmod 600 {self._path}",
                    )
                return file.read()
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise HostKeyRefused(f"the pinned host keys cannot be read: {error}: no host key is trusted") from None


def host_key_policy(configured: str | None, pins: Path, uuid: str) -> HostKeyPolicy:
    """`configured` (GuestAccess.host_key) if it is there, else what is pinned in `pins` for the machine `uuid`.
    Raises HostKeyRefused for a configured text that is no key."""
    return ConfiguredKey(configured) if configured is not None else PinnedKey(pins, uuid)


_CONFIGURE = (
    'put the text of the guest\'s /etc/ssh/ssh_host_ed25519_key.pub into host_key of its section [guests."…"], '
    "or remove host_key to pin the key that is seen first"
)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
