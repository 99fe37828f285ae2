"""The key by which the controller signs what guests run as root. It never leaves the controller's host."""

from __future__ import annotations

import os
import re
import secrets
import stat
import tempfile
from pathlib import Path

from orchestrator.config import public_key_file
from workers.contract.errors import ConfigError


def ensure_signing_key(path: Path) -> str:
    """The public half (64 hex digits) of the Ed25519 key at `path`, which is made if there is none; it is written
    beside it, for those who only verify. Raises ConfigError."""
    if not path.exists():
        make_signing_key(path)
    public = public_key(read_signing_key(path))
    beside = public_key_file(path)
    try:
        if not beside.exists() or beside.read_bytes().strip() != public.encode():
            fresh = _written(beside, public + "\n", 0o644)
            fresh.replace(beside)
    except OSError as error:
        raise _unwritable(beside, error) from None
    return public


def make_signing_key(path: Path) -> None:
    """Write a new Ed25519 key to `path`, for its owner alone, whole or not at all. One that is there stays.
    Raises ConfigError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = _written(path, secrets.token_hex(32) + "\n", 0o600)
        try:
            path.hardlink_to(fresh)
        except FileExistsError:
            pass  # somebody was faster: that one it is
        finally:
            fresh.unlink()
    except OSError as error:
        raise _unwritable(path, error) from None


def read_signing_key(path: Path) -> bytes:
    """The raw private key. Raises ConfigError if it cannot be read, by more than its owner, or is no key."""
    try:
        mode, text = path.stat().st_mode, path.read_bytes()[:4096].strip()
    except OSError as error:
        raise ConfigError(
            f"cannot read signing key {path}: {error.strerror}",
            hint="set signing_key under [extension]; `stillframe extension build` makes one where none is",
        ) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"signing key {path} is open to others than its owner", hint=f"chmod 600 {path}")
    if not re.fullmatch(rb"[0-9a-fA-F]{64}", text):
        raise ConfigError(
            f"{path} is no signing key: it should hold 64 hex digits",
            hint="put the right one there, or set signing_key under [extension] to a file that is not there yet",
        )
    return bytes.fromhex(text.decode())


def public_key(private: bytes) -> str:
    """64 hex digits."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw().hex()


def _written(path: Path, text: str, mode: int) -> Path:
    """A new durable file beside `path`."""
    file, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # 0600
    with os.fdopen(file, "w") as out:
        out.write(text)
        out.flush()
        os.fchmod(file, mode)
        os.fsync(file)
    return Path(name)


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path} cannot be written: {error.strerror}", hint="set signing_key under [extension]")
