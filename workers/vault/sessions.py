"""Sessions: who is at work in a vault, and what must therefore stay (FORMAT.md, "Sessions").

A sweep may run on any host at any time. It waits for every session that does not know of a condemnation, and leaves
alone the manifests that a session reads. So the order in here is the safety argument: what is known is listed before
the session exists, what is relied on is looked at after it does, and a session is never replaced by another.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from pydantic import ValidationError

from workers.contract.errors import Corrupt, ObjectMissing, VaultError
from workers.contract.machines import Value
from workers.contract.seams import Store
from workers.vault.sealing import decode_plain, encode_plain

SESSIONS = "sessions/"
CONDEMNED = "condemned/"


class SessionInfo(Value):
    """A writer or reader that announced itself."""

    session: str
    point: str
    """Id of the point that it may create; empty for one that only reads."""
    started: datetime
    host: str = ""
    """For people."""
    knows: list[str] | None = None
    """Condemnations on whose packs it does not rely; None: written before there were any, it knows none."""
    reads: list[str] | None = None
    """Points whose manifests stay as long as it lasts; None: it may read every point."""


def announce(store: Store, session: str, *, point: str = "", reads: Sequence[str] = ()) -> None:
    """Say that `session` (a job) works, may create `point`, and reads the points `reads`. The same again (a command
    that arrived twice): no error. Raises VaultError if another is announced under that name."""
    wanted = SessionInfo(
        session=session,
        point=point,
        started=datetime.now(UTC),
        host=socket.gethostname(),
        knows=_condemned_everywhere(store),
        reads=sorted(reads),
    )
    name = SESSIONS + session
    if store.put(name, encode_plain(wanted.model_dump(mode="json"))):
        return
    found = read_session(store, name)
    if found is None or (found.point, found.reads) != (point, wanted.reads):
        raise VaultError(
            f"session {session} is announced already, for another point",
            hint="the job that announced it ended without its release: `stillframe job list`",
        )


def _condemned_everywhere(store: Store) -> list[str]:
    """Condemnations that each store of the vault lists. One that a put which was cut off has left in the first alone is
    not listed while that one does not answer; to know less than there is makes a sweep wait, and no more."""
    listed = [{info.name for info in copy.list(CONDEMNED)} for copy in store.copies()]
    return sorted(set.intersection(*listed)) if listed else []


def withdraw(store: Store, session: str) -> None:
    """End a session. Absent already: no error."""
    store.delete(SESSIONS + session)


def read_session(store: Store, name: str) -> SessionInfo | None:
    """None: it has ended. Raises Corrupt."""
    try:
        found = SessionInfo.model_validate(decode_plain(store.get(name), name))
    except ObjectMissing:
        return None
    except ValidationError:
        raise Corrupt(f"{name} is not a session") from None
    if name != SESSIONS + found.session:
        raise Corrupt(f"{name} is the session of {found.session}")
    return found


def sessions(store: Store) -> Iterator[SessionInfo]:
    """All that are announced. Raises Corrupt at a damaged one: nothing may be swept beside a session that cannot be
    read."""
    for info in store.list(SESSIONS):
        found = read_session(store, info.name)
        if found is not None:
            yield found
