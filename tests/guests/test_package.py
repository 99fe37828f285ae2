"""What a worker refuses before anything reaches a guest."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.extension_build import pack
from orchestrator.extension_key import public_key
from workers.contract.errors import PackageRefused
from workers.contract.guests import CONTRACT_VERSION, GuestOs, Status
from workers.guests.package import VERBS, is_older, key_id, newest_package, open_package, refuse_downgrade

KEY = bytes(range(32))
PUBLIC = public_key(KEY)
Members = dict[str, tuple[bytes, str]]
Change = Callable[[dict[str, Any], Members], None]
FILES = {"ext": (b"#!/bin/sh\n", "0755"), "apps/50-a/run": (b"#!/bin/sh\nexit 3\n", "0755"), "lib/a.sh": (b"", "0644")}


def manifest(files: Members) -> dict[str, Any]:
    return {
        "schema": 1,
        "name": "stillframe.snapshot",
        "version": "0.1.0",
        "build": "1a2b3c4d5e6f",
        "serial": 1000,
        "os": "linux",
        "contract": CONTRACT_VERSION,
        "key_id": key_id(bytes.fromhex(PUBLIC)),
        "commands": dict.fromkeys(VERBS, "ext"),
        "time_limits": {"status": 20},
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "mode": mode}
            for name, (data, mode) in files.items()
        },
    }


def members(listed: dict[str, Any] | bytes, files: Members, key: bytes = KEY) -> Members:
    written = listed if isinstance(listed, bytes) else json.dumps(listed).encode()
    signature = Ed25519PrivateKey.from_private_bytes(key).sign(written)
    payload = {f"payload/{name}": file for name, file in files.items()}
    return {"manifest.json": (written, "0644"), "manifest.sig": (signature, "0644"), **payload}


def written(folder: Path, all_members: Members | bytes, name: str = "0.1.0-linux") -> Path:
    path = folder / f"stillframe.snapshot-{name}.zip"
    path.write_bytes(all_members if isinstance(all_members, bytes) else pack(all_members))
    return path


def good(folder: Path) -> Path:
    return written(folder, members(manifest(FILES), FILES))


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_good_package_is_what_was_signed(tmp_path: Path) -> None:
    package = open_package(good(tmp_path), PUBLIC)
    assert (package.version, package.serial, package.os) == ("0.1.0+1a2b3c4d", 1000, GuestOs.LINUX)
    assert {name: (file.data, f"0{file.mode:o}") for name, file in package.files.items()} == FILES
    assert package.time_limits == {"status": 20}


def field(name: str, value: object) -> Change:
    return lambda listed, _: listed.update({name: value})


def listed_as(name: str, **values: object) -> Change:
    return lambda listed, _: listed["files"].setdefault(name, {**listed["files"]["ext"]}).update(values)


def of_file(name: str, key: str, value: object) -> Change:
    return lambda listed, _: listed["files"][name].update({key: value})


SIGNED_BUT_WRONG: dict[str, tuple[Change, str]] = {
    "schema": (field("schema", 2), "has schema 2, this Stillframe 1"),
    "contract": (field("contract", 2), "speaks contract 2, this Stillframe 1"),
    "contract as text": (field("contract", "1"), "speaks contract 1"),
    "name": (field("name", "other"), "name: Input should be 'stillframe.snapshot'"),
    "version": (field("version", "0.1.0/../.."), "version: String should match"),
    "serial": (field("serial", -1), "serial: Input should be greater"),
    "serial that is no number": (field("serial", True), "serial: Input should be a valid integer"),
    "system": (field("os", "plan9"), "os: "),
    "another key named": (field("key_id", "0" * 16), "names another key"),
    "unknown field": (field("more", 1), "more: Extra inputs"),
    "a verb without a file": (field("commands", {"status": "other"}), "no file of it is named for the verb probe"),
    "time limit": (field("time_limits", {"status": 0}), "time_limits.status: "),
    "no files": (field("files", {}), "no file of it is named"),
    "path up": (listed_as("../../etc/passwd"), "is no path that a package may hold"),
    "path up inside": (listed_as("apps/../../x"), "is no path that a package may hold"),
    "absolute path": (listed_as("/etc/passwd"), "is no path that a package may hold"),
    "backslash": (listed_as("apps\\..\\x"), "is no path that a package may hold"),
    "drive": (listed_as("C:x"), "is no path that a package may hold"),
    "hidden": (listed_as(".x"), "is no path that a package may hold"),
    "line feed": (listed_as("ext\n"), "is no path that a package may hold"),
    "empty part": (listed_as("apps//x"), "is no path that a package may hold"),
    "dot at the end": (listed_as("ext."), "is no path that a package may hold"),
    "long path": (listed_as("a" * 201), "is no path that a package may hold"),
    "only capitals differ": (listed_as("EXT"), "ext is named twice"),
    "file and folder": (listed_as("apps/50-a"), "apps/50-a is named twice"),
    "file that is not there": (listed_as("more"), "lacks more"),
    "another hash": (of_file("ext", "sha256", "0" * 64), "ext in .* is not what was signed"),
    "another size": (of_file("ext", "size", 1), "ext in .* is not what was signed"),
    "another mode": (of_file("ext", "mode", "0644"), "ext in .* has another mode"),
    "set-uid": (of_file("ext", "mode", "4755"), "mode: String should match"),
}


@pytest.mark.parametrize(("change", "words"), SIGNED_BUT_WRONG.values(), ids=SIGNED_BUT_WRONG)
def test_a_signature_makes_nothing_good_that_is_wrong(tmp_path: Path, change: Change, words: str) -> None:
    listed, files = manifest(FILES), dict(FILES)
    change(listed, files)
    refused(written(tmp_path, members(listed, files)), words)


def refused(path: Path, words: str, public: str = PUBLIC) -> None:
    with pytest.raises(PackageRefused, match=words) as caught:
        open_package(path, public)
    assert str(path) in str(caught.value)


def test_writable_by_others(tmp_path: Path) -> None:
    files = {**FILES, "ext": (FILES["ext"][0], "0777")}
    refused(written(tmp_path, members(manifest(files), files)), "ext in .* would be writable by others")


def test_a_link(tmp_path: Path) -> None:
    listed = manifest({**FILES, "more": (b"/etc/passwd", "0644")})
    raw = io.BytesIO(pack(members(listed, FILES)))
    with zipfile.ZipFile(raw, "a") as archive:
        member = zipfile.ZipInfo("payload/more")
        member.external_attr = (stat.S_IFLNK | 0o644) << 16
        archive.writestr(member, b"/etc/passwd")
    refused(written(tmp_path, raw.getvalue()), "more in .* has another mode")


def test_changed_after_it_was_signed(tmp_path: Path) -> None:
    signed = members(manifest(FILES), FILES)
    other = {**signed, "manifest.json": (signed["manifest.json"][0].replace(b"1000", b"2000"), "0644")}
    refused(written(tmp_path, other), "was not signed with the trusted key, or was changed since")
    other = {**signed, "payload/ext": (b"#!/bin/sh\nrm -rf /\n", "0755")}
    refused(written(tmp_path, other), "ext in .* is not what was signed")
    other = {**signed, "payload/more": (b"", "0644")}
    refused(written(tmp_path, other), "holds 'payload/more', which its manifest does not name")
    other = {**signed, "../../etc/cron.d/x": (b"", "0644")}
    refused(written(tmp_path, other), "which its manifest does not name")


def test_no_signature_a_short_one_and_somebody_elses(tmp_path: Path) -> None:
    signed = members(manifest(FILES), FILES)
    for name in ("manifest.json", "manifest.sig"):
        refused(written(tmp_path, {key: value for key, value in signed.items() if key != name}), "is not signed")
    for bad in (b"", signed["manifest.sig"][0][:63], signed["manifest.sig"][0] + b"x", bytes(64)):
        refused(written(tmp_path, {**signed, "manifest.sig": (bad, "0644")}), "was not signed")
    refused(written(tmp_path, members(manifest(FILES), FILES, key=bytes(32))), "was not signed")


@pytest.mark.parametrize("public", ["", "00", "zz" * 32, "00" * 33])
def test_a_trusted_key_that_is_none(tmp_path: Path, public: str) -> None:
    refused(good(tmp_path), "was not signed", public)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'"x"', b"\xff\xfe", b"[" * 100_000])
def test_a_signed_manifest_that_is_none(tmp_path: Path, text: bytes) -> None:
    refused(written(tmp_path, members(text, FILES)), "has schema|is not JSON")


def test_no_package_at_all(tmp_path: Path) -> None:
    refused(tmp_path / "none.zip", "no such package")
    refused(tmp_path, "no such package")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "no such package")
    refused(written(tmp_path, b"this is a letter"), "is not a readable package")
    refused(written(tmp_path, b""), "is not a readable package")


def test_a_member_twice(tmp_path: Path) -> None:
    raw = io.BytesIO(pack(members(manifest(FILES), FILES)))
    with zipfile.ZipFile(raw, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("payload/ext", b"other")
    refused(written(tmp_path, raw.getvalue()), "holds 'payload/ext' twice")


def test_limits(tmp_path: Path) -> None:
    many: Members = {**FILES, **{f"lib/{number}": (b"", "0644") for number in range(1001)}}
    refused(written(tmp_path, members(manifest(many), many)), "holds more than 1000 files")
    bomb: Members = {**FILES, "zeroes": (bytes(17 << 20), "0644")}
    path = written(tmp_path, members(manifest(FILES), bomb))
    assert path.stat().st_size < 1 << 20
    refused(path, "unpacks to more than 16 MiB")
    path.write_bytes(os.urandom((16 << 20) + 1))
    refused(path, "is larger than 16 MiB")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packed_in_another_way(tmp_path: Path, method: int) -> None:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", method) as archive:
        archive.writestr("manifest.json", b"x" * 1000)
    refused(written(tmp_path, raw.getvalue()), "is packed in a way that no package is")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_happens_to_its_bytes_it_is_refused_or_the_same(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(pack(members(manifest(FILES), FILES)))
    original = open_package(written(tmp_path, bytes(raw)), PUBLIC)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with suppress(PackageRefused):
        assert open_package(written(tmp_path, bytes(raw)), PUBLIC) == original


# --- newest, older -------------------------------------------------------------------------------------------------


def versioned(folder: Path, version: str, serial: int, name: str = "") -> Path:
    listed = {**manifest(FILES), "version": version, "serial": serial}
    return written(folder, members(listed, FILES), name or f"{version}-linux")


def test_the_newest_is_by_version_first_and_by_serial_then(tmp_path: Path) -> None:
    assert newest_package(tmp_path / "none", PUBLIC, GuestOs.LINUX) is None
    for version, serial in (("0.9.1", 9), ("0.10.0", 3), ("0.2", 7)):
        versioned(tmp_path, version, serial)
    versioned(tmp_path, "0.10.0", 5, "b-linux")
    newest = newest_package(tmp_path, PUBLIC, GuestOs.LINUX)
    assert newest is not None
    assert (newest.version, newest.serial) == ("0.10.0+1a2b3c4d", 5)
    assert newest_package(tmp_path, PUBLIC, GuestOs.WINDOWS) is None


def test_one_that_was_changed_is_not_passed_over(tmp_path: Path) -> None:
    good(tmp_path)
    written(tmp_path, members(manifest(FILES), FILES, key=bytes(32)), "0.0.1-linux")
    with pytest.raises(PackageRefused, match="was not signed"):
        newest_package(tmp_path, PUBLIC, GuestOs.LINUX)


def test_one_for_another_system_than_its_name_says(tmp_path: Path) -> None:
    versioned(tmp_path, "0.1.0", 1, "0.1.0-windows")
    with pytest.raises(PackageRefused, match="is for linux, not for windows"):
        newest_package(tmp_path, PUBLIC, GuestOs.WINDOWS)


@pytest.mark.parametrize(
    ("version", "serial", "older"),
    [
        ("0.1.0+99999999", 1000, False),
        ("0.1.0+99999999", 1001, True),
        ("0.0.9+99999999", 5000, False),
        ("0.1.1+99999999", 1, True),
        ("0.10+99999999", 1, True),
        ("0.1+99999999", 1000, False),
        ("0.1+99999999", 1001, True),
        ("", 5000, False),
        ("nonsense", 5000, False),
    ],
)
def test_a_downgrade_is_by_version_first_and_by_serial_then(
    tmp_path: Path, version: str, serial: int, older: bool
) -> None:
    package = open_package(good(tmp_path), PUBLIC)
    installed = Status(contract=1, version=version, serial=serial)
    assert is_older(package, installed) is older
    refuse_downgrade(package, None)
    if not older:
        refuse_downgrade(package, installed)
        return
    with pytest.raises(PackageRefused, match="is older than") as caught:
        refuse_downgrade(package, installed)
    assert "extension uninstall" in caught.value.hint
