"""Builds and signs extension packages from what is in `extensions/` and from folders of the user's own.

The private key is the controller's alone: workers and guests hold what it signed, and whoever takes over a worker can
put nothing of his own into guests. The same content is the same package: its build number is a hash of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import tempfile
import time
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import extensions
from orchestrator.config import ExtensionSettings
from orchestrator.extension_content import ENTRY, SYSTEMS, Files, content, is_shipped, mode_of
from orchestrator.extension_key import ensure_signing_key, public_key, read_signing_key
from workers.contract.errors import ConfigError, PackageRefused
from workers.contract.guests import GuestOs
from workers.contract.seams import Package
from workers.guests.package import NAME, SCHEMA, VERBS, full_version, is_for, key_id, open_package, packages

_TIME_LIMITS = {"probe": 30, "install": 60, "enable": 30, "uninstall": 60, "status": 20, "quiesce": 180, "resume": 180}


def ensure_packages(settings: ExtensionSettings) -> list[Path]:
    """The packages of the present content, made where they are missing. None where nothing is to be installed, or the
    private key is elsewhere. Quick if nothing has changed. Raises ConfigError."""
    if not settings.install or not settings.signing_key.exists():
        return []
    private = read_signing_key(settings.signing_key)
    if settings.public_key != public_key(private):
        raise ConfigError(f"{settings.signing_key} is not the key that is trusted", hint="stillframe extension build")
    return [build(system, private, settings.packages, settings.apps) for system in SYSTEMS if is_shipped(system)]


def make_packages(settings: ExtensionSettings, systems: Iterable[GuestOs] | None = None) -> list[Path]:
    """The same for `systems` (all that this installation has), and the key too if there is none. Raises ConfigError."""
    key, trusted = settings.signing_key, settings.trusted_key
    if trusted is not None and not key.exists():
        raise ConfigError(
            f"public_key under [extension] is set, and there is no signing key {key}: packages are signed elsewhere",
            hint=f"stillframe extension build on the controller, and copy its packages to {settings.packages}",
        )
    public = ensure_signing_key(key)
    if trusted not in (None, public):
        raise ConfigError(
            f"public_key under [extension] is not the one of {key}",
            hint=f'public_key = "{public}" there, or leave it out',
        )
    wanted = [system for system in SYSTEMS if is_shipped(system)] if systems is None else systems
    private = read_signing_key(key)
    return [build(system, private, settings.packages, settings.apps) for system in wanted]


def current_name(system: GuestOs, apps: Iterable[Path] = ()) -> str:
    """Name of the package of the present content. Raises ConfigError."""
    return _name(system, _build_of(content(system, apps)))


def _name(system: GuestOs, build: str) -> str:
    return f"{NAME}-{full_version(extensions.VERSION, build)}-{system.value}.zip"


def build(system: GuestOs, private: bytes, folder: Path, apps: Iterable[Path] = ()) -> Path:
    """The package of the present content for `system` in `folder`, made unless it is there. Older ones are removed:
    what lies there is what is put into guests. Raises ConfigError."""
    files = content(system, apps)
    number = _build_of(files)
    path = folder / _name(system, number)
    public = public_key(private)
    others = [old for old in packages(folder) if is_for(system, old) and old != path]
    if not _is_current(_opened(path, public)):
        serials = [found.serial for old in (path, *others) if (found := _opened(old, public))]
        # A clock that was set back must not make of the newest package a downgrade.
        serial = max(int(time.time()), *(serial + 1 for serial in serials), 0)
        manifest = _manifest(system, files, number, serial, public)
        _write(path, _signed(manifest, files, private))
    for old in others:
        old.unlink(missing_ok=True)
    return path


def _opened(path: Path, public: str) -> Package | None:
    try:
        return open_package(path, public)
    except PackageRefused:
        return None


def _is_current(found: Package | None) -> bool:
    return found is not None and found.time_limits == _TIME_LIMITS


def _build_of(files: Files) -> str:
    state = hashlib.sha256()
    for name in sorted(files):
        state.update(f"{mode_of(name)} {hashlib.sha256(files[name]).hexdigest()} {name}\n".encode())
    return state.hexdigest()[:12]


def _manifest(system: GuestOs, files: Files, number: str, serial: int, public: str) -> bytes:
    manifest = {
        "schema": SCHEMA,
        "name": NAME,
        "version": extensions.VERSION,
        "build": number,
        "serial": serial,
        "os": system.value,
        "contract": extensions.CONTRACT,
        "key_id": key_id(bytes.fromhex(public)),
        "commands": dict.fromkeys(VERBS, ENTRY[system]),
        "time_limits": _TIME_LIMITS,
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "mode": mode_of(name)}
            for name, data in sorted(files.items())
        },
    }
    return json.dumps(manifest, indent=1, sort_keys=True).encode()


def _signed(manifest: bytes, files: Files, private: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    signature = Ed25519PrivateKey.from_private_bytes(private).sign(manifest)
    members = {"manifest.json": (manifest, "0644"), "manifest.sig": (signature, "0644")}
    members |= {f"payload/{name}": (data, mode_of(name)) for name, data in sorted(files.items())}
    return pack(members)


def pack(members: Mapping[str, tuple[bytes, str]]) -> bytes:
    """A zip file of name → (data, mode), with no time of today in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, (data, mode) in members.items():
            member = zipfile.ZipInfo(name)
            member.create_system = 3  # Unix: the modes below mean something
            member.external_attr = (stat.S_IFREG | int(mode, 8)) << 16
            archive.writestr(member, data, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def _write(path: Path, data: bytes) -> None:
    """In place by rename: whoever reads meanwhile finds the old one, or the new one whole. Raises ConfigError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        file, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
        with os.fdopen(file, "wb") as out:
            out.write(data)
            out.flush()
            os.fchmod(file, 0o644)
            os.fsync(file)
        Path(name).replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}", hint="set state under [paths] to a folder that can be"
        ) from None
