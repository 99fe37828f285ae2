"""Is everything still there, and what does it cost if not? Four levels, each with its price:

    ids     every point can be read, every page of its maps too, every block is indexed and its pack is there
    packs   and every pack and index segment has the bytes that its name says (needs no key: `verify_packs`)
    sample  ids, and some blocks of every disk are decrypted and hashed again
    full    packs, and every block is decrypted and hashed again

A finding names the object, what is wrong, and the disks of points that need it. A map page shared by many points is
looked at once: the cost is that of different pages, not of points times disk size. A damaged copy of a block that
has another, good one is a finding that no point is affected by.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection
from enum import StrEnum

from workers.contract.errors import Corrupt, NewerFormat, ObjectMissing
from workers.contract.machines import Value
from workers.contract.points import DiskPoint, Point
from workers.contract.seams import Store
from workers.vault.blockmap import FANOUT, ID, BlockMap
from workers.vault.index import PREFIX, Location
from workers.vault.packs import DATA, PAGE, ZERO_ID, Entry, read_footer
from workers.vault.reader import BlockReader
from workers.vault.vault import Vault

SAMPLE_BLOCKS = 64
"""Blocks of each disk that level `sample` reads."""
_CHUNK = 8 << 20
_NONE: frozenset[str] = frozenset()


class Level(StrEnum):
    IDS = "ids"
    PACKS = "packs"
    SAMPLE = "sample"
    FULL = "full"


class Progress(Value):
    """Where a verification is: `done` of `total` packs or disks."""

    stage: str
    done: int
    total: int


class Affected(Value):
    """A disk of a point that cannot be restored whole."""

    point: str
    machine: str
    target: str


class Finding(Value):
    object: str
    """Name of the object that is damaged or missing; `block <id>` if no object of the index holds it."""
    problem: str
    affected: list[Affected] = []


class VerifyReport(Value):
    level: Level
    findings: list[Finding]
    points: int = 0
    packs: int = 0
    """Whose SHA-256 was computed."""
    blocks: int = 0
    """Decrypted and hashed again."""
    read_bytes: int = 0

    @property
    def ok(self) -> bool:
        return not self.findings


OnProgress = Callable[[Progress], None]


def _quiet(_: Progress) -> None:
    """Progress that nobody watches."""


def verify_packs(store: Store, *, on_progress: OnProgress | None = None) -> VerifyReport:
    """Compare every pack and index segment with the SHA-256 in its name. Needs no key."""
    names = [info.name for prefix in ("packs/", PREFIX) for info in store.list(prefix)]
    tell = on_progress or _quiet
    findings: list[Finding] = []
    read = 0
    for done, name in enumerate(names):
        tell(Progress(stage="packs", done=done, total=len(names)))
        try:
            digest, size = _digest(store, name)
        except (Corrupt, ObjectMissing) as error:
            findings.append(Finding(object=name, problem=str(error)))
            continue
        read += size
        if digest != name.rpartition("/")[2]:
            findings.append(Finding(object=name, problem=_NOT_ITS_NAME))
    tell(Progress(stage="packs", done=len(names), total=len(names)))
    return VerifyReport(level=Level.PACKS, findings=findings, packs=len(names), read_bytes=read)


def verify(
    vault: Vault,
    level: Level,
    *,
    on_progress: OnProgress | None = None,
    points: Collection[str] | None = None,
) -> VerifyReport:
    """Check a vault, or only what `points` (ids) need. Raises NotFound for an unknown one, VaultError if the store
    cannot be read at all; damage is reported, not raised."""
    return _Verification(vault, level, on_progress or _quiet, points).run()


_NOT_ITS_NAME = "its bytes are not what its name says"


def _digest(store: Store, name: str) -> tuple[str, int]:
    size = next((info.size for info in store.list(name) if info.name == name), None)
    if size is None:
        raise ObjectMissing(f"{name} is missing")
    sha = hashlib.sha256()
    for offset in range(0, size, _CHUNK):
        sha.update(store.get(name, offset, min(_CHUNK, size - offset)))
    return sha.hexdigest(), size


class _Verification:
    """One run. First packs and blocks, then points, whose pages say which damage matters to whom."""

    def __init__(self, vault: Vault, level: Level, tell: OnProgress, points: Collection[str] | None) -> None:
        self._vault = vault
        self._level = level
        self._tell = tell
        self._only = points
        self._reader: BlockReader = vault.reader()
        self._sizes = {info.name: info.size for info in vault.store.list("packs/")}
        self._problems: dict[str, str] = {}
        self._affected: dict[str, list[Affected]] = {}
        self._bad_copies: set[tuple[bytes, str]] = set()
        self._memo: dict[bytes, frozenset[str]] = {}
        self._packs = self._blocks = self._read = 0

    def run(self) -> VerifyReport:
        for name in self._vault.index.packs():
            if name not in self._sizes:
                self._vault.index.distrust_pack(name)
        chosen = self._points()
        for name, why in self._vault.index.damaged.items():
            self._problem(name, why)
        if self._level in (Level.PACKS, Level.FULL):
            self._check_packs(self._needed(chosen) if self._only is not None else None)
        disks = [(point, disk) for point in chosen for disk in point.disks]
        for done, (point, disk) in enumerate(disks):
            self._tell(Progress(stage="points", done=done, total=len(disks)))
            self._check_disk(point, disk)
        self._tell(Progress(stage="points", done=len(disks), total=len(disks)))
        findings = [
            Finding(object=name, problem=why, affected=self._affected.get(name, []))
            for name, why in self._problems.items()
        ]
        return VerifyReport(
            level=self._level,
            findings=findings,
            points=len(chosen),
            packs=self._packs,
            blocks=self._blocks,
            read_bytes=self._read,
        )

    def _points(self) -> list[Point]:
        if self._only is None:
            for name, why in self._vault.damaged_objects():
                self._problem(name, why)
            for name, why in self._vault.damaged_points():
                self._problem(f"points/{name}", why)
            for name in self._vault.index.packs():
                if name not in self._sizes:
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
        names = [name for name in self._sizes if needed is None or name in needed]
        for done, name in enumerate(names):
            self._tell(Progress(stage="packs", done=done, total=len(names)))
            whole = self._check_digest(name)
            if not whole or self._level is Level.FULL:
                self._check_blocks(name)
        if needed is None:
            for info in self._vault.store.list(PREFIX):
                self._check_digest(info.name)

    def _check_digest(self, name: str) -> bool:
        try:
            digest, size = _digest(self._vault.store, name)
        except (Corrupt, ObjectMissing) as error:
            self._problem(name, str(error))
            return False
        self._packs += name in self._sizes
        self._read += size
        if digest == name.rpartition("/")[2]:
            return True
        self._problem(name, _NOT_ITS_NAME)
        return False

    def _check_blocks(self, name: str) -> None:
        """Every block that the pack's footer or the index says is in it."""
        indexed = self._vault.index.entries(name)
        try:
            entries = read_footer(self._vault.store, name, self._sizes[name], self._vault.keys)
            if lost := set(indexed) - set(entries):
                self._problem(name, f"the index expects {len(lost)} blocks in it that its footer does not list")
        except (Corrupt, ObjectMissing, NewerFormat) as error:
            self._problem(name, str(error))
            entries = indexed
        for entry in sorted({*entries, *indexed}, key=lambda entry: entry.offset):
            self._check_copy(name, entry)

    def _check_copy(self, name: str, entry: Entry) -> None:
        try:
            self._reader.open(Location(name, entry), entry.kind)
        except (Corrupt, ObjectMissing, NewerFormat) as error:
            self._bad_copies.add((entry.id, name))
            self._problem(name, str(error))
        self._blocks += 1

    def _needed(self, points: list[Point]) -> set[str]:
        """Packs that hold the pages and blocks of `points`, as far as they can be read."""
        packs: set[str] = set()
        seen: set[bytes] = set()

        def visit(blocks: BlockMap, level: int, index: int, id: bytes) -> None:
            if id == ZERO_ID or id in seen:
                return
            packs.update(location.pack for location in self._vault.index.find(id))
            if level < 0:
                return
            seen.add(id)
            try:
                ids = blocks.load(id, level, index)
            except (Corrupt, ObjectMissing, NewerFormat):
                return  # reported by the walk
            for at in range(len(ids) // ID):
                visit(blocks, level - 1, index * FANOUT + at, ids[at * ID : at * ID + ID])

        for point in points:
            for disk in point.disks:
                blocks = self._map(disk)
                visit(blocks, blocks.shape.height - 1, 0, blocks.root)
        return packs

    # --- points ----------------------------------------------------------------------------------------------------

    def _map(self, disk: DiskPoint) -> BlockMap:
        return BlockMap(self._reader, bytes.fromhex(disk.root), disk.capacity, disk.block_size)

    def _check_disk(self, point: Point, disk: DiskPoint) -> None:
        blocks = self._map(disk)
        if self._level is Level.SAMPLE:
            self._check_sample(blocks)
        for name in sorted(self._damage(blocks, blocks.shape.height - 1, 0, blocks.root)):
            affected = Affected(point=point.id, machine=point.machine.name, target=disk.target)
            self._affected.setdefault(name, []).append(affected)

    def _check_sample(self, blocks: BlockMap) -> None:
        try:
            chosen = blocks.sample(random.Random(), SAMPLE_BLOCKS)
        except (Corrupt, ObjectMissing, NewerFormat):
            return  # a page is damaged: reported by the walk
        for index in chosen:
            for location in self._vault.index.find(blocks.id_at(index)):
                self._check_copy(*location)
                self._read += location.entry.stored

    def _damage(self, blocks: BlockMap, level: int, index: int, id: bytes) -> frozenset[str]:
        """Objects whose damage touches what is under a page."""
        if id == ZERO_ID:
            return _NONE
        if (known := self._memo.get(id)) is not None:
            return known
        found = set(self._block_damage(id, PAGE))
        try:
            ids = b"" if found else blocks.load(id, level, index)
        except (Corrupt, ObjectMissing, NewerFormat) as error:
            copies = self._vault.index.find(id)
            name = copies[0].pack if copies else _block(id)
            self._problem(name, str(error))
            found.add(name)
            ids = b""
        for at in range(len(ids) // ID):
            child = ids[at * ID : at * ID + ID]
            if child == ZERO_ID:
                continue
            if level:
                found |= self._damage(blocks, level - 1, index * FANOUT + at, child)
            else:
                found |= self._block_damage(child, DATA)
        self._memo[id] = frozenset(found) if found else _NONE
        return self._memo[id]

    def _block_damage(self, id: bytes, kind: int) -> frozenset[str]:
        """Nothing if one copy of the block is good as far as is known."""
        copies = self._vault.index.find(id)
        bad: list[str] = []
        for name, entry in copies:
            size = self._sizes.get(name)
            if size is None:
                self._problem(name, "it is missing")
            elif entry.offset + entry.stored > size:
                self._problem(name, f"it is cut short: {size} bytes")
            elif entry.kind != kind:
                self._problem(name, f"{_block(id)} in it is of another kind than a map says")
            elif (id, name) not in self._bad_copies:
                return _NONE
            self._vault.index.distrust(id, name)
            bad.append(name)
        if not bad:
            self._problem(_block(id), "it is in no index segment")
            bad.append(_block(id))
        return frozenset(bad)


def _block(id: bytes) -> str:
    return f"block {id.hex()}"
