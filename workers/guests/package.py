"""Extension packages, read: nothing of one is believed before its signature and every hash are verified.

What a package holds runs as root in every guest, so this is the gate (`extensions/CONTRACT.md` section 1): a `Package`
is made here and nowhere else, and only from bytes that the controller's key has signed.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from workers.contract.errors import PackageRefused
from workers.contract.guests import CONTRACT_VERSION, GuestOs, Status
from workers.contract.seams import Package, PackageFile

MAX_BYTES = 16 << 20
MAX_FILES = 1000
NAME = "stillframe.snapshot"
SCHEMA = 1
VERBS = ("probe", "install", "enable", "uninstall", "status", "quiesce", "resume")
_BUILD_AGAIN = "build it again: stillframe extension build"
_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*", re.ASCII)
_MANIFEST, _SIGNATURE, _PAYLOAD = "manifest.json", "manifest.sig", "payload/"
_LOOKS = 5
_UNREADABLE = (OSError, zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError, EOFError)
"""What Python's reader of zip files raises at bytes that are none; ValueError besides."""


def check_path(name: str) -> str:
    """A plain relative path, the same on every guest. Raises ValueError with the reason."""
    if not _PATH.fullmatch(name) or len(name) > 200 or name.endswith(".") or "./" in name:
        raise ValueError(f"{name!r} is no path that a package may hold: plain letters, digits, dot, dash, underscore")
    return name


Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


class ManifestFile(BaseModel):
    model_config = _STRICT

    sha256: Hex
    size: Annotated[int, Field(ge=0, le=MAX_BYTES)]
    mode: Annotated[str, Field(pattern=r"^0[0-7]{3}$")]


class Manifest(BaseModel):
    """`manifest.json`, as CONTRACT.md section 1 has it."""

    model_config = _STRICT

    schema_: Annotated[Literal[1], Field(alias="schema")]
    name: Literal["stillframe.snapshot"]
    version: Annotated[str, Field(pattern=r"^[0-9]{1,9}(\.[0-9]{1,9}){0,3}$")]
    build: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    serial: Annotated[int, Field(ge=0, lt=1 << 53)]
    os: GuestOs
    contract: int
    key_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    commands: dict[str, str]
    time_limits: dict[str, Annotated[int, Field(ge=1, le=3600)]]
    files: Annotated[dict[Annotated[str, AfterValidator(check_path)], ManifestFile], Field(max_length=MAX_FILES)]

    @model_validator(mode="after")
    def _whole(self) -> Manifest:
        for verb in VERBS:
            if self.commands.get(verb) not in self.files:
                raise ValueError(f"no file of it is named for the verb {verb}")
        folded = sorted(name.lower() for name in self.files)
        folders = {str(parent) for name in folded for parent in PurePosixPath(name).parents}
        for name, following in zip(folded, [*folded[1:], ""], strict=True):
            if name == following or name in folders:
                raise ValueError(f"{name} is named twice (Windows does not tell capitals)")
        return self


def key_id(public: bytes) -> str:
    return hashlib.sha256(public).hexdigest()[:16]


def full_version(version: str, build: str) -> str:
    return f"{version}+{build[:8]}"


@dataclass(frozen=True, slots=True)
class _Member:
    data: bytes
    mode: int


def open_package(path: Path, public_key: str) -> Package:
    """The package in the file `path`, if the Ed25519 key `public_key` (64 hex digits) has signed it and every byte is
    as signed. Raises PackageRefused."""
    members = _members(path)
    manifest = _manifest(path, members, public_key)
    files = {name: _file(path, name, listed, members) for name, listed in manifest.files.items()}
    unknown = sorted(set(members) - {_MANIFEST, _SIGNATURE} - {f"{_PAYLOAD}{name}" for name in files})
    if unknown:
        raise PackageRefused(f"{path} holds {unknown[0]!r}, which its manifest does not name", hint=_BUILD_AGAIN)
    return Package(
        name=manifest.name,
        version=full_version(manifest.version, manifest.build),
        serial=manifest.serial,
        os=manifest.os,
        contract=manifest.contract,
        time_limits=dict(manifest.time_limits),
        files=files,
    )


def _members(path: Path) -> dict[str, _Member]:
    """All members, each once. Raises PackageRefused."""
    try:
        if not path.is_file():
            raise PackageRefused(f"{path}: no such package")
        if path.stat().st_size > MAX_BYTES:
            raise PackageRefused(f"{path} is larger than {MAX_BYTES >> 20} MiB", hint=_BUILD_AGAIN)
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            return _unpacked(path, archive)
    except (*_UNREADABLE, ValueError) as error:
        words = str(error) or type(error).__name__
        raise PackageRefused(f"{path} is not a readable package: {words}", hint=_BUILD_AGAIN) from None


