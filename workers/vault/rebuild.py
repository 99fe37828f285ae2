"""Index segments again, from the packs alone: for a vault whose `index/` was lost or damaged.

Old segments are removed only after all new ones are durable, and what they knew of a pack whose footer is damaged is
taken over, so a rebuild never loses what could be read before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from workers.contract.errors import Corrupt, NewerFormat, ObjectMissing
from workers.vault.condemned import read_condemned
from workers.vault.index import FLUSH, PREFIX, Packs, write_segment
from workers.vault.packs import digest_of, pack_name, read_footer
from workers.vault.vault import Vault


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


def rebuild_index(vault: Vault) -> int:
    """Write all index segments anew; the number of entries. Packs that cannot be read are passed over: `verify`
    reports them. Writers may work meanwhile: a segment that is written during the rebuild is left alone."""
    store = vault.store
    vault.index.refresh()
    # Listed before the packs: whatever these segments name is among the packs that are listed after.
    old = {info.name for info in store.list(PREFIX)}
    total = pending = 0
    packs: Packs = {}
    fresh: set[str] = set()
    for info in store.list("packs/"):
        try:
            entries = read_footer(store, info.name, info.size, vault.keys)
        except (Corrupt, NewerFormat):
            entries = vault.index.entries(info.name)
        except ObjectMissing:
            continue  # swept since it was listed
        if not entries:
            continue
        packs[bytes.fromhex(info.name.removeprefix("packs/"))] = entries
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
    return total
