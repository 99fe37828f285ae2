"""A disk to be read over NBD, by libnbd (which releases the GIL and reads without copying).

Two facts decide the shape. QEMU answers allocation slowly on fragmented images, so allocation is asked only inside
dirty ranges (research: virtnbdbackup#263, 18 minutes before the first byte). And one synchronous connection leaves
both sides idle in turn, so every reading thread has a connection of its own with a few reads in flight (measured:
13 → 5 minutes in libnbd's own list; three in flight saturate two cores here).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from workers.contract.errors import DiskError, NoSpace
from workers.contract.extents import Extent, Kind

ALLOCATION = "base:allocation"
_STATE_ZERO = 2  # base:allocation, bit 1
_STATE_DIRTY = 1  # qemu:dirty-bitmap, bit 0
_MOST = (1 << 32) - (1 << 20)  # bytes per status request: the protocol's length has 32 bits


class NbdSource:
    """`BlockSource` over one NBD export on a unix socket. Raises DiskError for anything the server refuses."""

    def __init__(self, socket: Path, export: str, *, bitmap: str | None = None, in_flight: int = 3) -> None:
        """`bitmap` is the full name of the meta context with the changes since the base; None: read everything."""
        self._socket = socket
        self._export = export
        self._bitmap = bitmap
        self._in_flight = in_flight
        with translated(self._what()), self._connected(None) as handle:
            self.size: int = handle.get_size()

    def _what(self) -> str:
        return f"NBD export {self._export!r} at {self._socket}"

    @contextmanager
    def _connected(self, context: str | None) -> Iterator[Any]:
        """A connection that is over at the end, whatever happens, and every reply to it taken.

        Dropping it is not enough: a traceback can keep it open, and QEMU (7.2) waits in nbd-server-stop, with the
        guest, for as long as anybody leaves a reply in the socket."""
        import nbd  # Debian's python3-libnbd

        handle = nbd.NBD()
        handle.set_export_name(self._export)
        if context is not None:
            handle.add_meta_context(context)
        handle.connect_unix(str(self._socket))
        try:
            if context is not None and not handle.can_meta_context(context):
                raise DiskError(f"{self._what()} does not offer {context}")
            yield handle
        finally:
            with suppress(nbd.Error):  # whoever hung up already has nothing more to say
                handle.shutdown(nbd.SHUTDOWN_ABANDON_PENDING)

    def extents(self, *, trust_changes: bool = True) -> Iterator[Extent]:
        with translated(self._what()), self._connected(ALLOCATION) as allocation:
            if self._bitmap is None or not trust_changes:
                yield from _data_or_zero(allocation, 0, self.size)
                return
            with self._connected(self._bitmap) as changes:
                for start, length, flags in _status(changes, self._bitmap, 0, self.size):
                    if flags & _STATE_DIRTY:
                        yield from _data_or_zero(allocation, start, start + length)
                    else:
                        yield Extent(start, length, Kind.UNCHANGED)

    def read(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
        import nbd

        with translated(self._what()), self._connected(None) as handle:
            free: list[bytearray] = [bytearray() for _ in range(self._in_flight)]
            flying: deque[tuple[int, int, int, bytearray]] = deque()
            source = iter(ranges)
            more = True
            while more or flying:
                while more and free:
                    piece = next(source, None)
                    if piece is None:
                        more = False
                        break
                    offset, length = piece
                    room = free.pop()
                    if len(room) < length:
                        room = bytearray(length)
                    buffer = nbd.Buffer.from_buffer(memoryview(room)[:length])  # shares memory; from_bytearray copies
                    flying.append((handle.aio_pread(buffer, offset), offset, length, room))
                if flying:
                    cookie, offset, length, room = flying.popleft()
                    while not handle.aio_command_completed(cookie):
                        handle.poll(-1)
                    yield offset, memoryview(room)[:length]
                    free.append(room)

    def close(self) -> None:
        """Nothing is held between calls."""


def _data_or_zero(handle: Any, start: int, end: int) -> Iterator[Extent]:
    for offset, length, flags in _status(handle, ALLOCATION, start, end):
        yield Extent(offset, length, Kind.ZERO if flags & _STATE_ZERO else Kind.DATA)


def _status(handle: Any, context: str, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """`(offset, length, flags)` that tile `[start, end)`: replies may be short, overlong or in pieces."""
    position = start
    while position < end:
        entries: list[int] = []

        def keep(name: str, _offset: int, reply: list[int], _error: object, into: list[int] = entries) -> int:
            if name == context:
                into.extend(reply)
            return 0

        handle.block_status(min(end - position, _MOST), position, keep)
        if not entries or entries[0] == 0:
            raise DiskError(f"empty block status for {context} at byte {position}")
        for length, flags in zip(entries[::2], entries[1::2], strict=True):
            length = min(length, end - position)
            if length:
                yield position, length, flags
                position += length


class translated:
    """nbd.Error, said with what was being read."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        import nbd

        if isinstance(error, nbd.Error):
            if error.errno == "ENOSPC":
                raise NoSpace(f"{self._what}: no space left", hint="choose another place") from None
            raise DiskError(
                f"{self._what}: {error.string}",
                hint="did the machine stop, or its hypervisor's storage fill up? `stillframe doctor` looks",
            ) from None
