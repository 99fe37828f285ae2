"""A disk written on another host: QEMU's tools make and serve the image there, and only data crosses the wire.

`targets.py` lays out a qcow2 by itself because it can put the bytes where they belong; from afar that would be a
connection that carries tables too. Here qemu-nbd there does it, and what is never written reads as zeroes.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from workers.contract.errors import DiskError
from workers.contract.hosts import Host
from workers.contract.messages import ImageFormat
from workers.disks.images import create, export_writable
from workers.disks.nbd_source import translated

IN_FLIGHT = 4
"""Writes that wait for their answer, for each thread: one at a time would be one a round trip."""


class FarTarget:
    """`BlockTarget` over a new image at `path` of `host`; `folder` is there for its server's socket and pid file."""

    def __init__(
        self, host: Host, folder: Path, path: Path, format: ImageFormat, size: int, options: dict[str, str]
    ) -> None:
        self.size = size
        self._host, self._path = host, path
        self._what = f"image {path} on {host.name}"
        word = hashlib.sha256(str(path).encode()).hexdigest()[:12]  # its name may be longer than a socket's may be
        self._server = folder / f"{word}.sock"
        host.write(path, b"")  # for its owner only, before anything is in it
        create(host, path, format, size, options)
        host.make_folder(folder, 0o700)
        export_writable(host, path, format, self._server)
        self._open = ExitStack()
        try:
            self._socket = self._open.enter_context(host.socket(self._server))
            with translated(self._what), self._connected() as handle:
                if (found := handle.get_size()) != size:
                    raise DiskError(f"{self._what} has room for {found} bytes, not {size}")
        except BaseException:
            with suppress(DiskError):
                self._end()
            raise

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        import nbd  # Debian's python3-libnbd

        handle = nbd.NBD()
        handle.connect_unix(str(self._socket))
        try:
            yield handle
        finally:
            with suppress(nbd.Error):
                handle.shutdown(nbd.SHUTDOWN_ABANDON_PENDING)

    def write(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        import nbd

        with translated(self._what), self._connected() as handle:
            flying: deque[tuple[int, Any]] = deque()

            def land() -> None:
                cookie, _ = flying.popleft()
                while not handle.aio_command_completed(cookie):
                    handle.poll(-1)

            for offset, data in pieces:
                buffer = nbd.Buffer.from_buffer(data)
                flying.append((handle.aio_pwrite(buffer, offset), buffer))
                if len(flying) >= IN_FLIGHT:
                    land()
            while flying:
                land()
            handle.flush()

    def close(self) -> None:
        self._end()
        self._host.sync(self._path)

    def _end(self) -> None:
        """Wait for the server: it writes its last tables when it ends."""
        self._open.close()
        pid_file = self._server.with_suffix(".pid")
        self._host.end(pid_file, str(self._server))
        self._host.remove([pid_file, self._server])
