"""Give back the space of what no point needs, beside any number of writers and other sweeps, on any host.

The protocol, and why it is safe, is FORMAT.md's "Condemned packs, and the sweep"; the numbers in the comments here are
the steps there. Every step may be the last one before a kill: what is condemned stays condemned until a later sweep
gives its verdict or carries it out. No clock is part of the argument.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from datetime import datetime, timedelta

from workers.contract.errors import Corrupt, Locked, NewerFormat, ObjectMissing, WrongClock
from workers.contract.machines import Value
from workers.vault.compact import DEAD_SHARE, Compactor
from workers.vault.condemned import (
    MOST_PACKS,
    VERDICTS,
    condemn,
    give_verdict,
    read_condemnations,
    read_verdict,
    verdict_name,
)
from workers.vault.index import Packs, write_segments
from workers.vault.locks import extend, read_lock
from workers.vault.mark import Marks, Use, mark, uses
from workers.vault.packs import MOST_ENTRIES, TARGET, pack_name, read_footer
from workers.vault.sessions import SessionInfo
from workers.vault.trash import Removal, finalise, finals, remove_finals, standing
from workers.vault.vault import Vault

FENCE_AFTER = timedelta(days=7)
"""Age of a session that is taken for dead. Too early a fence costs a backup, never a point."""


class Progress(Value):
    stage: str
    done: int
    total: int


class Waiting(Value):
    """Condemned packs whose removal has to wait."""

    packs: int
    bytes: int
    sessions: list[SessionInfo]
    """That began before the packs were condemned."""


class SweepReport(Value):
    """What a sweep did, or with `dry_run` would do; bytes are of the store."""

    dry_run: bool
    packs: int = 0
    bytes: int = 0
    """All packs of the vault, before."""
    live_bytes: int = 0
    clock: str = ""
    """Why this host's clock is not believed: then no deletion becomes final, and no session is fenced."""
    final: list[str] = []
    """Points whose deletion became final, or would."""
    gone: list[Removal] = []
    """Points whose deletion is final: removed now, or what they wait for."""
    fenced: list[str] = []
    """Sessions taken for dead."""
    compacted: int = 0
    copied_bytes: int = 0
    condemned: int = 0
    condemned_bytes: int = 0
    removed: int = 0
    removed_bytes: int = 0
    rescued: int = 0
    """Condemned packs that turned out to be needed."""
    retained: int = 0
    """Dead packs that a lock keeps for now."""
    retention: datetime | None = None
    """Until when the packs of locked points cannot be deleted now (`locks.py`); None: nothing is locked."""
    skipped: int = 0
    """Packs that would be compacted but hold a damaged block."""
    waiting: list[Waiting] = []
    no_points: bool = False
    """There are packs and not a single point: nothing was condemned, since nobody has said that this is meant."""


class Settings(Value):
    compact: bool = True
    bandwidth: int | None = None
    """Bytes per second that compaction may copy."""
    fence_after: timedelta = FENCE_AFTER
    empty: bool = False
    """Also where no point is left at all: otherwise a vault whose `points/` was lost would be swept away."""
    dead_share: float = DEAD_SHARE
    pack_size: int = TARGET


OnProgress = Callable[[Progress], None]


def sweep(
    vault: Vault,
    *,
    now: datetime,
    settings: Settings | None = None,
    dry_run: bool = False,
    on_progress: OnProgress = lambda _: None,
) -> SweepReport:
    """Remove what can be removed, condemn what cannot be yet. `now` only decides which deletions become final, and
    which sessions are fenced. Raises VaultError if a point cannot be read: no pack is condemned or removed then."""
    run = _Sweep(vault, settings or Settings(), on_progress, dry_run=dry_run)
    run.bury(now)
    run.condemn()
    if not dry_run:
        run.finish_all()
        run.retain()
    return run.report()


