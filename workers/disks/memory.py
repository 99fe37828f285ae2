"""Disks in memory, drawn as text: `"AA0-bb"`, one character a piece.

Upper-case letters are changed data, lower-case ones data that did not change since the base, `0` a range that changed
to zeroes, `-` zeroes that did not change. For tests, which read like pictures of what must happen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from threading import Lock

from workers.contract.extents import Extent, Kind


class MemoryDisk:
    """`BlockSource` and `BlockTarget` over a bytearray; `extents` are given, or everything is DATA."""

    def __init__(self, content: bytes, extents: list[Extent] | None = None, *, tracks: bool = True) -> None:
        self.content = bytearray(content)
        self.size = len(content)
        self._tracks = tracks
        whole = [Extent(0, self.size, Kind.DATA)] if self.size else []
        self._extents = whole if extents is None else extents
        self._lock = Lock()
        self.reads: list[tuple[int, int]] = []
        """Every range that was read, in the order of reading."""

    def extents(self, *, trust_changes: bool = True) -> Iterator[Extent]:
        for extent in self._extents:
            changed = extent.kind is not Kind.UNCHANGED or (trust_changes and self._tracks)
            yield extent if changed else Extent(extent.start, extent.length, Kind.DATA)

    def read(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
        for offset, length in ranges:
            with self._lock:
                self.reads.append((offset, length))
            yield offset, memoryview(bytes(self.content[offset : offset + length]))

    def write(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        for offset, data in pieces:
            self.content[offset : offset + len(data)] = data

    def close(self) -> None:
        """Nothing to let go of."""


def drawn(picture: str, piece: int) -> MemoryDisk:
    """The disk of `picture`, each character `piece` bytes; letters of either case stand for the same content."""
    content = bytearray()
    extents = []
    for index, letter in enumerate(picture):
        content += (b"\0" if letter in "0-" else letter.upper().encode()) * piece
        unchanged = letter == "-" or letter.islower()
        kind = Kind.UNCHANGED if unchanged else Kind.ZERO if letter == "0" else Kind.DATA
        extents.append(Extent(index * piece, piece, kind))
    return MemoryDisk(bytes(content), extents)


def picture(content: bytes, piece: int) -> str:
    """The first character of every piece, `-` for zeroes: the inverse of `drawn`, without what changed."""
    pieces = (content[start : start + piece] for start in range(0, len(content), piece))
    return "".join("-" if not any(part) else chr(part[0]) for part in pieces)
