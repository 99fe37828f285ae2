"""What the original of a replica no longer has, and since when (FORMAT.md, "Replicas").

Deletions follow after a delay of the replica's own, so that whoever empties the original, by mistake or with stolen
rights, has not emptied the replica. Noted in the replica itself: any host may go on with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime

from pydantic import AwareDatetime, ValidationError

from workers.contract.errors import Corrupt, ObjectMissing
from workers.contract.machines import Value
from workers.contract.seams import Store
from workers.vault.sealing import decode_plain, encode_plain

GONE = "gone/"
_NAMES = 500
"""Of one object: it stays below the 64 KiB of a plain object."""


class Gone(Value):
    """Names that the original has lost, seen first at `time`."""

    number: int
    time: AwareDatetime
    names: list[str]


def note_gone(store: Store, names: Collection[str], time: datetime) -> None:
    """Note that the original has `names` no more, as of `time`."""
    left = sorted(names)
    number = max((note.number for note in read_gone(store)), default=0)
    while left:
        number += 1
        note = Gone(number=number, time=time, names=left[:_NAMES])
        if store.put(_name(number), encode_plain(note.model_dump(mode="json"))):
            left = left[_NAMES:]


def read_gone(store: Store) -> list[Gone]:
    """All notes, in order of number. A damaged one is removed: what it named is noted again, and waits once more."""
    notes = []
    for info in list(store.list(GONE)):
        try:
            note = Gone.model_validate(decode_plain(store.get(info.name), info.name))
        except ObjectMissing:
            continue
        except (Corrupt, ValidationError):
            note = None
        if note is None or _name(note.number) != info.name:
            store.delete(info.name)
        else:
            notes.append(note)
    return sorted(notes, key=lambda note: note.number)


def since(notes: Iterable[Gone]) -> dict[str, datetime]:
    """Name → when it was first seen to be gone."""
    found: dict[str, datetime] = {}
    for note in notes:
        for name in note.names:
            found[name] = min(note.time, found.get(name, note.time))
    return found


def strike_off(store: Store, names: Collection[str]) -> None:
    """Forget `names`: they came back, or are removed here too. What a note says besides is noted before it goes."""
    for note in read_gone(store):
        left = [name for name in note.names if name not in names]
        if len(left) < len(note.names):
            if left:
                note_gone(store, left, note.time)
            store.delete(_name(note.number))


def _name(number: int) -> str:
    return f"{GONE}{number:08d}"
