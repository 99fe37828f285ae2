"""Connections and sessions of the SSH channel: what paramiko does, with time limits and our errors.

paramiko waits without limit in some places (the reply to a request, a full window). So every session has a timer that
closes it at the deadline, which makes all waiting calls return. It is imported late: that costs a second.
"""

from __future__ import annotations

import contextlib
import io
import logging
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from workers.contract.errors import GuestError, GuestTimeout, HostKeyRefused
from workers.contract.guests import Ran
from workers.guests.host_keys import HostKey, HostKeyPolicy

_DEAD_WIRE_MS = 30_000
"""A wire that acknowledges nothing for so long is cut."""
_KEEPALIVE_SECONDS = 15
_PIECE = 64 << 10
_COMMAND_LIMIT = (128 << 10) - 1
"""Linux gives no program a longer argument, and the command is one for the guest's shell."""


# --- connections -----------------------------------------------------------------------------------------------


def connect(address: str, port: int, user: str, key: Path | bytes, policy: HostKeyPolicy, seconds: float) -> Any:
    """An authenticated connection (paramiko's Transport). Raises GuestError; HostKeyRefused before anything that
    concerns `user` or `key` is sent."""
    import paramiko

    # Whatever goes wrong is told by our errors; paramiko would print tracebacks of its own.
    logging.getLogger("paramiko").setLevel(logging.CRITICAL)
    private, expected = load_key(key), policy.expected()
    deadline = time.monotonic() + seconds
    where = f"{address}:{port}"
    try:
        wire = socket.create_connection((address, port), seconds)
    except OSError as error:
        raise GuestError(
            f"no SSH connection to {where}: {error.strerror or error}",
            hint="is sshd running in the guest, and its port open for this host?",
        ) from None
    # Requests are small and answered one by one: collecting them costs 40 ms each.
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_WIRE_MS)
    link = paramiko.Transport(wire)
    link.banner_timeout = link.handshake_timeout = seconds
    try:
        with _our_errors(where):
            seen = _host_key(link, expected, deadline - time.monotonic(), where)
            policy.check(seen)
            _log_in(link, user, private, deadline - time.monotonic(), where)
            policy.accept(seen)
            link.set_keepalive(_KEEPALIVE_SECONDS)
    except BaseException:
        link.close()
        raise
    return link


@contextmanager
def _our_errors(where: str) -> Iterator[None]:
    import paramiko

    try:
        yield
    except (paramiko.SSHException, EOFError, OSError) as error:
        words = str(error) or type(error).__name__
        raise GuestError(f"the SSH connection to {where} failed: {words}") from None


def _host_key(link: Any, expected: HostKey | None, seconds: float, where: str) -> HostKey:
    """The server's host key, after the key exchange, which has proved that the server owns it."""
    import paramiko

    if expected is not None:
        # A server has keys of several kinds: only that of the known one's kind can be compared with it.
        kinds = ("rsa-sha2-512", "rsa-sha2-256") if expected.kind == "ssh-rsa" else (expected.kind,)
        try:
            link.get_security_options().key_types = kinds
        except ValueError:
            raise HostKeyRefused(f"SSH host keys of the kind {expected.kind} are not supported here") from None
    try:
        link.start_client(timeout=max(seconds, 0.1))
        key = link.get_remote_server_key()
    except paramiko.ssh_exception.IncompatiblePeer as error:
        if expected is None or "host key" not in str(error):
            raise
        raise HostKeyRefused(
            f"{where} shows no SSH host key of the kind {expected.kind}, and {expected.fingerprint} of that kind is "
            "expected: nothing was sent",
            hint="if the guest was reinstalled, remove what is known of it: the pinned line or host_key",
        ) from None
    return HostKey(key.get_name(), key.asbytes())


