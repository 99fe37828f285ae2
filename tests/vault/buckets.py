"""Real S3 servers on the loopback, each another implementation, and stores in their buckets.

moto is the emulation of Amazon's that has most of it (Object Lock, versions, addressing by host) but checks no
credentials. localbucket keeps files, honours conditional creates, and drops metadata. nanio checks signatures, and does
not know conditional creates: a vault must refuse it.
"""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers.config import S3Access
from workers.vault.s3 import S3Store
from workers.vault.s3_client import Patience, make_client

KEY_ID, SECRET = "tester-key-id", "tester-secret-key"
QUICK = Patience(attempts=12, first_wait=0.005, longest_wait=0.05, connect_timeout=5, read_timeout=20)
START_SECONDS = 60


@dataclass
class Server:
    """A running S3 server. It has the buckets `plain` and, where it knows Object Lock, `locked`."""

    port: int
    access: S3Access
    data: Path | None = None
    """Where it keeps objects as files, if it does."""
    made: list[Any] = field(default_factory=list)
    """Stores and clients."""

    def through(self, port: int) -> Server:
        """The same by way of a proxy."""
        endpoint = f"http://127.0.0.1:{port}"
        return Server(port, self.access.model_copy(update={"endpoint": endpoint}))

    def url(self, bucket: str = "plain") -> str:
        return f"s3://{bucket}/{secrets.token_hex(6)}"

    def store(self, url: str, *, create: bool = False, patience: Patience = QUICK, **options: Any) -> S3Store:
        """Closed by `close`."""
        made = S3Store(url, self.access, create=create, patience=patience, **options)
        self.made.append(made)
        return made

    def client(self) -> Any:
        """Closed by `close`."""
        made = make_client(self.access, QUICK)
        self.made.append(made)
        return made

    def close(self) -> None:
        while self.made:
            self.made.pop().close()


def write_credentials(path: Path, key_id: str = KEY_ID, secret: str = SECRET) -> Path:
    path.write_text(f"[default]\naws_access_key_id = {key_id}\naws_secret_access_key = {secret}\n")
    path.chmod(0o600)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(argv: list[str], port: int, log: Path, env: Mapping[str, str] | None = None) -> Iterator[None]:
    """A server process, from when it answers until the block ends."""
    with log.open("wb") as output, subprocess.Popen(argv, stdout=output, stderr=output, env=env) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{argv[0]} does not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.05)
            yield
        finally:
            process.kill()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


@contextmanager
def serving(folder: Path, kind: str, *, tls: tuple[Path, Path] | None = None) -> Iterator[Server]:
    """A server of one kind, with its buckets; `tls` is certificate and key (moto only)."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    secure = ["-c", str(tls[0]), "-k", str(tls[1])] if tls else []
    (folder / "data").mkdir()
    options = folder / "nanio.toml"
    options.write_text(f'[[users]]\naccess_key = "{KEY_ID}"\nsecret_key = "{SECRET}"\n')
    options.chmod(0o600)
    data = str(folder / "data")
    where = ["--host", "127.0.0.1", "--port", str(port)]
    argv = {
        "moto": [_program("moto_server"), "-H", "127.0.0.1", "-p", str(port), *secure],
        "localbucket": [_program("localbucket"), *where, data],
        "nanio": [_program("nanio"), "serve", "--options", str(options), "--data-dir", data, "--no-access-log", *where],
    }[kind]
    access = S3Access(
        endpoint=f"{'https' if tls else 'http'}://127.0.0.1:{port}",
        path_style=True,
        ca_file=tls[0] if tls else None,
        credentials_file=write_credentials(folder / "credentials"),
    )
    with ExitStack() as stack:
        stack.enter_context(running(argv, port, folder / "log"))
        server = Server(port, access, folder / "data" if kind == "localbucket" else None)
        stack.callback(server.close)
        client = server.client()
        client.create_bucket(Bucket="plain")
        if kind == "moto":
            client.create_bucket(Bucket="locked", ObjectLockEnabledForBucket=True)
        yield server