class _Sweep:
    def __init__(self, vault: Vault, settings: Settings, tell: OnProgress, *, dry_run: bool) -> None:
        self._vault = vault
        self._settings = settings
        self._tell = tell
        self._marks = Marks()
        self._sizes: dict[bytes, int] = {}
        self._found: dict[str, object] = {"dry_run": dry_run}
        self._dry_run = dry_run
        self._waiting: list[Waiting] = []
        self._live_packs: set[bytes] = set()
        self._would_go: set[str] = set()
        """Of a dry run: points that a real one would remove first."""

    def report(self) -> SweepReport:
        return SweepReport.model_validate({**self._found, "waiting": self._waiting})

    def _count(self, key: str, value: int) -> None:
        found = self._found.get(key, 0)
        assert isinstance(found, int)
        self._found[key] = found + value

    # --- points and sessions -----------------------------------------------------------------------------------------

    def bury(self, now: datetime) -> None:
        """Make deletions final whose time is over, fence dead sessions, remove what nobody reads any more."""
        if self._dry_run:
            due = [one.point for one in standing(self._vault.store).values() if one.until <= now]
            self._found["final"] = due
            self._would_go = {*due, *finals(self._vault.store)}
            return
        try:
            self._found["final"] = [one.point for one in finalise(self._vault, now)]
        except WrongClock as error:
            self._found["clock"] = str(error)
        else:
            self._fence(now)
        self._found["gone"] = remove_finals(self._vault)

    def _fence(self, now: datetime) -> None:
        """End sessions that are too old to be alive. One that can still commit is fenced first: it never will."""
        fenced = []
        for session in self._vault.sessions():
            if now - session.started > self._settings.fence_after:
                if session.point:
                    self._vault.settle(session.point)
                self._vault.withdraw(session.session)
                fenced.append(session.session)
        self._found["fenced"] = fenced

    # --- looking -----------------------------------------------------------------------------------------------------

    def _look(self, condemned: set[bytes]) -> dict[bytes, Use]:
        """Steps 2 and 3: packs, index and points, in this order; what of each pack is needed, with copies in
        `condemned`, which was listed before, counting for nothing."""
        vault = self._vault
        self._sizes = {
            bytes.fromhex(info.name.removeprefix("packs/")): info.size for info in vault.store.list("packs/")
        }
        vault.index.refresh()
        self._index_the_unindexed(condemned)
        tell = self._tell
        mark(
            vault,
            self._marks,
            lambda done, total: tell(Progress(stage="points", done=done, total=total)),
            without=self._would_go,
        )
        before = vault.index.numbered()
        fit = {number for number, digest in before.items() if digest in self._sizes and digest not in condemned}
        found = uses(vault.index, self._marks, fit)
        # Of a pack that left the cache meanwhile perhaps not all blocks were seen; numbers are never used again.
        after = vault.index.numbered()
        return {after[number]: use for number, use in found.items() if number in before and number in after}

    def _index_the_unindexed(self, condemned: set[bytes]) -> None:
        """A condemned pack that no segment names is judged by its footer: its writer died before its segment, or the
        segment is damaged. One whose footer cannot be read stays out, and is kept."""
        vault = self._vault
        unknown = (condemned & self._sizes.keys()) - set(vault.index.numbered().values())
        packs: Packs = {}
        for digest in sorted(unknown):
            try:
                packs[digest] = read_footer(vault.store, pack_name(digest), self._sizes[digest], vault.keys)
            except (Corrupt, ObjectMissing, NewerFormat):
                continue
        if not self._dry_run:
            for name, part in write_segments(vault.store, vault.keys, packs):
                vault.index.add(name, part)

    # --- the first phase ---------------------------------------------------------------------------------------------

    def condemn(self) -> None:
        """Compact what is mostly dead, and condemn what is not needed. Whatever is chosen here is judged again."""
        earlier = set().union(*read_condemnations(self._vault.store, self._vault.keys).values())
        found = self._look(earlier)
        self._found |= {"packs": len(self._sizes), "bytes": sum(self._sizes.values())}
        if self._pointless():
            return
        self._found["live_bytes"] = sum(use.needed for use in found.values())
        needless = {digest for digest, use in found.items() if not use.needed and not use.only}
        if not self._dry_run:
            self._forget_removed(needless - self._sizes.keys())
        dead = (needless & self._sizes.keys()) - earlier
        if not any(self._vault.sessions()):
            # Beside a writer these are most likely its own, about to be indexed.
            dead |= self._sizes.keys() - found.keys() - earlier
        sparse = self._sparse(found, earlier)
        if self._dry_run:
            self._found |= {"compacted": len(sparse), "copied_bytes": sum(found[digest].needed for digest in sparse)}
        else:
            sparse = self._compacted(sparse)
        chosen = dead | set(sparse)
        if not self._dry_run:
            ordered = sorted(chosen)
            for at in range(0, len(ordered), MOST_PACKS):
                condemn(self._vault.store, self._vault.keys, ordered[at : at + MOST_PACKS])
        self._live_packs = {one for one, use in found.items() if use.needed or use.only} & self._sizes.keys() - chosen
        self._found |= {"condemned": len(chosen), "condemned_bytes": sum(map(self._sizes.__getitem__, chosen))}

    def _pointless(self) -> bool:
        """Whether there is nothing to judge packs by, and nobody has said that this is meant."""
        if not self._sizes or self._marks.manifests or self._settings.empty:
            return False
        self._found["no_points"] = True
        return True

    def _forget_removed(self, absent: Set[bytes]) -> None:
        """Two sweeps that write segments at once may leave names of packs that they removed. A pack that was not there
        when packs were listed may be a new one; if it is not there now either, after a segment named it, it is gone."""
        store = self._vault.store
        self._leave_index({digest for digest in absent if next(store.list(pack_name(digest)), None) is None})

    def _sparse(self, found: dict[bytes, Use], earlier: set[bytes]) -> list[bytes]:
        """Packs worth to be copied: enough of them is dead, or they are small and together fill a pack. None in a vault
        with a lock: what is needed is retained again and again, so a copy would take its place without giving any."""
        if not self._settings.compact or read_lock(self._vault.store, self._vault.id).days:
            return []
        usable = self._sizes.keys() - earlier
        living = {one: use for one, use in found.items() if use.needed and not use.only and one in usable}
        share = self._settings.dead_share
        damaged = {copy.pack for copy in self._vault.index.damage()}
        hollow = [
            digest
            for digest, use in living.items()
            if use.needed < (1 - share) * use.stored or digest in damaged  # what is damaged was healed elsewhere
        ]
        small = [
            digest
            for digest, use in living.items()
            if digest not in hollow
            and self._sizes[digest] < share * self._settings.pack_size
            and living[digest].blocks < share * MOST_ENTRIES  # full of blocks, small as they are
        ]
        if sum(living[digest].needed for digest in small) < self._settings.pack_size:
            small = []
        return sorted([*hollow, *small])

    def _compacted(self, sparse: list[bytes]) -> list[bytes]:
        settings = self._settings
        compactor = Compactor(self._vault, self._marks, bandwidth=settings.bandwidth, pack_size=settings.pack_size)
        total = len(sparse)
        done = compactor.run(sparse, lambda n: self._tell(Progress(stage="compact", done=n, total=total)))
        self._found |= {"compacted": len(done.packs), "copied_bytes": done.copied_bytes, "skipped": done.skipped}
        return done.packs

    def retain(self) -> None:
        """Renew the retention of what locked points need."""
        self._found["retention"] = extend(self._vault, self._live_packs).until

    # --- the second phase --------------------------------------------------------------------------------------------

    def finish_all(self) -> None:
        """Give and carry out the verdict on every condemnation that waits for nobody."""
        store = self._vault.store
        verdicts = [info.name for info in store.list(VERDICTS)]
        standing = read_condemnations(store, self._vault.keys)
        for orphan in set(verdicts) - set(map(verdict_name, standing)):
            store.delete(orphan)  # its condemnation is gone, and never comes again
        for name, packs in standing.items():
            dead = read_verdict(store, self._vault.keys, name)
            if dead is None:
                dead = self._judged(name, packs)
            if dead is not None:
                self._count("rescued", len(packs - dead))
                self._carry_out(name, dead)

    def _judged(self, name: str, packs: frozenset[bytes]) -> frozenset[bytes] | None:
        """None: it has to wait, or somebody else has settled it meanwhile."""
        vault = self._vault
        if blocking := [one for one in vault.sessions() if name not in (one.knows or ())]:  # step 1
            size = sum(self._sizes.get(digest, 0) for digest in packs)
            self._waiting.append(Waiting(packs=len(packs), bytes=size, sessions=blocking))
            return None
        condemned = set().union(*read_condemnations(vault.store, vault.keys).values()) | packs
        found = self._look(condemned)
        if self._pointless():
            return None
        dead = frozenset(
            digest for digest in packs if digest not in self._sizes or (digest in found and not found[digest].only)
        )
        if not give_verdict(vault.store, vault.keys, name, dead):  # step 4
            return read_verdict(vault.store, vault.keys, name)
        if any(info.name == name for info in vault.store.list(name)):
            return dead
        vault.store.delete(verdict_name(name))
        return None

    def _carry_out(self, name: str, dead: frozenset[bytes]) -> None:
        """Step 5: index first, packs last."""
        vault = self._vault
        self._leave_index(dead)
        kept: set[bytes] = set()
        for done, digest in enumerate(sorted(dead)):
            self._tell(Progress(stage="remove", done=done, total=len(dead)))
            try:
                vault.store.delete(pack_name(digest))
            except Locked:
                kept.add(digest)
                self._count("retained", 1)
            else:
                self._count("removed", digest in self._sizes)
                self._count("removed_bytes", self._sizes.pop(digest, 0))
        if records := vault.index.damage_objects():
            vault.index.settle_damage(dead - kept, records)
        if not kept:
            vault.store.delete(name)
            vault.store.delete(verdict_name(name))

    def _leave_index(self, dead: Set[bytes]) -> None:
        """Segments without the dead packs, then the old ones go: at any moment every other pack is named."""
        if not dead:
            return
        vault = self._vault
        vault.index.refresh()
        old = vault.index.segments_of(dead)
        kept: Packs = {}
        for packs in old.values():
            for digest in set(packs) - dead - kept.keys():
                kept[digest] = vault.index.entries(pack_name(digest))
        for name, part in write_segments(vault.store, vault.keys, kept):
            vault.index.add(name, part)
        for segment in sorted(old):
            vault.store.delete(segment)
        if old:
            vault.index.refresh()
