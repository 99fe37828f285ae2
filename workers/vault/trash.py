"""Deletions of points that can be taken back, and pins that prevent them (FORMAT.md, "Deleting points").

One exclusive create decides how a deletion ends, so a restore from the trash and a sweep cannot both win.
"""

from __future__ import annotations

from workers.contract.seams import Store
from workers.vault.sealing import decode_plain

TRASH = "trash/"


def final(store: Store, point: str) -> bool:
    """Whether a deletion of the point has become final: then its manifest goes as soon as nobody reads it."""
    return any(
        decode_plain(store.get(info.name), info.name).get("outcome") == "final"
        for info in store.list(f"{TRASH}{point}.")
        if info.name.endswith(".end")
    )
