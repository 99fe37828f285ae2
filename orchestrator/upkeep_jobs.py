"""When vaults are looked after: by `[upkeep]`, or by hand.

A moment is handled once, whoever was down meanwhile and however many controllers there are: up to when all is decided
is in the catalog, moved by a guarded update in the transaction that adds the job. What was missed is done once.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from datetime import datetime, timedelta

from sqlalchemy import update
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from orchestrator.catalog import owner
from orchestrator.catalog.health import upkeep_lock
from orchestrator.catalog.jobs import UPKEEP, Ticket, add_job, owner_of
from orchestrator.catalog.schema import DutyRow, JobRow
from orchestrator.catalog.store import Catalog
from orchestrator.chores import Chore
from orchestrator.config import Config
from orchestrator.config_file import Policy
from orchestrator.controller import Controller
from orchestrator.jobs.upkeep import UPKEEP_KINDS, UpkeepJob, UpkeepKind
from orchestrator.lock_desk import LockDesk
from orchestrator.schedules import moments
from orchestrator.upkeep_runner import Perform, UpkeepRunner
from workers.contract.errors import Busy, StillframeError, UsageError
from workers.contract.machines import Value
from workers.contract.messages import SILENT_SECONDS, WorkerLost

SECONDS = 30.0
LOOKBACK = timedelta(days=100)
"""What was due longer ago is not counted: one turn makes up for all."""
AHEAD = timedelta(days=400)


class UpkeepView(Value):
    """A kind of upkeep of a vault."""

    vault: str
    what: UpkeepKind
    schedule: str
    next: datetime | None
    """None: by hand only."""
    outcome: str
    """What was decided at its last turn."""


class UpkeepJobs:
    """`config`: the one in force; `controller`: one that may move jobs of this process."""

    def __init__(
        self,
        config: Callable[[], Config],
        catalog: Catalog,
        locks: LockDesk,
        controller: Callable[[], Controller],
        perform: Perform,
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._locks = locks
        self._controller = controller
        self._runner = UpkeepRunner(catalog, controller, perform)

    def close(self) -> None:
        self._runner.close()

    def chores(self) -> list[Chore]:
        return [Chore("upkeep", SECONDS, self.turn)]

    # --- by hand ---------------------------------------------------------------------------------------------------

    def start(self, what: str, vault: str | None) -> str:
        """Begin one in this process; its job's id. Raises NotFound, UsageError, Busy."""
        kind = next((one for one in UPKEEP_KINDS if one == what), None)
        if kind is None:
            raise UsageError(f"no upkeep is named {what!r}", hint=f"there are: {', '.join(UPKEEP_KINDS)}")
        name = self._config().vault_name(vault)
        self._require_sense(kind, name)
        with self._catalog.write() as session:
            job = self._add(session, kind, name, Ticket(UPKEEP))
        self._runner.submit(job)
        return job

    def _require_sense(self, kind: UpkeepKind, name: str) -> None:
        original = self._config().worker.vaults[name].replica_of
        if kind != "verify" and original is not None:
            raise UsageError(f"vault {name} is a replica of {original}: it only follows", hint=f"use vault {original}")
        if kind == "replicate" and not self._replicas(name):
            hint = f'add a [vaults.NAME] section with replica_of = "{name}"'
            raise UsageError(f"vault {name} has no replica", hint=hint)

    def _replicas(self, name: str) -> list[str]:
        return [one for one, vault in self._config().worker.vaults.items() if vault.replica_of == name]

    def _add(self, session: Session, kind: UpkeepKind, vault: str, ticket: Ticket) -> str:
        job = UpkeepJob(id=secrets.token_hex(6), what=kind, vault=vault)
        named = ("", f"{kind} of vault {vault}")
        add_job(session, job, owner.this_process(), machine=named, lock=upkeep_lock(kind, vault), ticket=ticket)
        return job.id

    # --- by schedule -----------------------------------------------------------------------------------------------

    def turn(self, now: datetime) -> None:
        """Begin what is due, and give up what a process began that is gone."""
        self._settle(now)
        for vault, kind, policy in self._wanted():
            job = self._decide(vault, kind, policy, now)
            if job:
                self._runner.submit(job)

    def _wanted(self) -> list[tuple[str, UpkeepKind, Policy]]:
        section = self._config().upkeep
        found: list[tuple[str, UpkeepKind, Policy]] = []
        for name in self._config().worker.vaults:
            for kind in UPKEEP_KINDS:
                words: str = getattr(section, kind)
                if words != "never" and self._makes_sense(kind, name):
                    found.append((name, kind, Policy(schedule=words, timezone=section.timezone)))
        return found

    def _makes_sense(self, kind: UpkeepKind, name: str) -> bool:
        try:
            self._require_sense(kind, name)
        except UsageError:
            return False
        return True

    def _decide(self, vault: str, kind: UpkeepKind, policy: Policy, now: datetime) -> str:
        """The job that was added; empty: nothing is due, or it was left out, or somebody else decided."""
        subject = f"vault:{vault}"
        with self._catalog.read() as session:
            duty = session.get(DutyRow, (subject, kind))
        if duty is None:
            self._first(subject, kind, now)
            return ""
        begin, tick = max(duty.handled, now - LOOKBACK), timedelta(microseconds=1)
        due = list(moments(policy, begin + tick, now + tick))
        if not due:
            return ""
        unlocked = kind == "lock" and self._unlocked(vault)
        with self._catalog.write() as session:
            mine = (col(DutyRow.subject) == subject, col(DutyRow.section) == kind, col(DutyRow.handled) == duty.handled)
            job, outcome = "", "left out: the vault has no lock"
            if not session.connection().execute(update(DutyRow).where(*mine).values(handled=now)).rowcount:
                return ""
            if not unlocked:
                job, outcome = self._due(session, kind, vault, due[-1])
            same = (col(DutyRow.subject) == subject, col(DutyRow.section) == kind)
            session.connection().execute(update(DutyRow).where(*same).values(outcome=outcome))
        return job

    def _first(self, subject: str, kind: str, now: datetime) -> None:
        try:
            with self._catalog.write() as session:
                session.add(DutyRow(subject=subject, section=kind, handled=now, outcome="first seen"))
        except IntegrityError:  # another controller was first
            return

    def _due(self, session: Session, kind: UpkeepKind, vault: str, moment: datetime) -> tuple[str, str]:
        try:
            job = self._add(session, kind, vault, Ticket(UPKEEP, section=kind, due=moment))
        except Busy as error:
            return "", f"left out: {error}"
        return job, f"job {job}"

    def _unlocked(self, vault: str) -> bool:
        """Certainly without a lock; where that cannot be seen, the job says why."""
        try:
            return self._locks.show(vault).days == 0
        except StillframeError:
            return False

    def _settle(self, now: datetime) -> None:
        """Jobs of processes that are gone, or were not heard of for a minute."""
        mine = owner.this_process()
        with self._catalog.read() as session:
            rows = session.exec(select(JobRow).where(JobRow.kind == "upkeep", col(JobRow.active))).all()
        for row in rows:
            heard = row.heard or row.updated
            silent = row.state != "queued" and now - heard > timedelta(seconds=SILENT_SECONDS)
            if owner_of(row) != mine and (silent or owner.is_dead(owner_of(row))):
                detail = f"process {row.owner_pid} on {row.owner_host} is gone"
                self._controller().advance(row.id, WorkerLost(detail=detail))

    def views(self, now: datetime) -> list[UpkeepView]:
        """All kinds of all vaults."""
        with self._catalog.read() as session:
            duties = {(row.subject, row.section): row for row in session.exec(select(DutyRow)).all()}
        section = self._config().upkeep
        wanted = {(vault, kind): policy for vault, kind, policy in self._wanted()}
        found = []
        for name in self._config().worker.vaults:
            for kind in UPKEEP_KINDS:
                if not self._makes_sense(kind, name):
                    continue
                policy, duty = wanted.get((name, kind)), duties.get((f"vault:{name}", kind))
                upcoming = next(iter(moments(policy, now, now + AHEAD)), None) if policy else None
                words: str = getattr(section, kind)
                found.append(
                    UpkeepView(
                        vault=name, what=kind, schedule=words, next=upcoming, outcome=duty.outcome if duty else ""
                    )
                )
        return found
