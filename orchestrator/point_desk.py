"""What people do with points: look at them, delete them and take that back, pin them, and have policies expire them.

The vault decides, the catalog remembers: every act goes to the vault first, and what the catalog says of deletions and
pins can be read back from there (`Trash.note`). A point keeps its row until its manifest is really removed: until then
it may be the base of the next backup, which goes on from it while it is only deleted, and finds out by itself when it
is not (invariants 1 and 2: its checkpoint goes when nothing can refer to it any more, or with its successor).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from sqlmodel import Session

from orchestrator import find
from orchestrator.actor import whoami
from orchestrator.catalog.jobs import jobs_using
from orchestrator.catalog.points import (
    document,
    listed_points,
    machines_named,
    mark_deleted,
    mark_pinned,
    newest_base,
    points_of,
    remove_point,
    seen_machines,
)
from orchestrator.catalog.schema import PointRow
from orchestrator.catalog.store import Catalog
from orchestrator.config import Config
from orchestrator.desk import Desk
from orchestrator.plan import SHORT, base_checkpoint
from orchestrator.primary import require_primary
from orchestrator.views import ExpiryView, PointView, point_view
from workers.context import Context
from workers.contract.errors import Busy, Locked, NotFound, StillframeError
from workers.contract.machines import MachineSummary
from workers.contract.points import Point

if TYPE_CHECKING:
    from workers.vault import Vault
    from workers.vault.trash import Deletion, Removal


class PointDesk(Desk):
    """`find_machine`: the machine that people mean by a name. Raises VaultMissing, WrongKey, NewerFormat, Corrupt
    wherever a vault is opened, NotFound and UsageError wherever a point is named."""

    def __init__(
        self, config: Config, catalog: Catalog, context: Context, find_machine: Callable[[str], MachineSummary]
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._context = context
        self._find_machine = find_machine

    # --- looking ---------------------------------------------------------------------------------------------------

    def points(
        self, machine: str | None = None, *, live: bool = True, deleted: bool = False, limit: int | None = None
    ) -> list[PointView]:
        """Newest last: those that are not deleted, those that are, or both; all, or the newest `limit`. Raises NotFound
        for a machine that neither the catalog nor a hypervisor knows."""
        with self._catalog.read() as session:
            known = None if machine is None else machines_named(session, machine)
            rows = listed_points(session, known, live=live, deleted=deleted, limit=limit)
        if machine is not None and not known:
            self._find_machine(machine)
        return [point_view(row) for row in rows]

    def point(self, ref: str) -> PointView:
        """By id or unique beginning of one, `VM@latest`, or `VM@2026-11-22T02:00` (the newest until then)."""
        return point_view(self._row(ref))

    def _row(self, ref: str) -> PointRow:
        with self._catalog.read() as session:
            return find.point_named(session, ref)

    def _written(self, ref: str) -> PointRow:
        """One that is to be changed. Raises UsageError if it lies in a replica."""
        row = self._row(ref)
        require_primary(self._config, row.vault)
        return row

    # --- deleting, and taking it back ------------------------------------------------------------------------------

    def delete(self, ref: str, *, days: int | None = None, reason: str = "", dry_run: bool = False) -> PointView:
        """Delete a point so that it can be taken back for `days`, or as long as its vault says; with 0 it goes at once.
        No other point depends on it. Raises Locked if it is pinned, or locked and to go at once, WrongClock, and Busy
        while a job reads what is to go at once."""
        from workers.vault import trash

        row = self._written(ref)
        vault = self._context.vault(row.vault)
        now = datetime.now(UTC)
        until = now + timedelta(days=self._config.worker.vaults[row.vault].soft_delete_days if days is None else days)
        if until <= now:
            self._refuse_read(row)
        if dry_run:
            trash.check_deletable(vault, row.id, now=now, until=until)
            return point_view(row)
        deletion = trash.delete(vault, row.id, now=now, until=until, by=whoami(), reason=reason)
        if days is not None and deletion.until > until:  # it was deleted before, to go later: now it is to go sooner
            trash.undelete(vault, row.id, now=now, by=whoami())
            deletion = trash.delete(vault, row.id, now=now, until=until, by=whoami(), reason=reason or deletion.reason)
        with self._catalog.write() as session:
            mark_deleted(session, row.id, deletion.until, deletion.reason)
        notes: list[str] = []
        if until <= now:
            removals, notes = self.finish_deletions(row.vault, points=[row.id])
            notes += [f"its manifest stays for now: {removal.waits}" for removal in removals if removal.waits]
        changed = row.model_copy(update={"deleted_until": deletion.until, "deleted_reason": deletion.reason})
        return point_view(changed, note="; ".join(notes))

    def _refuse_read(self, row: PointRow) -> None:
        with self._catalog.read() as session:
            for user in jobs_using(session, row.id):
                raise Busy(
                    f"{user.kind} {user.id} of {user.machine_name} reads point {row.id[:SHORT]}",
                    hint=f"stillframe job watch {user.id}",
                )

    def undelete(self, ref: str) -> PointView:
        """Take a deletion back; the note says if there was none. Raises NotFound if the point is gone for good."""
        from workers.vault import trash

        row = self._written(ref)
        was_deleted = trash.undelete(self._context.vault(row.vault), row.id, now=datetime.now(UTC), by=whoami())
        with self._catalog.write() as session:
            mark_deleted(session, row.id, None)
        return self.point(row.id).model_copy(update={"note": "" if was_deleted else "it was not deleted"})

    def pin(self, ref: str, reason: str = "") -> PointView:
        """Keep a point from being deleted, by people and by policies; a deletion that stands is taken back."""
        from workers.vault import trash

        row = self._written(ref)
        vault = self._context.vault(row.vault)
        trash.pin(vault, row.id, now=datetime.now(UTC), by=whoami(), reason=reason)
        with self._catalog.write() as session:
            mark_deleted(session, row.id, None)
            mark_pinned(session, row.id, trash.pin_of(vault.store, row.id))
        return self.point(row.id)

    def unpin(self, ref: str) -> PointView:
        """From now on policies and people may delete it; the note says if it was not pinned."""
        from workers.vault import trash

        row = self._written(ref)
        was_pinned = trash.unpin(self._context.vault(row.vault).store, row.id)
        with self._catalog.write() as session:
            mark_pinned(session, row.id, None)
        return self.point(row.id).model_copy(update={"note": "" if was_pinned else "it was not pinned"})

    # --- for good --------------------------------------------------------------------------------------------------

    def finish_deletions(
        self,
        vault_name: str,
        *,
        points: Collection[str] | None = None,
        trust_clock: bool = False,
    ) -> tuple[list[Removal], list[str]]:
        """Make deletions final whose time is over, and remove the manifests of final ones, of `points` or of all; what
        became of each, and what follows for machines. Raises WrongClock, and then nothing became final."""
        from workers.vault import trash

        vault = self._context.vault(vault_name)
        trash.finalise(vault, datetime.now(UTC), points=points, trust_clock=trust_clock)
        removals = trash.remove_finals(vault, points=points)
        return removals, self.forget(removals)

    def forget(self, removals: Sequence[Removal]) -> list[str]:
        """Take points out of the catalog whose manifests have been removed; what follows for machines."""
        return [note for removal in removals if not removal.waits and (note := self._forget(removal.point))]

    def _forget(self, point_id: str) -> str:
        """Remove the row of a point whose manifest is gone, and the checkpoint that nobody needs then; a note."""
        with self._catalog.write() as session:
            row = session.get(PointRow, point_id)
            if row is None:
                return ""
            base = newest_base(session, row.machine_uuid, row.vault)
            remove_point(session, row.id)
            if base is None or base.id != row.id:
                return ""
            older = newest_base(session, row.machine_uuid, row.vault)
            if base_checkpoint(older) == base_checkpoint(base):
                return ""
        return f"the next backup of {row.machine_name} will be full: it was the base{self._drop_checkpoint(base)}"

    def _drop_checkpoint(self, base: Point) -> str:
        """Delete a checkpoint that no point refers to any more; what to add to the note if that was not possible."""
        name = base_checkpoint(base)
        with self._catalog.read() as session:
            home = machines_named(session, base.machine.uuid).get(base.machine.uuid, base.machine.hypervisor)
        try:
            if name is not None:
                self._context.hypervisor(home).delete_checkpoint(base.machine.uuid, name)
        except NotFound:
            pass  # the machine is gone, and its checkpoints with it
        except StillframeError as error:
            return f"; its checkpoint {name} stays on {home} ({error})"
        return ""

    # --- policies --------------------------------------------------------------------------------------------------

    def expire(self, vault_name: str | None = None, *, dry_run: bool = False) -> list[ExpiryView]:
        """Delete, softly, what no rule of a policy keeps, in one vault or in all that are no replicas; the decision on
        every point that is not deleted yet, with its reasons. A machine that no `[protect.*]` section covers loses
        nothing. Raises WrongClock."""
        vaults = self._config.worker.vaults
        names = [self._config.vault_name(vault_name)] if vault_name else list(vaults)
        views = []
        for name in names:
            if vaults[name].replica_of is None:  # deletions come to a replica from its original
                views += [self._expired(view, dry_run=dry_run) for view in self._decisions(name, dry_run=dry_run)]
        return views

    def _decisions(self, vault_name: str, *, dry_run: bool) -> list[ExpiryView]:
        with self._catalog.read() as session:
            rows = points_of(session, vault=vault_name)
            seen = {row.uuid: row for row in seen_machines(session)}
        vault = self._context.vault(vault_name)
        # After the rows: a row is older than its point's removal, and one whose manifest is gone keeps no period.
        there = {info.name.removeprefix("points/") for info in vault.store.list("points/")}
        trash = Trash.of(vault)
        if not dry_run:
            with self._catalog.write() as session:
                trash.note(session, vault_name)
        alive: dict[str, list[PointRow]] = {}
        for row in rows:
            if row.id in there and row.id not in trash.standing and row.id not in trash.final:
                alive.setdefault(row.machine_uuid, []).append(row)
        views = []
        for uuid, of_machine in alive.items():
            known, last = seen.get(uuid), document(of_machine[-1]).machine
            where, tags = known or last, known.tags.splitlines() if known else []
            views += self._decide(vault_name, (where.hypervisor, where.name, tags), of_machine, trash.pinned)
        return views

    def _decide(
        self, vault_name: str, machine: tuple[str, str, list[str]], rows: list[PointRow], pins: dict[str, str]
    ) -> list[ExpiryView]:
        from orchestrator.policies import Candidate, decide

        policies = self._config.policies_into(vault_name, *machine)
        candidates = [Candidate(row.id, row.time, pinned=pins.get(row.id), damaged=bool(row.damaged)) for row in rows]
        return [
            ExpiryView(
                point=decision.point.id,
                machine=machine[1],
                vault=vault_name,
                time=decision.point.time,
                policies=sorted(policies),
                keep=decision.keep,
                reasons=list(decision.reasons),
            )
            for decision in reversed(decide(candidates, policies))
        ]

    def _expired(self, view: ExpiryView, *, dry_run: bool) -> ExpiryView:
        if view.keep or dry_run:
            return view
        reason = f"policy {' and '.join(view.policies)}: {'; '.join(view.reasons)}"
        try:
            deleted = self.delete(view.point, reason=reason)
        except (Locked, Busy) as error:  # pinned since it was looked at; read, in a vault that keeps nothing deleted
            return view.model_copy(update={"keep": True, "reasons": [str(error)]})
        return view.model_copy(update={"deleted_until": deleted.deleted_until})


@dataclass(frozen=True, slots=True)
class Trash:
    """What a vault says of deletions and pins, by point."""

    standing: dict[str, Deletion]
    final: set[str]
    pinned: dict[str, str]

    @staticmethod
    def of(vault: Vault) -> Trash:
        from workers.vault import trash

        return Trash(trash.standing(vault.store), set(trash.finals(vault.store)), trash.pinned(vault.store))

    def note(self, session: Session, vault_name: str) -> None:
        """Bring what the catalog says of the vault's points in line with it."""
        for row in points_of(session, vault=vault_name):
            if (deletion := self.standing.get(row.id)) is not None:
                mark_deleted(session, row.id, deletion.until, deletion.reason)
            elif row.id in self.final:
                mark_deleted(session, row.id, row.deleted_until or row.time, row.deleted_reason or "gone for good")
            elif row.deleted_until is not None:
                mark_deleted(session, row.id, None)
            mark_pinned(session, row.id, self.pinned.get(row.id))
