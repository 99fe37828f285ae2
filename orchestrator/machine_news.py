"""What hypervisors' answers mean for the catalog and for people: stored, judged by `discovery`, and told as alerts.

In one transaction for each answer, alone among controllers: which of them hears it does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

from sqlmodel import Session

from orchestrator.catalog import machines as cache
from orchestrator.catalog.alerts import Severity, raise_alert, resolve_alert
from orchestrator.catalog.points import points_of
from orchestrator.catalog.store import Catalog
from orchestrator.config import Config
from orchestrator.discovery import Change, Known, News, decide
from workers.contract.messages import MachinesListed


class MachineNews:
    """`config` is asked anew each time. Thread-safe."""

    def __init__(self, config: Callable[[], Config], catalog: Catalog) -> None:
        self._config = config
        self._catalog = catalog

    @property
    def _configured(self) -> list[str]:
        return list(self._config().worker.hypervisors)

    def round(self, now: datetime) -> list[str]:
        """Conclude the last round of questions, and begin another: who is to be asked now."""
        names = self._configured
        with self._catalog.write() as session:
            cache.alone(session)
            overdue = cache.unanswered(session, names, now)
            for name in overdue:
                self._note_silence(session, name, f"no answer within {cache.AWAIT.seconds} s", "")
            self._conclude(session, overdue, now)
            for row in cache.doubtful(session):  # since the last round at least: no migration between two answers
                hint = f"stop one of them; until then name the one that is meant: {row.hypervisor}/{row.name}"
                raise_alert(session, _twice(row.uuid), Severity.CRITICAL, row.name, row.doubt, hint)
            cache.ask(session, names, now)
        return names

    def heard(self, listings: Sequence[MachinesListed], now: datetime | None = None) -> list[Change]:
        """Keep answers, and decide what has become of the machines that they concern."""
        now = now or datetime.now(UTC)
        with self._catalog.write() as session:
            cache.alone(session)
            for listing in listings:
                if listing.error is None:
                    cache.note_listing(session, listing)
                    resolve_alert(session, _silence(listing.hypervisor))
                else:
                    self._note_silence(session, listing.hypervisor, listing.error.message, listing.error.hint)
            return self._conclude(session, [listing.hypervisor for listing in listings], now)

    def _note_silence(self, session: Session, name: str, why: str, hint: str) -> None:
        cache.note_silence(session, name, why)
        raise_alert(session, _silence(name), Severity.WARNING, name, f"it does not list its machines: {why}", hint)

    def _conclude(self, session: Session, names: Iterable[str], now: datetime) -> list[Change]:
        configured = self._configured
        cache.forget_others(session, configured)
        only = cache.concerned(session, list(names)) | cache.homeless(session, configured)
        answers = cache.answers(session, configured, now, only)
        changes = decide(cache.known(session, only), answers, now, only=only)
        for change in changes:
            cache.apply(session, change, now)
            self._tell(session, change)
        session.flush()
        return changes

    def _tell(self, session: Session, change: Change) -> None:
        machine, news = change.machine, dict(change.news)
        if News.GONE in news and self._cared_for(session, machine):
            text = f"{news[News.GONE]}; its points stay"
            hint = f"stillframe point list {machine.name}"
            raise_alert(session, _absence(machine.uuid), Severity.WARNING, machine.name, text, hint)
        if News.BACK in news:
            resolve_alert(session, _absence(machine.uuid))
        if News.CLEAR in news or News.GONE in news:
            resolve_alert(session, _twice(machine.uuid))

    def _cared_for(self, session: Session, machine: Known) -> bool:
        """Somebody protects it, or it has points: what was made for an afternoon may go without a word."""
        protected = self._config().protected_by(machine.hypervisor, machine.name, machine.tags) is not None
        return protected or bool(points_of(session, {machine.uuid}))


def _absence(uuid: str) -> str:
    return f"machine-gone machine:{uuid}"


def _silence(hypervisor: str) -> str:
    return f"hypervisor-silent hypervisor:{hypervisor}"


def _twice(uuid: str) -> str:
    return f"machine-twice machine:{uuid}"
