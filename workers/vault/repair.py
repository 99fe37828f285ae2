"""Repair of a vault from its copies: mirrors of the same vault, and replicas.

Packs, segments, condemnations and records of damage are named by the SHA-256 of their bytes, so any copy with the right
hash will do, wherever it comes from. A manifest is sealed under its name, so one that opens is the right one.

Nothing is taken away: the right bytes, staged and checked, take the place of the wrong ones in one step, and are
retained as those were. A manifest that was away for a moment would be that of a deleted point, to a sweep that looks
then; and for ever, if the repair died in this moment.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from workers.contract.errors import Corrupt, NewerFormat, NoSpace, ObjectMissing, VaultError
from workers.contract.machines import Value
from workers.contract.seams import Store
from workers.vault import damage, trash
from workers.vault.checkup import damaged_objects
from workers.vault.copying import addressed, copy_object, listed
from workers.vault.damage import WHOLE
from workers.vault.digests import problem_of, problems
from workers.vault.findings import Finding, OnProgress, Progress, quiet
from workers.vault.index import PREFIX as INDEX
from workers.vault.index import Location
from workers.vault.locks import forget_covered
from workers.vault.packs import pack_name
from workers.vault.rebuild import name_packs, rebuild_index, unnamed_packs
from workers.vault.sessions import CONDEMNED
from workers.vault.vault import Vault
from workers.vault.verify import Level, verify

POINTS = "points/"
_MIRRORED = ("packs/", INDEX, CONDEMNED, damage.PREFIX, POINTS)


class Repaired(Value):
    """An object that was put in place, or would be."""

    object: str
    place: str
    """The store that has it now."""
    source: str
    """Where the bytes come from; empty: made again from the packs."""


class RepairReport(Value):
    dry_run: bool
    looked_at: int
    """Objects that are damaged or missing somewhere."""
    repaired: list[Repaired]
    failed: list[Finding] = []
    """What could have been repaired, and why it was not."""
    findings: list[Finding]
    """What is damaged still, with the points that need it."""


def repair(
    vault: Vault, replicas: Sequence[Store] = (), *, dry_run: bool = False, on_progress: OnProgress | None = None
) -> RepairReport:
    """Put good bytes in the place of what is known to be damaged or missing, from any store of the vault or of
    `replicas`. What is not known yet has to be found by a verify first. Raises VaultError if the vault cannot be
    read at all."""
    return _Repair(vault, replicas, dry_run).run(on_progress or quiet)


class _Repair:
    def __init__(self, vault: Vault, replicas: Sequence[Store], dry_run: bool) -> None:
        self._vault = vault
        self._dry_run = dry_run
        self._places = vault.store.copies() if len(vault.store.copies()) > 1 else [vault.store]
        self._sources = [*self._places, *replicas]
        self._here = vault.store.features.place
        self._done: list[Repaired] = []
        self._failed: list[Finding] = []

    def run(self, tell: OnProgress) -> RepairReport:
        wanted = self._wanted()
        with self._reading([name.removeprefix(POINTS) for name in wanted if name.startswith(POINTS)]):
            for done, name in enumerate(wanted):
                tell(Progress(stage="repair", done=done, total=len(wanted)))
                bad = [place for place in self._places if not self._good(place, name)]
                if bad and (not name.startswith(POINTS) or self._stays(name)):
                    self._mend(name, bad)
        tell(Progress(stage="repair", done=len(wanted), total=len(wanted)))
        if not self._dry_run:
            self._make_segments_again([name for name in wanted if name.startswith(INDEX)])
            self._strike_off()
            forget_covered(self._vault.cache_dir.parent, self._vault.id)
        self._name_packs()
        report = verify(self._vault, Level.IDS)
        return RepairReport(
            dry_run=self._dry_run,
            looked_at=len(wanted),
            repaired=self._done,
            failed=self._failed,
            findings=report.findings,
        )

    @contextmanager
    def _reading(self, points: list[str]) -> Iterator[None]:
        """While a session reads them, their manifests are not removed by those who delete points: one that was is not
        to come back from a replica, which has it longer."""
        session = f"repair-{secrets.token_hex(8)}"
        if not points or self._dry_run:
            yield
            return
        self._vault.announce(session, reads=points)
        try:
            yield
        finally:
            self._vault.withdraw(session)

    def _stays(self, manifest: str) -> bool:
        """Whether a point is not deleted: seen in this order, as `Vault.readable` does for one that can be read."""
        store = self._vault.store
        return not trash.final(store, manifest.removeprefix(POINTS)) and manifest in listed(store, manifest)

    # --- what is to be looked at -----------------------------------------------------------------------------------

    def _wanted(self) -> list[str]:
        """Names of what is damaged or missing in any place, as far as is known."""
        _, missing = self._vault.packs()
        names = {*missing, *(pack_name(copy.pack) for copy in self._vault.index.damage())}
        names |= {f"{POINTS}{id}" for id, _ in self._vault.damaged_points()}
        names |= {name for name, _ in damaged_objects(self._vault) if addressed(name)}
        for place in self._places:
            names |= {info.name for info, problem in problems(place, place.list(INDEX)) if problem}
        if len(self._places) > 1:
            named = set(self._vault.index.packs())
            for prefix in _MIRRORED:
                found = Counter(info.name for place in self._places for info in place.list(prefix))
                uneven = {name for name, places in found.items() if places < len(self._places)}
                names |= uneven & named if prefix == "packs/" else uneven
        return sorted(names)

    def _good(self, store: Store, name: str) -> bool:
        """Whether a store holds the object, and its bytes are the right ones."""
        info = listed(store, name).get(name)
        if info is None:
            return False
        return not problem_of(store, info) if addressed(name) else self._opens(name, store)

    def _opens(self, name: str, store: Store) -> bool:
        try:
            self._vault.decoded(name.removeprefix(POINTS), store.get(name))
        except (Corrupt, NewerFormat, ObjectMissing):
            return False
        return True

    # --- one object ------------------------------------------------------------------------------------------------

    def _mend(self, name: str, bad: list[Store]) -> None:
        for source in self._sources:
            if source in bad:
                continue
            with suppress(VaultError):  # this one cannot be reached, or is not better: the next
                if self._good(source, name):
                    for place in bad:
                        self._put(name, source, place)
                    return

    def _put(self, name: str, source: Store, place: Store) -> None:
        done = Repaired(object=name, place=place.features.place, source=source.features.place)
        try:
            if not self._dry_run:
                info = listed(source, name)[name]
                copy_object(source, place, info, replace=True)
                if not self._good(place, name):
                    raise Corrupt("it was put in place, and reads wrong again")
                if source in self._places and name not in listed(source, name):
                    place.delete(name)  # deleted meanwhile: it must not come back
                    return
        except (KeyError, ObjectMissing):
            return  # the same
        except (VaultError, NoSpace) as error:
            self._failed.append(Finding(object=name, problem=f"{done.place}: {error}"))
        else:
            self._done.append(done)

    # --- afterwards ------------------------------------------------------------------------------------------------

    def _make_segments_again(self, segments: list[str]) -> None:
        """Where no copy of a segment is left: from the packs, which say themselves what is in them."""
        there = listed(self._vault.store, INDEX)
        lost = [name for name in segments if name in there and not self._good(self._vault.store, name)]
        if lost:
            rebuild_index(self._vault)
            self._done += [Repaired(object=name, place=self._here, source="") for name in lost]

    def _name_packs(self) -> None:
        """Segments that are gone leave packs that nobody finds."""
        with suppress(Corrupt):  # of a condemnation: told below
            unnamed = unnamed_packs(self._vault)
            named = unnamed if self._dry_run else name_packs(self._vault, unnamed)
            self._done += [Repaired(object=f"index of {name}", place=self._here, source="") for name in named]

    def _strike_off(self) -> None:
        """Records of damage of packs that are whole in every place now."""
        records = self._vault.index.damage_objects()
        known = {copy.pack for copy in self._vault.index.damage()}
        whole = {pack for pack in known if all(self._good(place, pack_name(pack)) for place in self._places)}
        whole = {pack for pack in whole if self._reads(pack)}
        with suppress(VaultError, NoSpace):  # what cannot be written is done by the next verify
            self._vault.index.settle_damage(whole, records)

    def _reads(self, pack: bytes) -> bool:
        """Whether the damaged blocks of a pack that has the right bytes can be opened: what was sealed wrong, by a
        host with bad memory, no copy can repair."""
        reader, index = self._vault.reader(refresh=False), self._vault.index
        bad = {copy.block for copy in index.damage() if copy.pack == pack}
        try:
            for entry in index.entries(pack_name(pack)):
                if entry.id in bad or WHOLE in bad:
                    reader.open(Location(pack_name(pack), entry), entry.kind)
        except (Corrupt, NewerFormat, ObjectMissing):
            return False
        return True
