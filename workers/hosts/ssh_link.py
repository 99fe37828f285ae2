"""One SSH connection to a host, by OpenSSH itself, and everything that goes over it.

A master connection (ControlMaster) is logged in once; shells and forwarded sockets are channels of it. OpenSSH rather
than a library, because only it forwards to a unix socket there, and because it already knows the administrator's
keys, jump hosts and known hosts. A login costs a tenth of a second at best, half a second on a busy host (measured),
so shells stay, and are asked one thing after the other.

Host keys are never accepted on sight: the pinned one, or the user's own known_hosts, or nothing. The master is a child
that ends with this process, also after a kill: it ends when its input does.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from workers.contract.errors import DiskError, HypervisorRefused, HypervisorUnreachable
from workers.hosts.address import SshAddress
from workers.hosts.ssh_shell import Gone, Shell

CONNECT_SECONDS = 10
ALIVE_SECONDS = 5
"""Between keep-alives; three that are not answered end the connection."""
SHELLS = 6
"""At once; an sshd allows ten sessions on one connection unless told otherwise."""
_PREFIX = "ssh-"
_ALIAS = "stillframe-pinned"
_LONGEST = 107  # bytes of a unix socket's path
_MASTER_EXTRA = 17  # what ssh adds to the path of its control socket while it makes it


@dataclass(frozen=True, slots=True)
class Login:
    """How to log in. `name` is the hypervisor's in the configuration, for hints."""

    address: SshAddress
    name: str
    key_file: Path | None = None
    host_key: str | None = None
    """`ssh-ed25519 AAAA…`; None: it must be in the user's known_hosts."""


