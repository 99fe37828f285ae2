"""Disks written in the formats of other systems: VHD, VHDX, VMDK.

A `qemu-nbd` opens a new, empty image, and the blocks go into it as they come out of the vault: no second engine, and no
raw copy beside the target that would need the space twice. QEMU knows these formats (block tables, logs, checksums of
VHDX); qcow2 and raw have quicker ways of their own (`targets.py`). The server is ours alone, and
ends with its only connection, so also when this process is killed.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from workers.contract.errors import DiskError, UsageError
from workers.contract.messages import ImageFormat
from workers.disks.images import create, driver
from workers.disks.nbd_source import translated
from workers.hosts.local import LOCAL

SECTOR = 512
_PATIENCE = 60.0
"""Seconds that the server may take to end."""
LARGEST: dict[ImageFormat, int] = {"vhd": 2040 << 30, "vhdx": 64 << 40, "vmdk": 62 << 40}
"""Bytes of the largest disk that a format can hold."""


def require_room_for(format: ImageFormat, size: int) -> None:
    """Raises UsageError if a disk of `size` bytes does not fit into a format."""
    largest = LARGEST.get(format)
    if largest is None:
        return
    if size % SECTOR or not size:
        raise UsageError(f"a {format} holds whole sectors, and the disk has {size} bytes", hint="--format raw")
    if size > largest:
        raise UsageError(
            f"a {format} holds at most {largest >> 30} GiB, and the disk has {size >> 30}", hint="--format qcow2"
        )


class ForeignTarget:
    """`BlockTarget` over a new image in a format that QEMU writes. Raises NoSpace, DiskError."""

    def __init__(self, path: Path, format: ImageFormat, size: int) -> None:
        self.size = size
        self._path = path
        self._what = f"image {path}"
        path.touch(mode=0o600, exist_ok=False)
        create(LOCAL, path, format, size)
        self._server, client = _serve(path, format)
        try:
            self._handle = self._connected(client)
        except BaseException:
            self._end()
            raise

    def _connected(self, client: socket.socket) -> Any:
        import nbd  # Debian's python3-libnbd

        handle = nbd.NBD()
        with translated(self._what):
            handle.connect_socket(client.detach())
            if (found := handle.get_size()) != self.size:
                raise DiskError(f"{self._what} has room for {found} bytes, not {self.size}")
        return handle

    def write(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        for offset, data in pieces:
            with translated(self._what):
                self._handle.pwrite(data, offset)

    def close(self) -> None:
        import nbd

        try:
            with translated(self._what):
                self._handle.flush()
        finally:
            with suppress(nbd.Error):
                self._handle.shutdown()
            self._end()
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(descriptor)
        os.close(descriptor)

    def _end(self) -> None:
        """Wait for the server: it writes its last tables when its connection has ended."""
        try:
            code = self._server.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._server.kill()
            code = self._server.wait()
        if code:
            raise DiskError(f"{self._what}: qemu-nbd ended with {code}")


def _serve(path: Path, format: ImageFormat) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A server of the image, and the only connection to it: made before the server runs, which is therefore never
    without one. It gets its listening socket as systemd would give it (sd_listen_fds(3))."""
    name = f"\0stillframe-{secrets.token_hex(8)}"  # abstract: no file that could stay
    client = socket.socket(socket.AF_UNIX)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen(1)
        client.connect(name)
        argv = ["qemu-nbd", "--format", driver(format), "--discard=unmap", str(path)]
        server = subprocess.Popen(
            ["sh", "-c", 'export LISTEN_PID=$$; exec "$@" 3<&0 </dev/null', "sh", *argv],
            stdin=listener.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "LISTEN_FDS": "1"},
            start_new_session=True,  # Ctrl-C is for us: the image is closed in order
        )
    return server, client
