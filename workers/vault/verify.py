"""Is everything still there, and what does it cost if not? Four levels, each with its price:

    ids     every point can be read, every page of its maps too, every block is indexed and its pack is there
    packs   and every pack and index segment has the bytes that its name says (needs no key: `verify_packs`)
    sample  ids, and some blocks of every disk are decrypted and hashed again
    full    packs, and every block is decrypted and hashed again

With a `Share`, packs are hashed at any level, but only those of that part: a part each night, and after as many nights
every pack has been read.

A finding names the object, what is wrong, and the disks of points that need it. A damaged copy of a block that has
another, good one is a finding that no point is affected by. What is found is told to every host (`damage.py`), and what
was known to be damaged and is whole again is struck off.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

from workers.contract.errors import Corrupt, NewerFormat, NoSpace, ObjectMissing, VaultError
from workers.contract.points import Point
from workers.contract.seams import ObjectInfo
from workers.vault.checkup import damaged_objects
from workers.vault.damage import WHOLE
from workers.vault.digests import problems, verify_packs
from workers.vault.findings import Affected, Finding, Level, OnProgress, Progress, Share, VerifyReport, quiet
from workers.vault.index import PREFIX as INDEX
from workers.vault.index import Location
from workers.vault.packs import Entry, pack_name, read_footer
from workers.vault.vault import Vault
from workers.vault.walk import Walk

__all__ = [
    "Affected",
    "Finding",
    "Level",
    "OnProgress",
    "Progress",
    "Share",
    "VerifyReport",
    "verify",
    "verify_packs",
]


def verify(
    vault: Vault,
    level: Level,
    *,
    on_progress: OnProgress | None = None,
    points: Collection[str] | None = None,
    share: Share | None = None,
) -> VerifyReport:
    """Check a vault, or only what `points` (ids) need. Raises NotFound for an unknown one, VaultError if the store
    cannot be read at all; damage is reported, not raised."""
    return _Verification(vault, level, on_progress or quiet, points, share).run()


class _Verification:
    """One run. First packs and blocks, then points, whose pages say which damage matters to whom."""

    def __init__(
        self, vault: Vault, level: Level, tell: OnProgress, points: Collection[str] | None, share: Share | None
    ) -> None:
        self._vault = vault
        self._index = vault.index
        self._level = level
        self._tell = tell
        self._only = points
        self._share = share
        self._reader = vault.reader()
        self._sizes, self._missing = vault.packs()
        self._records = self._index.damage_objects()
        known = {(copy.block, pack_name(copy.pack)) for copy in self._index.damage()}
        self._suspects = {pack for _, pack in known}
        """Packs that were known to be damaged before this run, and were not found whole in it."""
        self._whole: set[str] = set()
        self._problems: dict[str, str] = {}
        self._affected: dict[str, list[Affected]] = {}
        self._walk = Walk(self._index, self._reader, self._sizes, known, self._problem)
        self._packs = self._blocks = self._read = 0

    def run(self) -> VerifyReport:
        chosen = self._points()
        for name, why in self._index.damaged.items():
            self._problem(name, why)
        if self._share or self._level in (Level.PACKS, Level.FULL):
            self._check_packs(self._walk.needed(chosen) if self._only is not None else None)
        for name in self._suspects & self._sizes.keys() if self._only is None else ():
            self._problem(name, "blocks in it are known to be damaged")
        self._check_points(chosen)
        self._index.tell_damage()
        if self._only is None:
            self._settle()
        return VerifyReport(
            level=self._level,
            share=str(self._share or ""),
            findings=[
                Finding(object=name, problem=why, affected=self._affected.get(name, []))
                for name, why in self._problems.items()
            ],
            points=len(chosen),
            packs=self._packs,
            blocks=self._blocks,
            read_bytes=self._read,
            repaired=len(self._whole),
        )

    def _settle(self) -> None:
        """Strike off what is no longer damaged: packs that were found whole, and those that nobody names any more."""
        present = self._sizes.keys() | self._missing
        gone = {copy.pack for copy in self._index.damage() if pack_name(copy.pack) not in present}
        whole = {bytes.fromhex(name.removeprefix("packs/")) for name in self._whole}
        with suppress(VaultError, NoSpace):  # read-only: whoever may write does it
            self._index.settle_damage(gone | whole, self._records)

    def _points(self) -> list[Point]:
        if self._only is None:
            for name, why in damaged_objects(self._vault):
                self._problem(name, why)
            for name, why in self._vault.damaged_points():
                self._problem(f"points/{name}", why)
            for name in sorted(self._missing):
                self._problem(name, "it is missing")
            return list(self._vault.points())
        found = []
        for id in self._only:
            try:
                found.append(self._vault.point(id))
            except (Corrupt, NewerFormat) as error:
                self._problem(f"points/{id}", str(error))
        return found

    def _problem(self, name: str, why: str) -> None:
        self._problems.setdefault(name, why)

    # --- packs -----------------------------------------------------------------------------------------------------

    def _check_packs(self, needed: set[str] | None) -> None:
        packs = [ObjectInfo(name, size) for name, size in self._sizes.items() if needed is None or name in needed]
        segments = list(self._vault.store.list(INDEX)) if needed is None else []
        objects = [info for info in packs + segments if self._share is None or self._share.holds(info.name)]
        unneeded = self._sizes.keys() - set(self._index.packs())
        for done, (info, problem) in enumerate(problems(self._vault.store, objects, unneeded)):
            self._tell(Progress(stage="packs", done=done, total=len(objects)))
            self._read += info.size
            if problem:
                self._problem(info.name, problem)
            if info.name in self._sizes:
                self._packs += 1
                self._check_pack(info.name, whole=not problem)

    def _check_pack(self, name: str, *, whole: bool) -> None:
        if whole and self._level is not Level.FULL and name not in self._suspects:
            return
        bad = self._check_blocks(name)
        if not whole and not bad:
            # Its blocks can be read, but nobody could copy it, or make the index again from it.
            self._index.distrust(WHOLE, name)
        if whole and not bad and name in self._suspects:
            self._suspects.remove(name)
            self._whole.add(name)
            self._walk.trust(name)

    def _check_blocks(self, name: str) -> int:
        """Open every block that the pack's footer or the index says is in it; how many are damaged."""
        indexed = self._index.entries(name)
        try:
            entries = read_footer(self._vault.store, name, self._sizes[name], self._vault.keys)
            if lost := set(indexed) - set(entries):
                self._problem(name, f"the index expects {len(lost)} blocks in it that its footer does not list")
        except (Corrupt, ObjectMissing, NewerFormat) as error:
            self._problem(name, str(error))
            entries = indexed
        ordered = sorted({*entries, *indexed}, key=lambda entry: entry.offset)
        return sum(not self._check_copy(name, entry) for entry in ordered)

    def _check_copy(self, name: str, entry: Entry) -> bool:
        self._blocks += 1
        try:
            self._reader.open(Location(name, entry), entry.kind)
        except (Corrupt, ObjectMissing, NewerFormat) as error:
            if name in self._problems and name in self._sizes:
                self._index.distrust(entry.id, name)  # even if it looks like one of a newer format
            self._walk.bad.add((entry.id, name))
            self._problem(name, str(error))
            return False
        return True

    # --- points ----------------------------------------------------------------------------------------------------

    def _check_points(self, chosen: list[Point]) -> None:
        disks = [(point, disk) for point in chosen for disk in point.disks]
        for _, disk in disks if self._level is Level.SAMPLE else ():
            for location in self._walk.sample(disk):
                self._check_copy(*location)
                self._read += location.entry.stored
        for done, (point, disk) in enumerate(disks):
            self._tell(Progress(stage="points", done=done, total=len(disks)))
            for name in self._walk.damage(disk):
                affected = Affected(point=point.id, machine=point.machine.name, target=disk.target)
                self._affected.setdefault(name, []).append(affected)
        self._tell(Progress(stage="points", done=len(disks), total=len(disks)))