def _log_in(link: Any, user: str, private: Any, seconds: float, where: str) -> None:
    import paramiko

    link.auth_timeout = max(seconds, 0.1)
    try:
        missing = link.auth_publickey(user, private)
    except paramiko.AuthenticationException as error:
        if "timeout" in str(error).lower():
            raise GuestError(f"{where} did not say in time whether it accepts the key of {user}") from None
        missing = [str(error)]
    if missing or not link.is_authenticated():
        raise GuestError(
            f"{where} does not let {user} in with this key ({', '.join(missing)})",
            hint=f"put this line into ~{user}/.ssh/authorized_keys in the guest: "
            f"{private.get_name()} {private.get_base64()}",
        )


def load_key(key: Path | bytes) -> Any:
    """A private key (paramiko's PKey) from a file, or from its text: OpenSSH or PEM, without a passphrase.
    Raises GuestError, also for a file that others may read."""
    import paramiko
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    name = str(key) if isinstance(key, Path) else "the SSH key"
    text = _key_text(key) if isinstance(key, Path) else key
    try:
        try:
            found: Any = forms.load_ssh_private_key(text, None)
        except ValueError:
            found = forms.load_pem_private_key(text, None)
    except TypeError:
        raise GuestError(f"{name} needs a passphrase", hint="use a key without one") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise GuestError(f"{name} is no private key that can be used: {error}") from None
    kinds: dict[Any, Any] = {
        ed25519.Ed25519PrivateKey: paramiko.Ed25519Key,
        rsa.RSAPrivateKey: paramiko.RSAKey,
        ec.EllipticCurvePrivateKey: paramiko.ECDSAKey,
    }
    for kind, made in kinds.items():
        if isinstance(found, kind):
            # One form for all: paramiko itself cannot read some (PKCS 8).
            form = found.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.OpenSSH, forms.NoEncryption())
            return made.from_private_key(io.StringIO(form.decode()))
    raise GuestError(f"{name} is of a kind that is not supported", hint="use an ed25519 key: ssh-keygen -t ed25519")


def _key_text(path: Path) -> bytes:
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise GuestError(f"others can read the SSH key {path}", hint=f"chmod 600 {path}")
        return path.read_bytes()
    except OSError as error:
        raise GuestError(f"the SSH key {path} cannot be read: {error.strerror or error}") from None


# --- sessions --------------------------------------------------------------------------------------------------


class Session:
    """One program on a connection, closed by itself `seconds` after its start unless `keep` is called."""

    def __init__(self, link: Any, command: str, seconds: float) -> None:
        """Raises GuestError; GuestTimeout when the server does not start it in time."""
        import paramiko

        encoded = command.encode("utf-8", "surrogateescape")
        if len(encoded) > _COMMAND_LIMIT:
            raise GuestError(
                f"the command is too long ({len(encoded)} bytes): the guest takes {_COMMAND_LIMIT}",
                hint="put what is long into a file, or on standard input",
            )
        self._seconds, self._expired, self._link = seconds, False, link
        deadline = time.monotonic() + seconds
        try:
            self.channel = link.open_session(timeout=seconds)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise GuestError(f"the guest's SSH server starts no session: {error}") from None
        self._timer = threading.Timer(max(deadline - time.monotonic(), 0), self._expire)
        self._timer.daemon = True
        self._timer.start()
        try:
            self.channel.exec_command(encoded)
        except (paramiko.SSHException, EOFError, OSError) as error:
            self.close()
            raise self._failure(f"the guest's SSH server starts no program: {error}") from None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def keep(self) -> None:
        """No time limit from now on."""
        self._timer.cancel()

    def close(self) -> None:
        self._timer.cancel()
        with contextlib.suppress(Exception):
            self.channel.close()

    def alive(self) -> bool:
        return not self.channel.closed and not self.channel.exit_status_ready() and bool(self._link.is_active())

    def finish(self, stdin: bytes, limit: int) -> Ran:
        """Feed and drain the program until it and all who hold its output have ended; `limit` bytes of each stream
        are kept. All streams at once: a program that waits for one of them to be read would never end."""
        out, err = _Kept(limit), _Kept(limit)
        helpers = [
            threading.Thread(target=self._feed, args=(stdin,), daemon=True),
            threading.Thread(target=_drain, args=(self.channel.recv_stderr, err), daemon=True),
        ]
        for helper in helpers:
            helper.start()
        _drain(self.channel.recv, out)
        helpers[1].join()
        code = self.channel.recv_exit_status()
        # Without the end of the streams, what is here may be half of them.
        if self._expired or code < 0 or not self.channel.eof_received:
            if not self._expired:
                # A connection that dies tells its sessions first: the next use must see it dead, and connect anew.
                self._link.join(1)
            raise self._failure("the SSH connection was lost before the program in the guest had ended")
        return Ran(code, bytes(out.data), bytes(err.data), out.more or err.more)

    def _feed(self, stdin: bytes) -> None:
        # A program may end, or be closed, without having read it.
        with contextlib.suppress(Exception):
            for start in range(0, len(stdin), _PIECE):
                self.channel.sendall(stdin[start : start + _PIECE])
            self.channel.shutdown_write()

    def _expire(self) -> None:
        self._expired = True
        self.channel.close()

    def _failure(self, words: str) -> GuestError:
        if self._expired:
            return GuestTimeout(f"a command in the guest did not end within {self._seconds:g} s; it may go on there")
        return GuestError(words)