class SshLink:
    """Thread-safe. Connects when it is needed, and again when the connection was lost."""

    def __init__(self, login: Login, runtime_dir: Path) -> None:
        self.login = login
        self._runtime = runtime_dir
        self._lock = threading.RLock()
        self._folder: Path | None = None
        self._master: Shell | None = None
        self._idle: list[Shell] = []
        self._turns = threading.BoundedSemaphore(SHELLS)
        self._forwards = 0

    # --- the connection ----------------------------------------------------------------------------------------

    def _base(self) -> list[str]:
        """ssh, strict; without a master of its own."""
        login, address = self.login, self.login.address
        options = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "UpdateHostKeys": "no",
            "ConnectTimeout": str(CONNECT_SECONDS),
            "ServerAliveInterval": str(ALIVE_SECONDS),
            "ServerAliveCountMax": "3",
            "Ciphers": "^aes128-gcm@openssh.com,aes256-gcm@openssh.com",
            "ControlPersist": "no",
            "ForwardAgent": "no",
            "ForwardX11": "no",
            "PermitLocalCommand": "no",
            "RemoteCommand": "none",
            "RequestTTY": "no",
            "LogLevel": "ERROR",
        }
        if login.host_key is not None:
            options |= {
                "UserKnownHostsFile": str(self._known_hosts(login.host_key)),
                "GlobalKnownHostsFile": "/dev/null",
                "HostKeyAlias": _ALIAS,
                "CheckHostIP": "no",
            }
        argv = ["ssh"]
        for key, value in options.items():
            argv += ["-o", f"{key}={value}"]
        if login.key_file is not None:
            argv += ["-i", str(login.key_file), "-o", "IdentitiesOnly=yes"]
        if address.user is not None:
            argv += ["-l", address.user]
        if address.port is not None:
            argv += ["-p", str(address.port)]
        return argv

    def _known_hosts(self, host_key: str) -> Path:
        """A file with the pinned key. It stays: a guard that outlives this process needs it."""
        line = f"{_ALIAS} {' '.join(host_key.split()[:2])}\n"
        path = self._runtime / f"host-key-{hashlib.sha256(line.encode()).hexdigest()[:16]}"
        if not path.exists() or path.read_text() != line:
            self._runtime.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
            partial.write_text(line)
            partial.replace(path)
        return path

    def folder(self) -> Path:
        """Of this process's own, for sockets; those of processes that are gone are removed."""
        with self._lock:
            if self._folder is None:
                self._folder = _own_folder(self._runtime)
            return self._folder

    def alone(self) -> list[str]:
        """An ssh command up to the words of the program, with a connection of its own."""
        return [*self._base(), "-o", "ControlPath=none", "--", self.login.address.host]

    def _over_master(self, *options: str) -> list[str]:
        control = ["-o", "ControlMaster=no", "-o", f"ControlPath={self.folder() / 'master'}"]
        return [*self._base(), *control, *options, "--", self.login.address.host]

    def _connected(self) -> Shell:
        """The master. Raises HypervisorUnreachable, HypervisorRefused."""
        with self._lock:
            if self._master is None or not self._master.alive:
                self._drop()
                if self.login.key_file is not None and not self.login.key_file.is_file():
                    raise HypervisorRefused(
                        f"cannot log in to {self.login.address}: there is no key {self.login.key_file}",
                        hint=f"ssh-keygen -t ed25519 -f {self.login.key_file}",
                    )
                control = self.folder() / "master"
                control.unlink(missing_ok=True)
                master = ["-o", "ClearAllForwardings=yes", "-o", "ControlMaster=yes", "-o", f"ControlPath={control}"]
                argv = [*self._base(), *master, "--", self.login.address.host, "exec /bin/sh"]
                try:
                    self._master = Shell(argv, timeout=3 * CONNECT_SECONDS)
                    self._idle.append(self._master)  # the connection's own shell serves as well as any
                except Gone as gone:
                    raise refusal(self.login, gone.words) from None
                except FileNotFoundError:
                    raise HypervisorRefused(
                        "ssh is not installed here", hint="apt-get install openssh-client"
                    ) from None
            return self._master

    def _drop(self) -> None:
        shells = [*self._idle, *([self._master] if self._master is not None else [])]
        self._idle, self._master = [], None
        for shell in shells:
            shell.close()

    # --- what goes over it -------------------------------------------------------------------------------------

    @contextmanager
    def shell(self) -> Iterator[Shell]:
        """A shell there, for one user at a time. It is not used again if it was left in the middle of something."""
        with self._turns:
            shell = self._free_shell()
            try:
                yield shell
            except Gone as gone:
                raise HypervisorUnreachable(
                    f"the connection to {self.login.address} was lost{': ' if gone.words else ''}{gone.words}",
                    hint=f"{self.login.address.typed} true",
                ) from None
            finally:
                with self._lock:
                    if shell.alive and shell.ready and self._master is not None and self._master.alive:
                        self._idle.append(shell)
                    elif shell is not self._master:  # others work over that one: it stays, unused
                        shell.close()

    def _free_shell(self) -> Shell:
        with self._lock:
            self._connected()
            while self._idle:
                shell = self._idle.pop()
                if shell.alive:
                    return shell
                if shell is not self._master:
                    shell.close()
        try:
            return Shell([*self._over_master(), "exec /bin/sh"], timeout=3 * CONNECT_SECONDS)
        except Gone as gone:
            raise refusal(self.login, gone.words) from None

    @contextmanager
    def forwarded(self, path: Path) -> Iterator[Path]:
        """A socket here that leads to the one there."""
        here = self._forward(path)
        try:
            yield here
        finally:
            if self._folder is not None:
                self._control("cancel", f"{here}:{_as_field(path)}")
                here.unlink(missing_ok=True)

    def _forward(self, path: Path) -> Path:
        with self._lock:
            self._connected()
            self._forwards += 1
            here = self.folder() / f"f{self._forwards}"
            done = self._control("forward", f"{here}:{_as_field(path)}")
        if done:
            raise HypervisorUnreachable(f"{self.login.address}: {path} cannot be forwarded: {done}")
        return here

    def _control(self, what: str, forward: str) -> str:
        """What went wrong, if anything did."""
        argv = self._over_master("-O", what, "-L", forward)
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
            )
        except subprocess.TimeoutExpired:
            return "no answer within 30 s"
        return (done.stderr.strip() or f"exit {done.returncode}") if done.returncode else ""

    def close(self) -> None:
        with self._lock:
            self._drop()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder = None


