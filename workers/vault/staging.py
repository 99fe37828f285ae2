"""Where a process builds files before they become objects.

A folder belongs to one process, which holds a lock on it: what a killed process left is recognised by its lock being
free, and removed by the next one.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import socket
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

from workers.contract.errors import VaultError


class Staging:
    """This process's folder under `base`, for all threads; made when first asked for, and again if it has vanished."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._unlock: Callable[[], object] = lambda: None
        """Closes the lock on the folder; also when nobody uses this any more: who runs for months opens many."""

    @property
    def present(self) -> bool:
        return self._folder is not None and self._folder.is_dir()

    def folder(self) -> Path:
        """Raises OSError."""
        with self._lock:  # of two that make one, the second would take the lock off the folder of the first
            if self._folder is None or not self._folder.is_dir():
                self._folder = self._make()
            return self._folder

    def _make(self) -> Path:
        self._base.mkdir(mode=0o700, exist_ok=True)
        host = re.sub(r"[^a-z0-9-]", "-", socket.gethostname().lower())
        for stale in self._base.glob(f"{host}.*"):
            _remove_if_stale(stale)
        folder = self._base / f"{host}.{os.getpid()}.{secrets.token_hex(4)}"
        # Locked before it gets the name under which others look for stale ones.
        hidden = self._base / f".new-{secrets.token_hex(8)}"
        hidden.mkdir(mode=0o700)
        self._unlock()
        lock = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._unlock = weakref.finalize(self, os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        hidden.rename(folder)
        return folder

    def close(self) -> None:
        """Remove the folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._unlock()
            self._folder = None


def _remove_if_stale(folder: Path) -> None:
    """Remove a staging folder whose process is gone: nobody holds its lock."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(fd)


def local_folder() -> Path:
    """For a vault that is not on this host: on a disk rather than in memory, and nobody else's. Raises VaultError."""
    folder = Path(os.environ.get("TMPDIR", "/var/tmp")) / f"stillframe-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise VaultError(f"cannot make {folder}: {error.strerror}", hint="set TMPDIR") from error
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or folder.is_symlink():
        raise VaultError(f"{folder} is not ours alone", hint="remove it, or set TMPDIR to a folder of your own")
    return folder
