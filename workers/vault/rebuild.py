"""Index segments again, from the packs alone: for a vault whose `index/` was lost or damaged.

Old segments are removed only after all new ones are durable, and what they knew of a pack whose footer is damaged is
taken over, so a rebuild never loses what could be read before it.

Writers, sweeps and other rebuilds may work meanwhile. A segment that appears after the old ones were listed is left
alone, so a writer's is never lost; of two rebuilds the one that lists later sees what the other has written, and so one
of them keeps all. A segment that names a pack which a sweep removes in this moment does no harm: a writer relies on a
pack only if it is there (FORMAT.md, "Sessions"). The next sweep removes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from workers.contract.errors import Corrupt, NewerFormat, ObjectMissing
from workers.contract.machines import Value
from workers.contract.seams import ObjectInfo
from workers.vault.condemned import read_condemned
from workers.vault.index import FLUSH, PREFIX, Packs, write_segment
from workers.vault.packs import Entry, digest_of, pack_name, read_footer
from workers.vault.vault import Vault
from workers.vault.verify import Progress


def unnamed_packs(vault: Vault) -> dict[str, int]:
    """Packs that no segment names, with their sizes: the segment is lost, or its writer has died or is still at work.
    Not those that a sweep is about to remove. Raises Corrupt if a condemnation cannot be read."""
    condemned = read_condemned(vault.store, vault.keys)
    sizes, _ = vault.packs()
    named = set(vault.index.packs())
    return {name: size for name, size in sizes.items() if name not in named and digest_of(name) not in condemned}


def name_packs(vault: Vault, wanted: Mapping[str, int]) -> list[str]:
    """Write a segment for packs that no other names; those whose footer could be read. Never wrong: two segments may
    name one pack."""
    packs: Packs = {}
    for name, size in wanted.items():
        with suppress(Corrupt, NewerFormat, ObjectMissing):
            packs[digest_of(name)] = read_footer(vault.store, name, size, vault.keys)
    if packs:
        write_segment(vault.store, vault.keys, packs)
        vault.index.refresh()
    return [pack_name(digest) for digest in packs]


class Rebuilt(Value):
    """What a rebuild has found."""

    packs: int
    entries: int
    unreadable: list[str]
    """Packs whose footer could not be read; what the old index knew of them was taken over."""
    segments: int
    """Written; those that were there before are gone."""
    seconds: float


def rebuild_index(vault: Vault, *, on_progress: Callable[[Progress], None] | None = None) -> Rebuilt:
    """Write all index segments anew. Packs that cannot be read are passed over: `verify` reports them."""
    started = time.monotonic()
    store = vault.store
    # Listed before the cache takes them over, and before the packs: so the cache knows all that is removed below, and
    # whatever these segments name is among the packs that are listed after.
    old = {info.name for info in store.list(PREFIX)}
    vault.index.refresh()
    packs: Packs = {}
    fresh: set[str] = set()
    unreadable: list[str] = []
    count = total = pending = 0
    found = list(store.list("packs/"))
    for done, info in enumerate(found):
        entries = _entries(vault, info, unreadable)
        if on_progress is not None:
            on_progress(Progress(stage="packs", done=done + 1, total=len(found)))
        if not entries:
            continue
        packs[bytes.fromhex(info.name.removeprefix("packs/"))] = entries
        count += 1
        total += len(entries)
        pending += len(entries)
        if pending > FLUSH:
            fresh.add(write_segment(store, vault.keys, packs))
            packs, pending = {}, 0
    if packs:
        fresh.add(write_segment(store, vault.keys, packs))
    for name in old - fresh:
        store.delete(name)
    vault.index.refresh()
    seconds = time.monotonic() - started
    return Rebuilt(packs=count, entries=total, unreadable=unreadable, segments=len(fresh), seconds=seconds)


def _entries(vault: Vault, info: ObjectInfo, unreadable: list[str]) -> list[Entry]:
    try:
        return read_footer(vault.store, info.name, info.size, vault.keys)
    except (Corrupt, NewerFormat):
        unreadable.append(info.name)
        return vault.index.entries(info.name)
    except ObjectMissing:
        return []  # swept since it was listed
