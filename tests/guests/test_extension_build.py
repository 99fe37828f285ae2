"""The key, and packages built with it: made once, the same for the same content, never a downgrade, and nothing in them
that somebody else than their owner could have written."""

from __future__ import annotations

import json
import os
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import extensions
from orchestrator.config import Config, ExtensionSettings, parse_config
from orchestrator.extension_build import build, ensure_packages, make_packages, pack
from orchestrator.extension_content import content, replaced
from orchestrator.extension_key import ensure_signing_key, public_key, read_signing_key
from tests.guests.test_package import PUBLIC, members
from workers.contract.errors import ConfigError
from workers.contract.guests import CONTRACT_VERSION, GuestOs
from workers.guests.package import key_id, open_package, packages

# --- keys ----------------------------------------------------------------------------------------------------------


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "extension.key"
    public = ensure_signing_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert public_key(read_signing_key(path)) == public
    assert ensure_signing_key(path) == public
    assert sorted(one.name for one in path.parent.iterdir()) == ["extension.key", "extension.key.pub"]
    (path.parent / "extension.key.pub").write_text("old\n")
    ensure_signing_key(path)
    assert (path.parent / "extension.key.pub").read_text() == public + "\n"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602])
def test_a_key_that_is_open_to_others_signs_nothing(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "extension.key"
    ensure_signing_key(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="open to others") as caught:
        ensure_signing_key(path)
    assert caught.value.hint == f"chmod 600 {path}"


@pytest.mark.parametrize("text", ["", "ab" * 31, "zz" * 32, "-----BEGIN PRIVATE KEY-----\n", "\udcff"])
def test_a_key_file_that_is_none_is_not_replaced(tmp_path: Path, text: str) -> None:
    path = tmp_path / "extension.key"
    path.write_bytes(text.encode(errors="surrogateescape"))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="is no signing key"):
        ensure_signing_key(path)
    assert path.read_bytes() == text.encode(errors="surrogateescape")


