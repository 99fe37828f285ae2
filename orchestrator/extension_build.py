"""Builds and signs extension packages from what is in `extensions/` and from folders of the user's own.

The private key is the controller's alone: workers and guests hold what it signed, and whoever takes over a worker can
put nothing of his own into guests. The same content is the same package: its build number is a hash of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import time
import zipfile
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import extensions
from workers.contract.errors import ConfigError, PackageRefused, UsageError
from workers.contract.guests import GuestOs
from workers.guests.package import MAX_BYTES, NAME, full_version, key_id, open_package, packages

SYSTEMS = (GuestOs.LINUX, GuestOs.WINDOWS)
_APP = re.compile(r"^\d\d-[a-z0-9][a-z0-9_-]{0,40}$")
_EXECUTABLE = frozenset({"ext", "watchdog", "run"})
_VERBS = ("probe", "install", "enable", "uninstall", "status", "quiesce", "resume")
_TIME_LIMITS = {"probe": 30, "install": 60, "enable": 30, "uninstall": 60, "status": 20, "quiesce": 180, "resume": 180}
_ENTRY = {GuestOs.LINUX: "ext", GuestOs.WINDOWS: "ext.ps1"}
Files = dict[str, bytes]


# --- the key ---------------------------------------------------------------------------------------------------


def make_signing_key(path: Path) -> None:
    """Write a new Ed25519 key to `path`, for its owner alone. Raises ConfigError if it cannot be written, or exists."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    raw = Ed25519PrivateKey.generate().private_bytes_raw()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w") as out:
            out.write(raw.hex() + "\n")
            out.flush()
            os.fsync(file)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}", hint="set signing_key under [extension]"
        ) from None


def read_signing_key(path: Path) -> bytes:
    """The raw private key. Raises ConfigError if it cannot be read, by more than its owner, or is no key."""
    try:
        mode, text = path.stat().st_mode, path.read_text().strip()
        raw = bytes.fromhex(text)
    except OSError as error:
        raise ConfigError(
            f"cannot read signing key {path}: {error.strerror}", hint="stillframe init makes one"
        ) from None
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise ConfigError(f"{path} is no signing key (64 hex digits)", hint="stillframe init makes one where none is")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"signing key {path} can be read by others", hint=f"chmod 600 {path}")
    return raw


def public_key(private: bytes) -> str:
    """64 hex digits."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw().hex()


# --- the content -----------------------------------------------------------------------------------------------


def content(system: GuestOs, apps: Iterable[Path] = ()) -> Files:
    """What a package for `system` holds: our own files, and on Linux the folders `apps` in `apps/`, each in the place
    of ours of the same name. Raises UsageError for a folder that cannot be one."""
    with resources.as_file(resources.files(extensions) / system.value) as folder:
        files = _below(folder)
    if system is GuestOs.LINUX:
        for app in apps:
            files = {name: data for name, data in files.items() if not name.startswith(f"apps/{app.name}/")}
            files |= {f"apps/{app.name}/{name}": data for name, data in _app(app).items()}
    if sum(map(len, files.values())) > MAX_BYTES // 2:
        raise UsageError(f"the files of the {system} extension are larger than {MAX_BYTES >> 21} MiB")
    return files


def _app(folder: Path) -> Files:
    if not _APP.match(folder.name):
        raise UsageError(f"{folder} cannot be an application: its name must be like 50-myapp", hint="rename the folder")
    if not (folder / "run").is_file():
        raise UsageError(f"{folder} holds no file named run", hint="see extensions/CONTRACT.md, section 5")
    return _below(folder)


def _below(folder: Path) -> Files:
    found: Files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UsageError(f"{path} is neither a file nor a folder", hint="packages hold plain files only")
        if path.is_file() and "__pycache__" not in name:
            found[name] = path.read_bytes()
    return found


def _mode(name: str) -> str:
    return "0755" if name.rpartition("/")[2] in _EXECUTABLE else "0644"


def _build_of(files: Files) -> str:
    state = hashlib.sha256(extensions.VERSION.encode())
    for name in sorted(files):
        state.update(f"\0{name}\0{_mode(name)}\0{len(files[name])}\0".encode() + files[name])
    return state.hexdigest()[:12]


# --- the package -----------------------------------------------------------------------------------------------


def build(system: GuestOs, private: bytes, folder: Path, apps: Iterable[Path] = ()) -> Path:
    """The package of the present content for `system` in `folder`, made unless it is there. Older ones are removed:
    what lies there is what is put into guests. Raises UsageError, ConfigError."""
    files = content(system, apps)
    number = _build_of(files)
    version = full_version(extensions.VERSION, number)
    path = folder / f"{NAME}-{version}-{system.value}.zip"
    if not _is_good(path, public_key(private)):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o755)
            fresh = path.with_name(f".{path.name}.new")
            fresh.write_bytes(_signed(_manifest(system, files, number, private), files, private))
            fresh.rename(path)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    for old in packages(folder):
        if old != path and old.stem.endswith(f"-{system.value}"):
            old.unlink()
    return path


def _is_good(path: Path, public: str) -> bool:
    try:
        open_package(path, public)
    except PackageRefused:
        return False
    return True


def _manifest(system: GuestOs, files: Files, number: str, private: bytes) -> bytes:
    manifest = {
        "schema": 1,
        "name": NAME,
        "version": extensions.VERSION,
        "build": number,
        "serial": int(time.time()),
        "os": system.value,
        "contract": extensions.CONTRACT,
        "key_id": key_id(bytes.fromhex(public_key(private))),
        "commands": dict.fromkeys(_VERBS, _ENTRY[system]),
        "time_limits": _TIME_LIMITS,
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "mode": _mode(name)}
            for name, data in sorted(files.items())
        },
    }
    return json.dumps(manifest, indent=1, sort_keys=True).encode()


def _signed(manifest: bytes, files: Files, private: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    signature = Ed25519PrivateKey.from_private_bytes(private).sign(manifest)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        members = {"manifest.json": manifest, "manifest.sig": signature}
        members |= {f"payload/{name}": data for name, data in files.items()}
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)  # ZipInfo: no time of today in it
    return out.getvalue()
