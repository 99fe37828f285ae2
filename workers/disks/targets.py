"""Disks to be written at a restore: a raw file directly, a qcow2 through qemu-nbd.

Both are new and read as zeroes, so only data is written and the result is as sparse as the source. Flushed before
anybody is told that the disk is there.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from workers.contract.errors import NoSpace
from workers.disks.images import Format, create, export_writable, stop_exports
from workers.disks.nbd_source import _translated

_IN_FLIGHT = 4


class RawTarget:
    """`BlockTarget` over a new raw file."""

    def __init__(self, path: Path, size: int) -> None:
        self.size = size
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._file, size)

    def write(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        try:
            for offset, data in pieces:
                written = 0
                while written < len(data):
                    written += os.pwrite(self._file, memoryview(data)[written:], offset + written)
        except OSError as error:
            raise NoSpace(f"cannot write {self._path}: {error.strerror}") from None

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)


class Qcow2Target:
    """`BlockTarget` over a new qcow2 image, through a qemu-nbd of its own in `folder`."""

    def __init__(self, path: Path, size: int, options: dict[str, str], folder: Path) -> None:
        self.size = size
        self._path = path
        self._folder = folder
        create(path, "qcow2", size, options)
        path.chmod(0o600)
        self._socket = folder / "target.sock"
        export_writable(path, "qcow2", self._socket)

    def write(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        import nbd

        with _translated(f"cannot write {self._path}"):
            handle = nbd.NBD()
            handle.connect_unix(str(self._socket))
            flying: deque[tuple[int, Any]] = deque()
            for offset, data in pieces:
                if len(flying) == _IN_FLIGHT:
                    _finish(handle, flying.popleft()[0])
                buffer = nbd.Buffer.from_buffer(data)
                flying.append((handle.aio_pwrite(buffer, offset), buffer))
            while flying:
                _finish(handle, flying.popleft()[0])
            handle.flush()
            handle.shutdown()

    def close(self) -> None:
        stop_exports(self._folder)
        descriptor = os.open(self._path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _finish(handle: Any, cookie: int) -> None:
    while not handle.aio_command_completed(cookie):
        handle.poll(-1)


def open_target(
    path: Path, format: Format, size: int, options: dict[str, str], folder: Path
) -> RawTarget | Qcow2Target:
    """A new image at `path`; `folder` is this job's own, for the helper's socket."""
    return RawTarget(path, size) if format == "raw" else Qcow2Target(path, size, options, folder)