def _unpacked(path: Path, archive: zipfile.ZipFile) -> dict[str, _Member]:
    """Within limits that are checked while reading: what a header says of a size is only a claim."""
    found: dict[str, _Member] = {}
    left = MAX_BYTES
    for member in archive.infolist():
        if len(found) >= MAX_FILES + 2:
            raise PackageRefused(f"{path} holds more than {MAX_FILES} files", hint=_BUILD_AGAIN)
        if member.filename in found:
            raise PackageRefused(f"{path} holds {member.filename!r} twice", hint=_BUILD_AGAIN)
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise PackageRefused(f"{path} is packed in a way that no package is", hint=_BUILD_AGAIN)
        with archive.open(member) as source:
            data = source.read(left + 1)
        left -= len(data)
        if left < 0:
            raise PackageRefused(f"{path} unpacks to more than {MAX_BYTES >> 20} MiB", hint=_BUILD_AGAIN)
        found[member.filename] = _Member(data, member.external_attr >> 16)
    return found


def _manifest(path: Path, members: dict[str, _Member], public_key: str) -> Manifest:
    """The manifest, read only after its signature was found good. Raises PackageRefused."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if _MANIFEST not in members or _SIGNATURE not in members:
        raise PackageRefused(f"{path} is not signed", hint=_BUILD_AGAIN)
    written = members[_MANIFEST].data
    try:
        public = bytes.fromhex(public_key)
        Ed25519PublicKey.from_public_bytes(public).verify(members[_SIGNATURE].data, written)
    except (InvalidSignature, ValueError):
        raise PackageRefused(
            f"{path} was not signed with the trusted key, or was changed since",
            hint="sign it with the key that [extension] names: stillframe extension build",
        ) from None
    try:
        _refuse_other_formats(path, json.loads(written))
        manifest = Manifest.model_validate_json(written)
    except ValidationError as error:
        raise PackageRefused(f"the manifest of {path}: {_first(error)}", hint=_BUILD_AGAIN) from None
    except (ValueError, RecursionError) as error:
        raise PackageRefused(f"the manifest of {path} is not JSON: {error}", hint=_BUILD_AGAIN) from None
    if manifest.key_id != key_id(public):
        raise PackageRefused(f"{path} names another key than the one that signed it", hint=_BUILD_AGAIN)
    return manifest


def _refuse_other_formats(path: Path, manifest: object) -> None:
    """First of all: what another format's fields mean is not known here."""
    found = manifest if isinstance(manifest, dict) else {}
    for field, known, words in (("schema", SCHEMA, "has schema"), ("contract", CONTRACT_VERSION, "speaks contract")):
        if found.get(field) != known:
            raise PackageRefused(f"{path} {words} {found.get(field)}, this Stillframe {known}", hint=_BUILD_AGAIN)


def _first(error: ValidationError) -> str:
    found = error.errors()[0]
    if found["type"] == "value_error":
        return str(found["ctx"]["error"])
    return f"{'.'.join(str(part) for part in found['loc'])}: {found['msg']}"


def _file(path: Path, name: str, listed: ManifestFile, members: dict[str, _Member]) -> PackageFile:
    member = members.get(f"{_PAYLOAD}{name}")
    if member is None:
        raise PackageRefused(f"{path} lacks {name}, which its manifest names", hint=_BUILD_AGAIN)
    if len(member.data) != listed.size or hashlib.sha256(member.data).hexdigest() != listed.sha256:
        raise PackageRefused(f"{name} in {path} is not what was signed", hint=_BUILD_AGAIN)
    mode = int(listed.mode, 8)
    if stat.S_IMODE(member.mode) != mode or stat.S_IFMT(member.mode) not in (0, stat.S_IFREG):
        raise PackageRefused(f"{name} in {path} has another mode than was signed", hint=_BUILD_AGAIN)
    if mode & 0o022:
        raise PackageRefused(f"{name} in {path} would be writable by others", hint=_BUILD_AGAIN)
    return PackageFile(member.data, listed.sha256, mode)


def packages(folder: Path) -> Iterator[Path]:
    """Files that look like packages, by name."""
    yield from sorted(folder.glob(f"{NAME}-*.zip"))


def newest_package(folder: Path, public_key: str, os: GuestOs) -> Package | None:
    """The newest package for `os` in `folder`; None if there is none. Raises PackageRefused if any of them is refused:
    an older one is no substitute for one that somebody has changed."""
    for _ in range(_LOOKS):
        try:
            found = [_package_for(os, path, public_key) for path in packages(folder) if is_for(os, path)]
        except _Vanished:
            continue  # a newer one has taken its place meanwhile: look again
        return max(found, key=order, default=None)
    raise PackageRefused(f"the packages in {folder} do not keep still", hint="try again")


def is_for(os: GuestOs, path: Path) -> bool:
    """By its name; what it is for is signed inside."""
    return path.stem.endswith(f"-{os.value}")


class _Vanished(Exception):
    pass


def _package_for(os: GuestOs, path: Path, public_key: str) -> Package:
    try:
        package = open_package(path, public_key)
    except PackageRefused:
        if not path.exists():
            raise _Vanished from None
        raise
    if package.os is not os:
        raise PackageRefused(f"{path} is for {package.os}, not for {os} as its name says", hint=_BUILD_AGAIN)
    return package


def order(package: Package) -> tuple[tuple[int, ...], int]:
    """Packages and installed versions are compared by this."""
    return release(package.version), package.serial


def release(version: str) -> tuple[int, ...]:
    """`0.1.0+1a2b` → (0, 1); empty for what is no version, which is older than any."""
    plain = re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})*", version.partition("+")[0])
    parts = [int(part) for part in plain[0].split(".")] if plain else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


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
