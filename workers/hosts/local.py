"""The host that this process runs on."""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from workers import tools
from workers.contract.errors import DiskError, NoSpace, TargetExists
from workers.contract.hosts import Seen

END_SECONDS = 60.0


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else DiskError
        raise kind(f"{doing}: {error.strerror}") from None


class LocalHost:
    """See `contract.hosts.Host`."""

    name = "this host"
    local = True

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 120.0) -> str:
        return tools.run(argv, stdin=stdin, timeout=timeout)

    def look(self, paths: Sequence[Path], *, head: int = 0) -> dict[Path, Seen]:
        return {path: _look(path, head) for path in paths}

    def taken(self, path: Path) -> bool:
        return os.path.lexists(path)

    def writable(self, folder: Path) -> bool:
        return os.access(folder, os.W_OK)

    def read(self, path: Path) -> bytes | None:
        with _translated(f"cannot read {path}"):
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def write(self, path: Path, data: bytes) -> None:
        partial = path.with_name(path.name + ".partial")
        try:
            with _translated(f"cannot write {path}"):
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    os.fsync(file.fileno())
                partial.replace(path)
        except (DiskError, NoSpace):
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise

    def names(self, folder: Path, pattern: str) -> list[str]:
        if not folder.is_dir() or not os.access(folder, os.R_OK):
            return []
        return sorted(entry.name for entry in folder.glob(pattern))

    def free(self, path: Path) -> int:
        with _translated(str(path)):
            return shutil.disk_usage(path).free

    def make_folder(self, path: Path, mode: int) -> None:
        with _translated(f"{path} cannot be made"):
            path.mkdir(parents=True, exist_ok=True, mode=mode)

    def link(self, path: Path, name: Path) -> None:
        try:
            with _translated(f"{name} cannot be made"):
                os.link(path, name)
                descriptor = os.open(name.parent, os.O_RDONLY | os.O_CLOEXEC)
                os.fsync(descriptor)
                os.close(descriptor)
        except DiskError:
            if os.path.lexists(name):
                raise TargetExists(f"{name} exists already") from None
            raise

    def sync(self, path: Path) -> None:
        with _translated(f"cannot write {path}"):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def remove(self, paths: Sequence[Path]) -> None:
        for path in paths:
            with _translated(f"cannot remove {path}"), suppress(FileNotFoundError):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def end(self, pid_file: Path, word: str) -> None:
        content = self.read(pid_file)
        pid = int(content) if content and content.strip().isdigit() else 0
        if not pid or word not in _command_line(pid):
            return
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGTERM)
            if not select.select([handle], [], [], END_SECONDS)[0]:
                raise DiskError(f"process {pid} did not end within {END_SECONDS:.0f} s ({word})")
        finally:
            os.close(handle)

    @contextmanager
    def socket(self, path: Path) -> Iterator[Path]:
        yield path

    def command(self, argv: Sequence[str]) -> list[str]:
        return [*argv]

    def close(self) -> None:
        """Nothing is held."""


def _look(path: Path, head: int) -> Seen:
    try:
        found = path.stat()
    except OSError as error:
        return Seen(trouble=error.strerror or str(error))
    content, trouble = b"", ""
    seen = Seen(found.st_mode)
    if head and (seen.is_file or seen.is_block_device):
        try:
            with path.open("rb") as file:
                content = file.read(head)
        except OSError as error:
            trouble = error.strerror or str(error)
    return Seen(
        mode=found.st_mode,
        device=found.st_dev,
        inode=found.st_ino,
        size=found.st_size,
        mtime_ns=found.st_mtime_ns,
        ctime_ns=found.st_ctime_ns,
        head=content,
        trouble=trouble,
    )


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


LOCAL = LocalHost()
