"""What goes into an extension package: the files of `extensions/`, and the user's own application folders.

All of it will run as root in every guest, so a folder of the user's that somebody else could have written to is
refused before it is signed.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

import extensions
from workers.contract.errors import ConfigError
from workers.contract.guests import GuestOs
from workers.guests.package import MAX_BYTES, MAX_FILES, check_path

Files = dict[str, bytes]
"""Path in the package → content."""

SYSTEMS = (GuestOs.LINUX, GuestOs.WINDOWS)
ENTRY = {GuestOs.LINUX: "ext", GuestOs.WINDOWS: "ext.ps1"}
"""What runs every verb."""
_APP = re.compile(r"[0-9]{2}-[a-z0-9][a-z0-9_-]{0,40}")
_EXECUTABLE = frozenset({"ext", "watchdog", "run"})
_NOT_SHIPPED = frozenset({"tests", "docs", "__pycache__"})
_MAX_APP = 1 << 20
_MAX_APP_FILES = 100


def mode_of(name: str) -> str:
    """Mode of a file in the guest, by its path in the package."""
    return "0755" if name.rpartition("/")[2] in _EXECUTABLE else "0644"


def is_shipped(system: GuestOs) -> bool:
    """Whether there is an extension for `system` in this installation."""
    return (resources.files(extensions) / system.value / ENTRY[system]).is_file()


def content(system: GuestOs, apps: Iterable[Path] = ()) -> Files:
    """What a package for `system` holds: our own files, and on Linux the folders `apps` in `apps/`, each in the place
    of ours of the same name. Raises ConfigError for a folder that cannot be one."""
    files = _shipped(system)
    if ENTRY[system] not in files:
        raise ConfigError(f"this Stillframe has no extension for {system}", hint="reinstall it with all of its files")
    if system is GuestOs.LINUX:
        for app in _distinct(list(apps)):
            place = f"apps/{app.name}/"
            files = {name: data for name, data in files.items() if not name.startswith(place)}
            files |= {place + name: data for name, data in _app(app).items()}
    if len(files) > MAX_FILES or sum(map(len, files.values())) > MAX_BYTES // 2:
        raise ConfigError(
            f"the {system} extension would have more than {MAX_FILES} files or {MAX_BYTES >> 21} MiB",
            hint="name fewer folders in apps under [extension]",
        )
    return files


def replaced(apps: Iterable[Path]) -> list[Path]:
    """Those of the user's folders that take the place of one of ours."""
    ours = _shipped(GuestOs.LINUX)
    return [app for app in apps if f"apps/{app.name}/run" in ours]


def _shipped(system: GuestOs) -> Files:
    with resources.as_file(resources.files(extensions) / system.value) as folder:
        found: Files = {}
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            hidden = any(part.startswith(".") or part in _NOT_SHIPPED for part in inside.parts)
            if path.is_file() and not hidden and path.suffix not in (".md", ".pyc"):
                found[inside.as_posix()] = path.read_bytes()
    return found


def _distinct(apps: Sequence[Path]) -> Sequence[Path]:
    names = [app.name for app in apps]
    for app in apps:
        if names.count(app.name) > 1:
            raise ConfigError(f"two folders in apps under [extension] are named {app.name}", hint="rename one of them")
    return apps


def _app(folder: Path) -> Files:
    """All files of one application folder. Raises ConfigError."""
    if not _APP.fullmatch(folder.name):
        raise ConfigError(f"{folder} cannot be an application: its name must be like 50-myapp", hint="rename it")
    found: Files = {}
    try:
        _refuse_foreign(folder, folder.lstat())
        for path in sorted(folder.rglob("*")):
            if not stat.S_ISDIR(path.lstat().st_mode):
                found[_inside(path, folder)] = _read(path)
            else:
                _refuse_foreign(path, path.lstat())
            if len(found) > _MAX_APP_FILES or sum(map(len, found.values())) > _MAX_APP:
                what = f"{folder} holds more than {_MAX_APP_FILES} files or {_MAX_APP >> 20} MiB"
                raise ConfigError(what, hint="only what the script needs belongs there")
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder} cannot be read: {error.strerror}", hint="see apps under [extension]"
        ) from None
    if "run" not in found or not os.access(folder / "run", os.X_OK):
        hint = f"chmod +x {folder / 'run'}" if "run" in found else "see extensions/CONTRACT.md, section 5"
        raise ConfigError(f"{folder} holds no executable file named run", hint=hint)
    return found


def _inside(path: Path, folder: Path) -> str:
    name = path.relative_to(folder).as_posix()
    try:
        return check_path(name)
    except ValueError as error:
        raise ConfigError(f"{folder}: {error}", hint=f"rename or remove {path}") from None


def _read(path: Path) -> bytes:
    """By one open file: what is judged is what is read."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ConfigError(f"{path} is neither a file nor a folder", hint="packages hold plain files only")
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        _refuse_foreign(path, os.fstat(file.fileno()))
        return file.read(_MAX_APP + 1)


def _refuse_foreign(path: Path, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise ConfigError(f"{path} is a link", hint="name the folder itself in apps under [extension]")
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"{path} belongs to somebody else, and would run as root in guests", hint=f"chown root {path}"
        )
    if found.st_mode & 0o022:
        raise ConfigError(f"others may write to {path}, and it would run as root in guests", hint=f"chmod go-w {path}")
