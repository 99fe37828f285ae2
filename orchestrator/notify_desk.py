"""Tells people: a chore that sends what they were not told yet, and a test that it would.

What was sent is noted after it was sent: a controller that dies in between tells it twice, and none loses it. A target
that fails waits longer each time, is an alert itself, and gets everything when it works again; no other waits for it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from orchestrator import alarms
from orchestrator.alarms import Severity
from orchestrator.catalog.alerts import apply, standing, untold
from orchestrator.catalog.deliveries import note_said, said_of, settle
from orchestrator.catalog.schema import AlertRow
from orchestrator.catalog.store import Catalog
from orchestrator.chores import Chore
from orchestrator.config import Config
from orchestrator.notices import Message, Notice, backoff, unsaid
from orchestrator.notify_targets import NotSent, Target, targets
from workers.contract.errors import NotFound, UsageError

SECONDS = 30.0
PAUSE = timedelta(seconds=60)
"""Between two messages to a target, however many chores' turns there are: what happens meanwhile is told together."""
_EXAMPLE = "stillframe notify test: somebody would be told like this"


@dataclass(frozen=True, slots=True)
class _Trouble:
    failures: int
    again: datetime
    """Not before that."""


class NotifyDesk:
    """`config`: the one in force; `ways`: from its section to targets."""

    def __init__(
        self,
        config: Callable[[], Config],
        catalog: Catalog,
        ways: Callable[[Config], Sequence[Target]] = lambda config: targets(config.notify),
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._ways = ways
        self._trouble: dict[str, _Trouble] = {}
        self._sent: dict[str, datetime] = {}

    def chores(self) -> list[Chore]:
        return [Chore("notify", SECONDS, self.tell)]

    def tell(self, now: datetime) -> None:
        """One message at most to each target."""
        ways = self._ways(self._config())
        self._forget_targets({way.name for way in ways})
        with self._catalog.read() as session:
            rows = untold(session)
        if not rows:
            return
        for way in ways:
            self._tell(way, rows, now)
        self._settle(rows, ways)

    def _forget_targets(self, names: set[str]) -> None:
        """Of a target that is no longer configured nobody needs to know that it failed."""
        for name in self._trouble.keys() - names:
            del self._trouble[name]
            with self._catalog.write() as session:
                apply(session, [alarms.Resolve(alarms.target_well(name).key, "it is no longer configured")])

    def _tell(self, way: Target, rows: Sequence[AlertRow], now: datetime) -> None:
        trouble = self._trouble.get(way.name)
        if trouble is not None and now < trouble.again:
            return
        if timedelta(0) <= now - self._sent.get(way.name, datetime.min.replace(tzinfo=UTC)) < PAUSE:
            return
        with self._catalog.read() as session:
            said = said_of(session, [row.id for row in rows if row.id is not None])
        notices = [
            notice
            for notice in map(notice_of, rows)
            if unsaid(notice, said.get((way.name, notice.id)), way.threshold, way.name)
        ]
        if not notices:
            return
        self._sent[way.name] = now
        try:
            remark = way.send(Message.of(socket.gethostname(), now, notices))
        except NotSent as error:
            self._failed(way.name, str(error), now)
            return
        with self._catalog.write() as session:
            note_said(session, way.name, [(notice.id, notice.state) for notice in notices])
            apply(session, [alarms.target_failing(way.name, remark) if remark else alarms.target_well(way.name)])
        self._trouble.pop(way.name, None)

    def _failed(self, name: str, why: str, now: datetime) -> None:
        before = self._trouble.get(name)
        failures = (before.failures if before else 0) + 1
        self._trouble[name] = _Trouble(failures, now + timedelta(seconds=backoff(failures)))
        with self._catalog.write() as session:
            apply(session, [alarms.target_failing(name, why)])

    def _settle(self, rows: Sequence[AlertRow], ways: Sequence[Target]) -> None:
        """What every target that is to know has been told is not looked at again."""
        with self._catalog.write() as session:
            said = said_of(session, [row.id for row in rows if row.id is not None])
            settle(session, [row for row in rows if not _open(notice_of(row), ways, said)])

    # --- by hand ---------------------------------------------------------------------------------------------------

    def test(self, name: str | None, now: datetime) -> list[tuple[str, str, str]]:
        """Send an example to one target or to all: (target, what went wrong, remark or hint). Raises UsageError where
        there are none, NotFound."""
        ways = self._ways(self._config())
        if not ways:
            hint = "add a [notify.email] or [notify.webhooks.NAME] section"
            raise UsageError(f"{self._config().path} names nobody who could be told", hint=hint)
        if name is not None and name not in [way.name for way in ways]:
            raise NotFound(f"nobody is told by {name!r}", hint=f"there are: {', '.join(way.name for way in ways)}")
        return [self._try(way, now) for way in ways if name in (None, way.name)]

    def _try(self, way: Target, now: datetime) -> tuple[str, str, str]:
        notice = Notice(0, "test", Severity.INFO, "test", _EXAMPLE, "stillframe status", now, now, 1, None, "")
        try:
            remark = way.send(Message.of(socket.gethostname(), now, [notice]))
        except NotSent as error:
            return way.name, str(error), error.hint
        with self._catalog.write() as session:
            if not remark and standing(session, alarms.target_well(way.name).key):
                apply(session, [alarms.target_well(way.name)])
        return way.name, "", remark


def notice_of(row: AlertRow) -> Notice:
    assert row.id is not None
    return Notice(
        id=row.id,
        key=row.key,
        severity=Severity(row.severity),
        subject=row.subject,
        text=row.text,
        hint=row.hint,
        first=row.first,
        last=row.last,
        count=row.count,
        resolved=row.resolved,
        ending=row.ending,
        acknowledged=bool(row.acknowledged),
    )


def _open(notice: Notice, ways: Sequence[Target], said: dict[tuple[str, int], str]) -> bool:
    return any(unsaid(notice, said.get((way.name, notice.id)), way.threshold, way.name) for way in ways)
