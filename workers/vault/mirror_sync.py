"""A new, replaced or outdated store of a mirror is made like the others: `stillframe vault mirror-sync`.

The marker comes last, so a store that is half made is not taken for one of the vault's (see `mirror.py`); until then
nothing is written to the vault, and reads go on. What the store has and the others do not, it missed the deletion of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from workers.contract.errors import Locked
from workers.contract.machines import Value
from workers.contract.seams import Store
from workers.vault.copying import NotCopied, copy_all, listed, missing
from workers.vault.mirror import DECIDING, extra, heal
from workers.vault.replicate import Progress, check_target
from workers.vault.stores import MARKER

_BLOCKS = ("packs/", "index/")


class SyncReport(Value):
    """What was done to one store."""

    place: str
    objects: int = 0
    """Copied to it."""
    bytes: int = 0
    removed: int = 0
    not_copied: list[NotCopied] = []
    """Objects that are not what was written where they were to come from."""


def outdated(source: Store, target: Store) -> list[str]:
    """What the target has and the source has not, in the order in which it is to be removed. Raises VaultError if it
    is of another vault."""
    check_target(source, target)
    here = listed(source, *reversed(_BLOCKS))
    blocks = [name for name in listed(target, *reversed(_BLOCKS)) if name not in here]
    return [*extra(source, target), *blocks]


def sync_store(
    source: Store, target: Store, remove: Sequence[str], on_progress: Callable[[Progress], None] = lambda _: None
) -> SyncReport:
    """Remove the objects `remove` from the target, and copy to it what it lacks. Cut off: run it again."""
    check_target(source, target)
    removed = sum(_removed(target, name) for name in remove)
    # The keyring first: by it a store that was cut off is told from another vault's.
    small = [info for info in missing(source, target, "keyring/") if heal(source, target, info.name)]
    wanted = missing(source, target, *_BLOCKS)
    total, done = sum(info.size for info in wanted), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(Progress(stage="packs", done=done, total=total))

    copies = copy_all(source, target, wanted, on_bytes=advance)
    small += [info for info in missing(source, target, *DECIDING) if heal(source, target, info.name)]
    heal(source, target, MARKER)
    return SyncReport(
        place=target.features.place,
        objects=copies.objects + len(small),
        bytes=copies.bytes + sum(info.size for info in small),
        removed=removed,
        not_copied=copies.refused,
    )


def _removed(target: Store, name: str) -> bool:
    """False: it is retained, and of no harm to anybody; a sweep of the whole removes it when that is over."""
    try:
        target.delete(name)
    except Locked:
        if not name.startswith(_BLOCKS):
            raise
        return False
    return True
