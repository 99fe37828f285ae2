"""A wire to libvirtd (or a QEMU) that can be cut, as a restart of it cuts it; the daemon itself serves other tests."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from types import TracebackType

LIBVIRTD = "/run/libvirt/libvirt-sock"


class Relay:
    """Passes bytes between clients of the socket `path` and `daemon`."""

    def __init__(self, path: Path, daemon: str | Path = LIBVIRTD) -> None:
        self.path = path
        self._daemon = str(daemon)
        self.has_cut = False
        """Whether the words of `cut_at` have been seen."""
        self._cut_at, self._for_good = b"", False
        self._links: list[socket.socket] = []
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen()

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """End all connections; new ones can be made."""
        while self._links:
            with contextlib.suppress(OSError):
                self._links.pop().shutdown(socket.SHUT_RDWR)

    def cut_at(self, words: bytes, *, for_good: bool = False) -> None:
        """Deliver the request that holds `words`, and lose its reply; `for_good`: nothing passes afterwards."""
        self._cut_at, self._for_good = words, for_good

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not (self.has_cut and self._for_good):
                client, _ = self._server.accept()
                daemon = socket.socket(socket.AF_UNIX)
                daemon.connect(self._daemon)
                self._links += [client, daemon]
                for source, sink in ((client, daemon), (daemon, client)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError), source:
            while data := source.recv(65536):
                sink.sendall(data)
                if self._cut_at and self._cut_at in data:
                    self._cut_at, self.has_cut = b"", True
                    if self._for_good:
                        self._server.shutdown(socket.SHUT_RDWR)
                    self.cut()
            sink.shutdown(socket.SHUT_RDWR)