class _Kept:
    def __init__(self, limit: int) -> None:
        self.data = bytearray()
        self.more = False
        self._limit = limit

    def add(self, piece: bytes) -> None:
        room = self._limit - len(self.data)
        self.data += piece[:room]
        self.more = self.more or len(piece) > room


def _drain(receive: Callable[[int], bytes], kept: _Kept) -> None:
    with contextlib.suppress(OSError):
        while piece := receive(_PIECE):
            kept.add(piece)


class Freezer:
    """A running `extensions/linux/freezer`: a line in, a line out. Its end, however it comes, is a thaw."""

    def __init__(self, link: Any, command: str, seconds: float) -> None:
        self._session = Session(link, command, seconds)
        self._session.keep()
        self._buffer = b""
        self._asking = threading.Lock()

    def alive(self) -> bool:
        return self._session.alive()

    def close(self) -> None:
        self._session.close()

    def ask(self, commands: str, answer: str, seconds: float) -> int:
        """Send `commands` (lines) and return N of the reply `answer N`. Raises GuestError with the freezer's own words
        for `error …`, or while another thread still waits for a reply; GuestTimeout."""
        if not self._asking.acquire(blocking=False):
            raise GuestError("the guest has not answered another question yet")
        try:
            line = self._answer(commands, time.monotonic() + seconds)
        except TimeoutError:
            raise GuestTimeout(
                f"the guest did not say `{answer}` within {seconds:g} s over SSH: it may still happen"
            ) from None
        except OSError as error:
            raise GuestError(f"the SSH session that freezes and thaws was lost: {error}") from None
        finally:
            self._asking.release()
        word, _, rest = line.partition(" ")
        if word == answer and rest.isdecimal():
            return int(rest)
        if word == "error":
            raise GuestError(f"the guest says: {rest}")
        raise GuestError(f"the guest answered {line[:200]!r} instead of `{answer}`")

    def _answer(self, commands: str, deadline: float) -> str:
        channel = self._session.channel
        channel.settimeout(max(deadline - time.monotonic(), 0.001))
        channel.sendall(commands.encode("utf-8", "surrogateescape"))
        while b"\n" not in self._buffer:
            channel.settimeout(max(deadline - time.monotonic(), 0.001))
            piece = channel.recv(_PIECE)
            if not piece:
                words = channel.recv_stderr(4096) if channel.recv_stderr_ready() else b""
                raise GuestError(
                    "the program that freezes and thaws over SSH has ended: "
                    + (words.decode(errors="replace").strip() or "the connection was lost")
                )
            self._buffer = (self._buffer + piece)[: 64 << 10]
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode(errors="replace")
