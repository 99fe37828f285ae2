"""A wire with latency, as a process: `python -m tests.bench.delay LISTEN UPSTREAM MILLISECONDS`.

What a client says is held back for the time of a round trip; what is answered passes through the kernel (splice), so
that the bandwidth of the wire is not that of this program.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import threading
import time

_SET_PIPE_SIZE = 1031
_CHUNK = 1 << 20


def _forward(source: socket.socket, sink: socket.socket, delay: float) -> None:
    try:
        while data := source.recv(1 << 16):
            time.sleep(delay)
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        sink.close()


def _back(source: socket.socket, sink: socket.socket) -> None:
    out, into = os.pipe()
    fcntl.fcntl(into, _SET_PIPE_SIZE, _CHUNK)
    try:
        while held := os.splice(source.fileno(), into, _CHUNK):
            while held:
                held -= os.splice(out, sink.fileno(), held)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        sink.close()
    finally:
        os.close(out)
        os.close(into)


def main() -> None:
    listen, upstream, delay = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) / 1000
    with socket.create_server(("127.0.0.1", listen), backlog=128) as server:
        while True:
            client, _ = server.accept()
            store = socket.create_connection(("127.0.0.1", upstream))
            for one in (client, store):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_forward, args=(client, store, delay), daemon=True).start()
            threading.Thread(target=_back, args=(store, client), daemon=True).start()


if __name__ == "__main__":
    main()