# --- building ------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = '[extension]\napps = ["apps/50-ours"]\n[paths]\nstate = "state"\n'
    return parse_config(text, tmp_path / "stillframe.toml")


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A good application folder."""
    folder = tmp_path / "apps" / "50-ours"
    (folder / "sql").mkdir(parents=True)
    (folder / "run").write_text("#!/bin/sh\nexit 3\n")
    (folder / "run").chmod(0o755)
    (folder / "sql" / "freeze.sql").write_text("select 1;\n")
    for place in (folder, folder / "sql", folder / "sql" / "freeze.sql"):
        place.chmod(place.stat().st_mode & ~0o022)
    return folder


def again(config: Config) -> ExtensionSettings:
    """The settings as the next command reads them."""
    return parse_config('[extension]\napps = ["apps/50-ours"]\n[paths]\nstate = "state"\n', config.path).extension


def test_versions_are_in_one_place() -> None:
    assert extensions.CONTRACT == CONTRACT_VERSION
    assert (Path(extensions.__file__).parent / "CONTRACT.md").read_text().count("Version of this contract: **1**") == 1


def test_a_built_package_is_signed_and_whole(config: Config, app: Path) -> None:
    [path, *_] = make_packages(config.extension)
    settings = again(config)
    assert settings.public_key is not None
    package = open_package(path, settings.public_key)
    assert path.name == f"stillframe.snapshot-{package.version}-linux.zip"
    assert {name: file.data for name, file in package.files.items()} == content(GuestOs.LINUX, [app])
    assert package.files["apps/50-ours/run"].mode == package.files["ext"].mode == 0o755
    assert package.files["apps/50-ours/sql/freeze.sql"].mode == 0o644
    assert not any(name.endswith((".md", ".pyc")) for name in package.files)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_the_same_content_stays_the_same_package(config: Config, app: Path) -> None:
    [path, *_] = make_packages(config.extension)
    before = path.read_bytes()
    (app / "sql" / "freeze.sql").touch()
    assert make_packages(again(config))[0] == path
    assert ensure_packages(again(config))[0] == path
    assert path.read_bytes() == before


def test_other_content_is_another_package_and_never_a_downgrade(config: Config, app: Path) -> None:
    [first, *_] = make_packages(config.extension)
    old = open_package(first, again(config).public_key or "")
    (app / "run").write_text("#!/bin/sh\nexit 0\n")
    [second, *_] = ensure_packages(again(config))
    new = open_package(second, again(config).public_key or "")
    assert new.version != old.version
    assert new.serial > old.serial
    (app / "run").write_text("#!/bin/sh\nexit 3\n")
    [third, *_] = ensure_packages(again(config))
    assert third == first
    assert open_package(third, again(config).public_key or "").serial > new.serial
    assert [path for path in packages(config.extension.packages) if path.stem.endswith("-linux")] == [third]


def test_a_damaged_package_is_built_again(config: Config, app: Path) -> None:
    assert app.is_dir()
    [path, *_] = make_packages(config.extension)
    path.write_bytes(path.read_bytes()[:-100])
    [mended, *_] = ensure_packages(again(config))
    open_package(mended, again(config).public_key or "")


def test_without_its_key_or_with_another_one_nothing_is_signed(config: Config, app: Path) -> None:
    assert ensure_packages(config.extension) == []
    assert app.is_dir()
    [path, *_] = make_packages(config.extension)
    before = path.read_bytes()
    key = config.extension.signing_key
    key.unlink()
    assert ensure_packages(again(config)) == []
    key.write_text("00" * 32)
    key.chmod(0o600)
    with pytest.raises(ConfigError, match="is not the key that is trusted"):
        ensure_packages(again(config))
    assert path.read_bytes() == before
    make_packages(again(config))
    assert again(config).public_key == public_key(bytes(32))
    assert path.read_bytes() != before


def test_a_written_public_key_is_the_only_one_that_counts(config: Config) -> None:
    def settings() -> ExtensionSettings:
        return parse_config(f'[extension]\npublic_key = "{PUBLIC}"\n', config.path).extension

    with pytest.raises(ConfigError, match="packages are signed elsewhere"):
        make_packages(settings())
    assert not config.extension.signing_key.exists()
    ensure_signing_key(config.extension.signing_key)
    with pytest.raises(ConfigError, match="is not the one of"):
        make_packages(settings())


BAD_APPS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no run": (lambda app: (app / "run").unlink(), "holds no executable file named run"),
    "run not executable": (lambda app: (app / "run").chmod(0o644), "holds no executable file named run"),
    "gone": (lambda app: shutil.rmtree(app), "cannot be read: No such file"),
    "link": (lambda app: (app / "more").symlink_to("/etc/shadow"), "neither a file nor a folder"),
    "link to a folder": (lambda app: (app / "more").symlink_to("/etc"), "neither a file nor a folder"),
    "pipe": (lambda app: os.mkfifo(app / "more"), "neither a file nor a folder"),
    "file for all": (lambda app: (app / "run").chmod(0o757), "others may write to"),
    "file for the group": (lambda app: (app / "run").chmod(0o775), "others may write to"),
    "folder for all": (lambda app: app.chmod(0o757), "others may write to"),
    "folder inside for all": (lambda app: (app / "sql").chmod(0o757), "others may write to"),
    "odd name": (lambda app: (app / "a b").touch(0o644), "is no path that a package may hold"),
    "too large": (lambda app: (app / "big").write_bytes(bytes((1 << 20) + 1)), "more than 100 files or 1 MiB"),
    "too many": (lambda app: [(app / f"f{number}").touch(0o644) for number in range(100)], "more than 100 files"),
}


@pytest.mark.parametrize(("change", "words"), BAD_APPS.values(), ids=BAD_APPS)
def test_an_application_folder_that_is_not_signed(
    config: Config, app: Path, change: Callable[[Path], object], words: str
) -> None:
    change(app)
    if (app / "big").exists():
        (app / "big").chmod(0o644)
    with pytest.raises(ConfigError, match=words) as caught:
        make_packages(config.extension)
    assert caught.value.hint
    assert list(packages(config.extension.packages)) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_an_application_of_somebody_else_is_not_signed(config: Config, app: Path) -> None:
    os.chown(app / "run", 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to somebody else"):
        make_packages(config.extension)


@pytest.mark.parametrize("name", ["ours", "5-ours", "50-Ours", "50-", "500-ours", "50-a b"])
def test_an_application_folder_has_a_number_and_a_name(app: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="must be like 50-myapp"):
        content(GuestOs.LINUX, [app.rename(app.with_name(name))])


def test_two_application_folders_of_one_name(app: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / app.name
    shutil.copytree(app, other)
    with pytest.raises(ConfigError, match=r"two folders .* are named 50-ours"):
        content(GuestOs.LINUX, [app, other])


def test_a_folder_of_the_users_takes_the_place_of_the_shipped_one(app: Path) -> None:
    shipped = sorted({name.split("/")[1] for name in content(GuestOs.LINUX) if name.startswith("apps/")})
    assert shipped
    own = app.rename(app.with_name(shipped[0]))
    files = content(GuestOs.LINUX, [own])
    assert sorted(name for name in files if name.startswith(f"apps/{own.name}/")) == [
        f"apps/{own.name}/run",
        f"apps/{own.name}/sql/freeze.sql",
    ]
    assert replaced([own, app]) == [own]


def test_a_clock_that_was_set_back_makes_no_downgrade(config: Config, app: Path) -> None:
    key = config.extension.signing_key
    ensure_signing_key(key)
    private = read_signing_key(key)
    path = build(GuestOs.LINUX, private, config.extension.packages, [app])
    listed = json.loads(zipfile.ZipFile(path).read("manifest.json")) | {"serial": 1 << 50}
    listed["key_id"] = key_id(bytes.fromhex(public_key(private)))
    files = {name: (data, listed["files"][name]["mode"]) for name, data in content(GuestOs.LINUX, [app]).items()}
    path.write_bytes(pack(members(listed, files, private)))
    (app / "run").write_text("#!/bin/sh\nexit 0\n")
    later = open_package(build(GuestOs.LINUX, private, config.extension.packages, [app]), public_key(private))
    assert later.serial == (1 << 50) + 1
