"""What only one controller at a time does: a lease in the catalog.

Taken and renewed by a guarded update, with the database's clock on both sides, so that controllers whose clocks differ
agree on when it has run out. The holder counts its own time from before it asked, on a clock that nobody sets, and
stops a margin earlier: at no moment do two of them believe to hold it. A process that was stopped in the middle of an
act, and goes on when another one leads, is no danger all the same: whatever a leader writes is guarded by itself.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from datetime import UTC, datetime, timedelta

from sqlalchemy import or_, text, update
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col

from orchestrator.catalog.schema import LeaseRow
from orchestrator.catalog.store import Catalog

LEADER = "leader"
LEASE_SECONDS = 30.0
MARGIN = 3.0
"""Seconds before its end at which the holder stops to believe in it."""


def database_now(session: Session) -> datetime:
    """The time by the database's clock, in whole seconds on SQLite."""
    found = session.connection().execute(text("SELECT CURRENT_TIMESTAMP")).scalar_one()
    moment = found if isinstance(found, datetime) else datetime.fromisoformat(str(found))
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def holder_of(session: Session, name: str = LEADER) -> str:
    """Who holds it now; empty: nobody."""
    row = session.get(LeaseRow, name)
    return row.holder if row is not None and row.until is not None and row.until > database_now(session) else ""


class Lease:
    """One process's claim on a lease. Not for use by several threads at once, but for `held`."""

    def __init__(self, catalog: Catalog, name: str = LEADER, *, seconds: float = LEASE_SECONDS) -> None:
        self._catalog = catalog
        self._name = name
        self._seconds = seconds
        self._margin = min(MARGIN, seconds / 4)
        self._believed_until = 0.0
        self.holder = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(4)}"
        """Unique to this claim."""

    def held(self) -> bool:
        """Whether it is certainly held at this moment."""
        return time.monotonic() < self._believed_until

    def claim(self) -> bool:
        """Take it if it is free, renew it if it is ours; whether it is held now."""
        began = time.monotonic()
        with self._catalog.write() as session:
            mine = self._claim(session)
        self._believed_until = began + self._seconds - self._margin if mine else 0.0
        return self.held()

    def _claim(self, session: Session) -> bool:
        now = database_now(session)
        free = or_(col(LeaseRow.until).is_(None), col(LeaseRow.until) <= now, col(LeaseRow.holder) == self.holder)
        taken = (
            update(LeaseRow)
            .where(col(LeaseRow.name) == self._name, free)
            .values(holder=self.holder, until=now + timedelta(seconds=self._seconds))
        )
        if session.connection().execute(taken).rowcount:
            return True
        try:
            with session.begin_nested():
                session.add(LeaseRow(name=self._name, holder="", until=None))
        except IntegrityError:  # it is there, and somebody else's
            return False
        return session.connection().execute(taken).rowcount > 0

    def give_up(self) -> None:
        """Let others have it at once."""
        self._believed_until = 0.0
        mine = update(LeaseRow).where(col(LeaseRow.name) == self._name, col(LeaseRow.holder) == self.holder)
        with self._catalog.write() as session:
            session.connection().execute(mine.values(until=None))