def _as_field(path: Path) -> str:
    """A path in ssh's `here:there`: colons and tokens of its own escaped. Raises DiskError for what cannot be."""
    if "${" in str(path):
        raise DiskError(f"{path} cannot be reached over SSH: its name looks like a variable to ssh")
    return str(path).replace("\\", "\\\\").replace(":", "\\:").replace("%", "%%")


def _own_folder(runtime: Path) -> Path:
    def fits(base: Path) -> bool:
        return len(str(base / f"{_PREFIX}{os.getpid()}-12345678/master").encode()) + _MASTER_EXTRA <= _LONGEST

    base = next((base for base in (runtime, Path(tempfile.gettempdir())) if fits(base)), Path("/tmp"))
    base.mkdir(parents=True, exist_ok=True)
    for old in base.glob(f"{_PREFIX}*-*"):
        found = re.fullmatch(rf"{_PREFIX}(\d+)-\w{{8}}", old.name)
        if found and not Path("/proc", found[1]).exists():
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))


def refusal(login: Login, words: str) -> HypervisorUnreachable:
    """What ssh said when it could not connect, as an error that says what to do."""
    address = login.address
    said = [line for line in words.splitlines() if line.strip(" @")]
    last = said[-1] if said else "ssh ended without a word"
    if "IDENTIFICATION HAS CHANGED" in words or ("verification failed" in words and login.host_key is not None):
        found = re.search(r"SHA256:\S+", words)
        return HypervisorRefused(
            f"THE HOST KEY OF {address} HAS CHANGED{f' (it is {found[0].rstrip(chr(46))} now)' if found else ''}: "
            "somebody may be in between, and nothing was sent",
            hint=f"if the host was installed anew: stillframe hypervisor add {login.name} --new-key",
        )
    if "verification failed" in words or "No host key is known" in words:
        return HypervisorRefused(
            f"the host key of {address} is not known", hint=f"stillframe hypervisor add {login.name} shows and pins it"
        )
    if "bad permissions" in words or "UNPROTECTED" in words:
        return HypervisorRefused(
            f"ssh does not use the key {login.key_file}: others can read it", hint=f"chmod 600 {login.key_file}"
        )
    if "Permission denied" in words or "Too many authentication" in words:
        key = f"-i {login.key_file}.pub " if login.key_file else ""
        return HypervisorRefused(
            f"{address} refuses the login: {last}",
            hint=f"ssh-copy-id {key}{f'-p {address.port} ' if address.port else ''}"
            f"{f'{address.user}@' if address.user else ''}{address.host}",
        )
    return HypervisorUnreachable(f"cannot connect to {address}: {last}", hint=f"{address.typed} true")


def host_keys(address: SshAddress) -> list[str]:
    """The keys that a host shows to whoever asks, as `type base64`, the strongest kind first. Nobody vouches for them:
    they are for people to compare. Raises HypervisorUnreachable."""
    port = ["-p", str(address.port)] if address.port else []
    argv = ["ssh-keyscan", "-T", str(CONNECT_SECONDS), *port, "-t", "ed25519,ecdsa,rsa", "--", address.host]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    found = [line.split()[1:3] for line in done.stdout.splitlines() if line and not line.startswith("#")]
    if not found:
        why = [line for line in done.stderr.splitlines() if not line.startswith("#")]
        raise HypervisorUnreachable(
            f"{address} shows no host key: {why[-1] if why else 'no answer'}", hint=f"{address.typed} true"
        )
    order = {"ssh-ed25519": 0}
    return [" ".join(key) for key in sorted(found, key=lambda key: order.get(key[0], 1))]


def fingerprint(host_key: str) -> str:
    """`SHA256:…`, as ssh shows it."""
    with suppress(ValueError, IndexError):
        digest = hashlib.sha256(base64.b64decode(host_key.split()[1], validate=True)).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")
    return "unreadable"
