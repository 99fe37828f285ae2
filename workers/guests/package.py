"""Extension packages, read: nothing of one is believed before its signature and every hash are verified.

What a package holds runs as root in every guest, so this is the gate (`extensions/CONTRACT.md` section 1): a `Package`
is made here and nowhere else, and only from bytes that the controller's key has signed.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from workers.contract.errors import PackageRefused
from workers.contract.guests import CONTRACT_VERSION, GuestOs, Status
from workers.contract.seams import Package, PackageFile

MAX_BYTES = 16 << 20
MAX_FILES = 1000
NAME = "stillframe.snapshot"
_BUILD_AGAIN = "build it again: stillframe extension build"
_PATH = r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$"

Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ManifestFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Hex
    size: Annotated[int, Field(ge=0, le=MAX_BYTES)]
    mode: Annotated[str, Field(pattern=r"^0[0-7]{3}$")]


class Manifest(BaseModel):
    """`manifest.json`, as CONTRACT.md section 1 has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_: Annotated[Literal[1], Field(alias="schema")]
    name: Literal["stillframe.snapshot"]
    version: Annotated[str, Field(pattern=r"^\d+(\.\d+){0,3}$")]
    build: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    serial: Annotated[int, Field(ge=0)]
    os: GuestOs
    contract: int
    key_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    commands: dict[str, str]
    time_limits: dict[str, Annotated[int, Field(ge=1, le=3600)]]
    files: Annotated[
        dict[Annotated[str, Field(pattern=_PATH, max_length=200)], ManifestFile], Field(max_length=MAX_FILES)
    ]


def key_id(public: bytes) -> str:
    return hashlib.sha256(public).hexdigest()[:16]


def full_version(version: str, build: str) -> str:
    return f"{version}+{build[:8]}"


def open_package(path: Path, public_key: str) -> Package:
    """The package in the file `path`, if the Ed25519 key `public_key` (64 hex digits) has signed it and every byte is
    as signed. Raises PackageRefused."""
    try:
        members = _members(path)
        manifest = _manifest(path, members, public_key)
        files = {name: _file(path, name, listed, members) for name, listed in manifest.files.items()}
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise PackageRefused(f"{path} is not a readable package: {error}", hint=_BUILD_AGAIN) from None
    unknown = sorted(set(members) - {"manifest.json", "manifest.sig"} - {f"payload/{name}" for name in files})
    if unknown:
        raise PackageRefused(f"{path} holds {unknown[0]}, which its manifest does not name", hint=_BUILD_AGAIN)
    return Package(
        name=manifest.name,
        version=full_version(manifest.version, manifest.build),
        serial=manifest.serial,
        os=manifest.os,
        contract=manifest.contract,
        time_limits=dict(manifest.time_limits),
        files=files,
    )


def _members(path: Path) -> dict[str, bytes]:
    """All members, each once, within limits that are checked while reading: a header's size is only a claim."""
    found: dict[str, bytes] = {}
    left = MAX_BYTES
    if path.stat().st_size > MAX_BYTES:
        raise PackageRefused(f"{path} is larger than {MAX_BYTES >> 20} MiB", hint=_BUILD_AGAIN)
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        for member in archive.infolist():
            if len(found) > MAX_FILES or member.filename in found:
                raise PackageRefused(f"{path} holds too many files, or {member.filename} twice", hint=_BUILD_AGAIN)
            with archive.open(member) as source:
                data = source.read(left + 1)
            left -= len(data)
            if left < 0:
                raise PackageRefused(f"{path} unpacks to more than {MAX_BYTES >> 20} MiB", hint=_BUILD_AGAIN)
            found[member.filename] = data
    return found


def _manifest(path: Path, members: dict[str, bytes], public_key: str) -> Manifest:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if "manifest.json" not in members or "manifest.sig" not in members:
        raise PackageRefused(f"{path} is not signed", hint=_BUILD_AGAIN)
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
        key.verify(members["manifest.sig"], members["manifest.json"])
    except (InvalidSignature, ValueError):
        raise PackageRefused(
            f"{path} was not signed with this controller's key, or was changed since",
            hint="sign it with the key that [extension] names: stillframe extension build",
        ) from None
    try:
        manifest = Manifest.model_validate_json(members["manifest.json"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PackageRefused(
            f"the manifest of {path} is not valid: {where}: {first['msg']}", hint=_BUILD_AGAIN
        ) from None
    if manifest.contract != CONTRACT_VERSION:
        raise PackageRefused(
            f"{path} speaks contract {manifest.contract}, this Stillframe {CONTRACT_VERSION}", hint=_BUILD_AGAIN
        )
    return manifest


def _file(path: Path, name: str, listed: ManifestFile, members: dict[str, bytes]) -> PackageFile:
    data = members.get(f"payload/{name}")
    if data is None:
        raise PackageRefused(f"{path} lacks {name}, which its manifest names", hint=_BUILD_AGAIN)
    if len(data) != listed.size or hashlib.sha256(data).hexdigest() != listed.sha256:
        raise PackageRefused(f"{name} in {path} is not what was signed", hint=_BUILD_AGAIN)
    mode = int(listed.mode, 8)
    if mode & 0o022:
        raise PackageRefused(f"{name} in {path} would be writable by others", hint=_BUILD_AGAIN)
    return PackageFile(data, listed.sha256, mode)


def packages(folder: Path) -> Iterator[Path]:
    """Files that look like packages, by name."""
    yield from sorted(folder.glob(f"{NAME}-*.zip"))


def newest_package(folder: Path, public_key: str, os: GuestOs) -> Package | None:
    """The newest package for `os` in `folder`; None if there is none. Raises PackageRefused if any of them is refused:
    an older one is no substitute for one that somebody has changed."""
    found = [open_package(path, public_key) for path in packages(folder) if path.stem.endswith(f"-{os.value}")]
    return max(found, key=order, default=None)


def order(package: Package) -> tuple[tuple[int, ...], int]:
    """Packages and installed versions are compared by this."""
    return release(package.version), package.serial


def release(version: str) -> tuple[int, ...]:
    """`0.1.0+1a2b` → (0, 1, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def is_older(package: Package, installed: Status) -> bool:
    """Putting it in place would be a downgrade."""
    return order(package) < (release(installed.version), installed.serial)


def refuse_downgrade(package: Package, installed: Status | None) -> None:
    """Raises PackageRefused."""
    if installed is not None and is_older(package, installed):
        raise PackageRefused(
            f"package {package.version} is older than {installed.version}, which is installed",
            hint="build a newer one, or uninstall first: stillframe extension uninstall VM",
        )
