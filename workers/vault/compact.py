"""Packs that are mostly dead, made into fewer: their live blocks are copied into new packs, which are indexed; then a
condemnation takes the old ones. A block is decrypted, which proves it, and sealed again as it was compressed.

Nothing is lost if this stops anywhere: until the old pack is condemned its blocks merely exist twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag

from workers.contract.errors import Corrupt, NewerFormat, ObjectMissing
from workers.vault.index import FLUSH, Packs, write_segment
from workers.vault.mark import Marks, prefixes
from workers.vault.packs import TARGET, Entry, PackBuilder, aad, nonce, pack_cipher, pack_name
from workers.vault.vault import Vault

DEAD_SHARE = 0.25
"""Share of a pack that must be dead, or missing to a full one, before it is worth to be copied."""
_GAP = 64 << 10
"""Dead bytes between two live blocks that are read along with them: one request less to an object store."""
_RUN = 8 << 20


@dataclass
class Compacted:
    packs: list[bytes]
    """Digests of packs whose live blocks all have a copy elsewhere now."""
    copied_bytes: int = 0
    skipped: int = 0
    """Packs that hold a live block which cannot be read: `vault verify` tells which."""


Advance = Callable[[int], None]
"""Called with the number of packs that are done."""


class Compactor:
    """`bandwidth`: bytes per second at the most, of what is copied."""

    def __init__(self, vault: Vault, marks: Marks, *, bandwidth: int | None, pack_size: int = TARGET) -> None:
        self._vault = vault
        self._marks = marks
        self._bandwidth = bandwidth
        self._pack_size = pack_size
        self._started = time.monotonic()
        self._open: PackBuilder | None = None
        self._stored: Packs = {}
        self._copied: set[bytes] = set()
        self._done = Compacted([])

    def run(self, packs: Iterable[bytes], advance: Advance) -> Compacted:
        """Copy the live blocks of `packs` (digests). Raises NoSpace, VaultError."""
        try:
            taken = []
            for number, digest in enumerate(packs):
                advance(number)
                if self._copy(digest):
                    taken.append(digest)
            self._close()
            self._flush()
        finally:
            if self._open is not None:
                self._open.abandon()
        self._done.packs = taken
        return self._done

    def _copy(self, digest: bytes) -> bool:
        """Whether every live block has a copy elsewhere now. A copy that is known to be damaged is left: nobody would
        have chosen the pack if that were the only one."""
        name, keys = pack_name(digest), self._vault.keys
        entries = self._vault.index.entries(name)
        live = self._marks.of(prefixes(b"".join(entry.id for entry in entries)))
        passed = self._copied | {copy.block for copy in self._vault.index.damage() if copy.pack == digest}
        wanted = [entry for entry, needed in zip(entries, live, strict=True) if needed and entry.id not in passed]
        try:
            cipher = pack_cipher(self._vault.store, name, keys)
            for entry, sealed in self._sealed(name, wanted):
                bound = aad(keys.vault, entry.kind, entry.codec, entry.id, entry.plain)
                self._append(entry, cipher.decrypt(nonce(entry.offset), sealed, bound))
        except (InvalidTag, Corrupt, ObjectMissing, NewerFormat):
            self._done.skipped += 1
            return False
        return True

    def _sealed(self, name: str, entries: list[Entry]) -> Iterator[tuple[Entry, bytes]]:
        """Sealed blocks, neighbours read together."""
        for run in _runs(entries):
            start = run[0].offset
            data = self._vault.store.get(name, start, run[-1].offset + run[-1].stored - start)
            self._wait(len(data))
            for entry in run:
                yield entry, data[entry.offset - start : entry.offset - start + entry.stored]

    def _append(self, entry: Entry, payload: bytes) -> None:
        if self._open is None:
            self._open = PackBuilder(self._vault.store.staging(), self._vault.keys)
        self._done.copied_bytes += self._open.append(entry.kind, entry.id, entry.plain, entry.codec, payload).stored
        self._copied.add(entry.id)
        if self._open.full(self._pack_size):
            self._close()

    def _close(self) -> None:
        if self._open is None:
            return
        pack = self._open
        digest = pack.close()
        self._vault.store.put_file(pack_name(digest), pack.path)
        self._open = None
        self._stored[digest] = pack.entries
        if sum(map(len, self._stored.values())) > FLUSH:
            self._flush()

    def _flush(self) -> None:
        if self._stored:
            name = write_segment(self._vault.store, self._vault.keys, self._stored)
            self._vault.index.add(name, self._stored)
            self._stored = {}

    def _wait(self, size: int) -> None:
        if self._bandwidth:
            due = self._started + (self._done.copied_bytes + size) / self._bandwidth
            time.sleep(max(0.0, due - time.monotonic()))


def _runs(entries: list[Entry]) -> Iterator[list[Entry]]:
    run: list[Entry] = []
    for entry in entries:
        end = run[-1].offset + run[-1].stored if run else 0
        if run and (entry.offset - end > _GAP or entry.offset + entry.stored - run[0].offset > _RUN):
            yield run
            run = []
        run.append(entry)
    if run:
        yield run
