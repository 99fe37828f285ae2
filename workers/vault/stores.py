"""Where a vault's objects live; here, a directory.

An object exists whole and durable, or not at all: it is built in `.staging/`, synced, linked to its name (exclusive,
unlike a rename), and its folder is synced.

The failure prevented: a backup written under an unmounted mount point fills the wrong disk and is later hidden by the
mount. So nothing is written where the vault's marker is not the one that was there when the store was opened.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from workers.contract.errors import ConfigError, Corrupt, Locked, NoSpace, ObjectMissing, VaultError, VaultMissing
from workers.contract.seams import ObjectInfo, Store, StoreFeatures
from workers.vault.immutable import set_immutable
from workers.vault.staging import Staging

MARKER = "vault.json"
NAME = re.compile(r"(?:[a-z0-9_-][a-z0-9._-]*/)*[a-z0-9_-][a-z0-9._-]*")
_STAGING = ".staging"
_MOUNT_HINT = "is the vault's file system mounted? `stillframe init` makes a new vault"


def open_store(url: str, *, create: bool = False) -> Store:
    """The store at `url` (`file:///path`). Raises ConfigError for another scheme, VaultMissing if nothing is there.

    With `create` the folder is made, and objects may be written before the marker is.
    """
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise ConfigError(f"vault URL {url!r} is not of a known kind", hint="write file:///absolute/path")
    return DirectoryStore(Path(unquote(parts.path)), create=create)


def checked(name: str) -> str:
    """`name` if it is one of an object. Raises VaultError: no `..`, no empty or hidden word gets to a path."""
    if not NAME.fullmatch(name):
        raise VaultError(f"{name!r} cannot be the name of an object")
    return name


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Operating system errors as ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"no space left to {what}", hint="free space where the vault lives") from error
        raise VaultError(f"cannot {what}: {error.strerror or error}") from error


class DirectoryStore:
    """Objects as files under `root`. Thread-safe; any number of processes may share the folder."""

    def __init__(self, root: Path, *, create: bool = False) -> None:
        """Raises VaultMissing if there is no vault and `create` is not given."""
        self.root = root
        self.features = StoreFeatures(str(root))
        self._staging = Staging(root / _STAGING)
        if create:
            with _translated(f"make {root}"):
                root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._marker = self._read_marker()
        if self._marker is None and not create:
            raise VaultMissing(f"there is no vault at {root}", hint=_MOUNT_HINT)

    def _read_marker(self) -> bytes | None:
        try:
            return (self.root / MARKER).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise VaultError(f"cannot read {self.root / MARKER}: {error.strerror or error}") from error

    def _guard(self) -> None:
        if self._marker is not None and self._read_marker() != self._marker:
            raise VaultMissing(f"the vault at {self.root} is gone, or another one is in its place", hint=_MOUNT_HINT)

    # --- writing ---------------------------------------------------------------------------------------------------

    def staging(self) -> Path:
        """This process's folder for unfinished files, on the vault's file system."""
        if not self._staging.present:
            self._guard()
        with _translated(f"make a staging folder in {self.root}"):
            return self._staging.folder()

    def put(self, name: str, data: bytes) -> bool:
        path = self.staging() / f"put-{secrets.token_hex(8)}"
        try:
            with _translated(f"write {name}"), open(path, "xb", opener=_private) as file:
                file.write(data)
            return self.put_file(name, path)
        finally:
            path.unlink(missing_ok=True)

    def put_file(self, name: str, path: Path) -> bool:
        target = self.root / checked(name)
        self._guard()
        with _translated(f"write {name}"):
            _sync_file(path)
            self._make_folders(target.parent)
            try:
                os.link(path, target)
                created = True
            except FileExistsError:
                created = False  # by another process perhaps, which has not synced the folder yet
            _sync_folder(target.parent)
            path.unlink(missing_ok=True)
        if name == MARKER and created:
            self._marker = self._read_marker()
        return created

    def replace(self, name: str, path: Path) -> None:
        target = self.root / checked(name)
        self._guard()
        with _translated(f"mend {name}"):
            if until := _retained(target.stat()) if target.exists() else 0.0:
                path.chmod(_RETAINED)
                os.utime(path, (until, until))
                set_immutable(target, False)
            _sync_file(path)
            self._make_folders(target.parent)
            path.replace(target)
            _sync_folder(target.parent)
            if until:
                set_immutable(target, True)

    def _make_folders(self, folder: Path) -> None:
        if folder.is_dir():
            return
        self._make_folders(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        _sync_folder(folder.parent)

    def delete(self, name: str) -> None:
        self._guard()
        path = self.root / checked(name)
        with _translated(f"delete {name}"):
            try:
                if until := _retained(path.stat()):
                    self._check_free(name, until)
                    set_immutable(path, False)
                path.unlink()
            except FileNotFoundError:
                return
            _sync_folder(path.parent)

    def _check_free(self, name: str, until: float) -> None:
        """Raises Locked until both clocks are past it: this host's, and that of the place, which is the server's where
        the folder is on a network."""
        probe = self.staging() / f"clock-{secrets.token_hex(8)}"
        probe.touch(mode=0o600)
        there = probe.stat().st_mtime
        probe.unlink()
        if until > min(time.time(), there):
            raise Locked(f"{name} is retained until {datetime.fromtimestamp(until, UTC):%Y-%m-%d %H:%M} UTC")

    def retain(self, name: str, until: datetime) -> None:
        """As write-once filers know it: nobody may write the file, and its mtime says until when. Where the file system
        has an immutable flag and we are root, that too."""
        path = self.root / checked(name)
        self._guard()
        with _translated(f"retain {name}"):
            try:
                found = path.stat()
            except FileNotFoundError:
                raise ObjectMissing(f"{name} is missing from the vault at {self.root}") from None
            if until.timestamp() > _retained(found):
                set_immutable(path, False)
                path.chmod(_RETAINED)
                os.utime(path, (found.st_atime, until.timestamp()))
            set_immutable(path, True)

    def keeps_immutable(self) -> bool:
        """Whether `retain` can set the file system's immutable flag here."""
        probe = self.staging() / f"flag-{secrets.token_hex(8)}"
        with _translated(f"look at {self.root}"):
            probe.touch(mode=0o600)
            kept = set_immutable(probe, True)
            set_immutable(probe, False)
            probe.unlink()
        return kept

    def copies(self) -> Sequence[Store]:
        return (self,)

    # --- reading ---------------------------------------------------------------------------------------------------

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        path = self.root / checked(name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            self._guard()
            raise ObjectMissing(f"{name} is missing from the vault at {self.root}") from None
        except OSError as error:
            raise VaultError(f"cannot read {name}: {error.strerror or error}") from error
        try:
            with _translated(f"read {name}"):
                size = os.fstat(fd).st_size
                wanted = max(size - offset, 0) if length is None else length
                data = _pread(fd, offset, wanted) if offset + wanted <= size else b""
        finally:
            os.close(fd)
        if len(data) != wanted:
            raise Corrupt(f"{name} is cut short: {size} bytes, wanted {offset} to {offset + wanted}")
        return data

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        folder, _, start = prefix.rpartition("/")
        base = self.root / checked(folder) if folder else self.root
        yield from _walk(base, f"{folder}/" if folder else "", start)
        self._guard()  # one that is unmounted, or was meanwhile, must not look empty, nor as if half of it were there

    def free_bytes(self) -> int | None:
        with _translated(f"look at {self.root}"):
            found = os.statvfs(self.root)
        return found.f_bavail * found.f_frsize

    def close(self) -> None:
        """Remove this process's staging folder."""
        self._staging.close()


_RETAINED = 0o400


def _retained(found: os.stat_result) -> float:
    """Until when an object is retained, as Unix time: its mtime, if nobody may write it; as on write-once filers."""
    return found.st_mtime if stat.S_IMODE(found.st_mode) == _RETAINED else 0.0


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _walk(folder: Path, prefix: str, start: str) -> Iterator[ObjectInfo]:
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise VaultError(f"cannot list {folder}: {error.strerror or error}") from error
    for entry in entries:
        if not entry.name.startswith(start) or not NAME.fullmatch(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", "")
            continue
        with suppress(FileNotFoundError):
            yield ObjectInfo(prefix + entry.name, entry.stat().st_size)


def _pread(fd: int, offset: int, length: int) -> bytes:
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
