"""The loop of a service: chores again and again, in one thread, as long as this process leads.

Each chore has its own turn; news (a job that ended, a new configuration, a worker that was heard of) bring it forward.
A chore that fails becomes an alert and has its next turn all the same; the alert is resolved by the first turn that
works. Nothing here knows what a chore does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Protocol

from orchestrator.chores import Chore
from workers.contract.errors import StillframeError, describe

log = logging.getLogger(__name__)

NEWS_SHARE = 10
"""News bring a chore's turn forward to a tenth of its time: a hundred jobs that end are not a hundred rounds, and what
is done seldom, because it costs, is not done all the time when much happens."""


class Claim(Protocol):
    """See `leases.Lease`."""

    def claim(self) -> bool: ...

    def held(self) -> bool: ...


class Serving:
    """Does `chores` while `claim` is held. `trouble` is told of a chore that failed, and with None when it works
    again."""

    def __init__(
        self,
        chores: Callable[[], Sequence[Chore]],
        claim: Claim,
        trouble: Callable[[str, Exception | None], None],
        *,
        renew: float = 10.0,
    ) -> None:
        self._chores = chores
        self._claim = claim
        self._trouble = trouble
        self._renew = renew
        self._ended: dict[str, float] = {}
        """When each chore's last turn ended."""
        self._news_at: dict[str, float] = {}
        """Chores whose turn news have brought forward, and to when."""
        self._well: set[str] = set()
        """Chores that worked the last time, and whose alert is resolved."""
        self._bell = threading.Condition()
        self._news = False
        self._stopping = False
        self._renewed = float("-inf")

    def news(self) -> None:
        """Bring every chore forward."""
        with self._bell:
            self._news = True
            self._bell.notify_all()

    def stop(self) -> None:
        """End `run` after the chore that is under way."""
        with self._bell:
            self._stopping = True
            self._bell.notify_all()

    def run(self) -> None:
        """Until `stop`."""
        while not self._stopping:
            leads = self._lead()
            if leads:
                self._round()
            else:
                self._news = False  # somebody else's
            self._wait(self._next() if leads else self._renewed + min(self._renew / 2, 5.0))

    def _lead(self) -> bool:
        """Claim again in good time; a catalog that is away takes the lead, when its time is over."""
        if not self._claim.held() or time.monotonic() >= self._renewed + self._renew:
            self._renewed = time.monotonic()
            try:
                self._claim.claim()
            except Exception as error:  # noqa: BLE001 - whatever keeps us from the catalog, it is tried again
                log.warning("the lease of the leader cannot be had: %s", error)
        return self._claim.held()

    def _round(self) -> None:
        chores = self._chores()
        self._take_news(chores)
        for chore in chores:
            if self._stopping or not self._lead():
                return
            if time.monotonic() >= self._due(chore):
                self._news_at.pop(chore.name, None)
                self._do(chore)
                self._ended[chore.name] = time.monotonic()

    def _take_news(self, chores: Sequence[Chore]) -> None:
        with self._bell:
            news, self._news = self._news, False
        if news:
            for chore in chores:
                early = self._ended.get(chore.name, float("-inf")) + chore.seconds / NEWS_SHARE
                self._news_at.setdefault(chore.name, early)

    def _due(self, chore: Chore) -> float:
        usual = self._ended.get(chore.name, float("-inf")) + chore.seconds
        return min(usual, self._news_at.get(chore.name, usual))

    def _do(self, chore: Chore) -> None:
        error: Exception | None = None
        try:
            chore.act(datetime.now(UTC))
        except Exception as caught:
            error = caught
            if not isinstance(caught, StillframeError):
                log.exception("chore %s", chore.name)
        if error is None and chore.name in self._well:
            return
        self._well.discard(chore.name)
        if error is not None:
            log.warning("chore %s: %s", chore.name, describe(error).message)
        try:
            self._trouble(chore.name, error)
        except Exception as caught:  # noqa: BLE001 - the catalog that would hold the alert is away
            log.warning("nobody could be told of chore %s: %s", chore.name, caught)
        else:
            if error is None:
                self._well.add(chore.name)

    def _next(self) -> float:
        """When the next chore, or the lease, is due."""
        return min([self._renewed + self._renew, *map(self._due, self._chores())])

    def _wait(self, until: float) -> None:
        with self._bell:
            self._bell.wait_for(lambda: self._stopping or self._news, max(0.0, until - time.monotonic()))
