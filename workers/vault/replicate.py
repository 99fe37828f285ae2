"""A second vault of the same content, somewhere else: what is missing there is copied, as it is, without a key.

The order is the safety argument. *A point is copied after everything that it needs.* So points are listed first, then
what they need is copied until a pass has found nothing moving: segments listed, packs listed, both copied, and then
the list of segments is the same. A sweep or compaction removes a segment before it removes a pack that the segment
names, so at the end of such a pass every segment that is here finds its packs here. A point that is gone when its turn
comes was deleted meanwhile, and needs nothing any more. The marker comes last: a replica that was cut off in the
middle is no vault yet. Objects never change, so a run that was cut off is simply run again.

Deletions follow (`gone.py`): packs and segments are compared as that last pass listed them, and their successors are
here; points are compared after it. So a point is never noted later than the packs that went because of it, and what
still lives never needs a pack that was noted. What is removed here is removed points first, packs last.

The failures prevented: a copy of damage (what has its hash for a name is checked while it passes); a replica that is
emptied because the original was (a delay; no more than half of the points at once; nothing at all where the original
holds nothing); and one that loses the only good copy of a pack which the original has *lost*: a sweep that removes
packs removes segments too, so packs that vanish while no segment does are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from workers.contract.errors import Busy, Locked, VaultError, VaultMissing
from workers.contract.machines import Value
from workers.contract.seams import ObjectInfo, Store
from workers.vault.copying import THREADS, Copies, NotCopied, Pace, copy_all, copy_object, listed, missing
from workers.vault.gone import note_gone, read_gone, since, strike_off
from workers.vault.identity import read_marker
from workers.vault.stores import MARKER

_BLOCKS = ("packs/", "index/")
_PLAIN = ("keyring/", "keys/", "locks/", "pins/")
_FOLLOWED = ("points/", "pins/", "keys/", "index/", "packs/")
"""What is removed after the original has removed it, in this order."""
_PASSES = 10
"""Over a vault that somebody sweeps at the same time."""


class Progress(Value):
    """Where a replication is, in bytes; `total` grows with what is written meanwhile."""

    stage: str
    done: int
    total: int


class ReplicaReport(Value):
    """What one run did, or, of a dry run, would do."""

    created: bool = False
    """There was no replica before."""
    objects: int = 0
    """Copied, of all kinds."""
    bytes: int = 0
    points: int = 0
    """Manifests among them."""
    noted: int = 0
    """Objects seen for the first time to be gone from the original; they stay for the delay."""
    removed: int = 0
    """Objects whose delay is over."""
    removed_points: int = 0
    held_back: str = ""
    """Why what is due was not removed; empty: it was."""
    kept: int = 0
    """Packs that the original seems to have lost rather than swept."""
    not_copied: list[NotCopied] = []
    """Objects of the original that are not what was written."""


OnProgress = Callable[[Progress], None]


def replicate(
    source: Store,
    target: Store,
    *,
    delay: timedelta,
    now: datetime | None = None,
    rate: int | None = None,
    threads: int = THREADS,
    force: bool = False,
    dry_run: bool = False,
    on_progress: OnProgress | None = None,
) -> ReplicaReport:
    """Bring `target` up to date with the vault in `source`; what is gone from it for `delay` is removed.

    `rate`: bytes a second. `force`: remove what is due, even more than half of the points. Raises VaultError if the
    target holds another vault, VaultMissing if there is no source, Busy if the source does not stand still long
    enough, and what stores raise; run it again then.
    """
    run = _Replication(source, target, Pace(rate), threads, dry_run, on_progress or (lambda _: None))
    run.check()
    run.copy()
    run.follow(now or datetime.now(UTC), delay, force)
    return ReplicaReport(**run.report)


def check_target(source: Store, target: Store) -> bool:
    """Whether the target is a copy of the source already; False: it is empty, or was cut off while it was made.
    Raises VaultError if it holds anything else, VaultMissing if the source is no vault."""
    marker = read_marker(source)
    place = target.features.place
    try:
        found = read_marker(target)
    except VaultMissing:
        keyring = listed(target, "keyring/")
        first = next(iter(keyring), None)
        foreign = first is None and any(True for prefix in _BLOCKS for _ in target.list(prefix))
        if foreign or (first is not None and target.get(first) != source.get(first)):
            raise VaultError(f"{place} holds objects of another vault", hint="choose an empty place") from None
        return False
    if found != marker:
        raise VaultError(f"{place} holds another vault than {source.features.place}", hint="choose an empty place")
    return True


class _Replication:
    """One run."""

    def __init__(self, source: Store, target: Store, pace: Pace, threads: int, dry_run: bool, tell: OnProgress) -> None:
        self._source = source
        self._target = target
        self._pace = pace
        self._threads = threads
        self._dry_run = dry_run
        self._tell = tell
        self._stage = ""
        self._done = self._total = 0
        self._there: set[str] = set()
        """Packs and segments of the source, as the last pass found them."""
        self.report: dict[str, Any] = {"not_copied": []}

    def check(self) -> None:
        self.report["created"] = not check_target(self._source, self._target)

    # --- copying ---------------------------------------------------------------------------------------------------

    def copy(self) -> None:
        points = missing(self._source, self._target, "points/")
        # The keyring first: by it a replica that was cut off is told from another vault.
        self._take("keys", missing(self._source, self._target, *_PLAIN))
        self._blocks()
        copied = self._take("points", points)
        self.report["points"] = copied.objects
        if self.report["created"] and not self._dry_run:
            info = listed(self._source, MARKER)[MARKER]
            copy_object(self._source, self._target, info)

    def _blocks(self) -> None:
        refused: set[str] = set()
        grown = True
        for _ in range(_PASSES):
            segments = listed(self._source, "index/")
            packs = listed(self._source, "packs/")
            self._there = {*packs, *segments}
            for kind, present in (("packs", packs), ("index", segments)):
                there = listed(self._target, f"{kind}/")
                wanted = [one for name, one in present.items() if name not in there and name not in refused]
                refused |= {one.object for one in self._take(kind, wanted).refused}
            after = listed(self._source, "index/").keys()
            if after == segments.keys() or self._dry_run:
                return
            grown = after > segments.keys()
        if not grown:
            raise Busy(
                "the vault is swept at the same time, and did not stand still for long enough",
                hint="run it again when the sweep has ended; what is copied stays",
            )

    def _take(self, stage: str, wanted: list[ObjectInfo]) -> Copies:
        self._stage = stage
        self._total += sum(info.size for info in wanted)
        self._advance(0)
        if self._dry_run:
            done = Copies(len(wanted), sum(info.size for info in wanted))
        else:
            done = copy_all(
                self._source, self._target, wanted, threads=self._threads, pace=self._pace, on_bytes=self._advance
            )
        self.report["objects"] = self.report.get("objects", 0) + done.objects
        self.report["bytes"] = self.report.get("bytes", 0) + done.bytes
        self.report["not_copied"] += done.refused
        return done

    def _advance(self, count: int) -> None:
        self._done += count
        self._tell(Progress(stage=self._stage, done=self._done, total=self._total))

    # --- deletions -------------------------------------------------------------------------------------------------

    def follow(self, now: datetime, delay: timedelta, force: bool) -> None:
        """Note what is gone from the source, strike off what came back, remove what is due."""
        here = listed(self._target, *_FOLLOWED)
        there = self._there | listed(self._source, "keys/", "pins/", "points/").keys()
        if not force and here and not any(name.startswith(("packs/", "points/")) for name in there):
            self.report["held_back"] = "the original holds nothing"
            return
        gone = {name for name in here if name not in there}
        notes = since(read_gone(self._target))
        if not any(name.startswith("index/") for name in gone):
            kept = {name for name in gone - notes.keys() if name.startswith("packs/")}
            self.report["kept"] = len(kept)
            gone -= kept
        fresh = gone - notes.keys()
        self.report["noted"] = len(fresh)
        due = [name for name in here if name in gone and now - notes.get(name, now) >= delay]
        if not self._dry_run:
            strike_off(self._target, notes.keys() - gone)
            note_gone(self._target, fresh, now)
        self._remove(due, sum(1 for name in here if name.startswith("points/")), force)

    def _remove(self, due: list[str], points: int, force: bool) -> None:
        """`due`, in order of `_FOLLOWED`, of a replica with so many `points`."""
        doomed = [name for name in due if name.startswith("points/")]
        if len(doomed) * 2 > points and not force:
            self.report["held_back"] = f"{len(doomed)} of {points} points would go at once"
        elif due and self._read():
            self.report["held_back"] = "somebody restores from the replica"
        elif self._dry_run:
            self.report |= {"removed": len(due), "removed_points": len(doomed)}
        elif due:
            self._delete(due, doomed)

    def _read(self) -> bool:
        return any(True for _ in self._target.list("sessions/"))

    def _delete(self, due: list[str], doomed: list[str]) -> None:
        removed = [name for name in doomed if self._deleted(name)]
        self.report["removed_points"] = len(removed)
        # Who announced a session before its point went keeps what the point needs; who does after finds no point.
        if self._read():
            self.report["held_back"] = "somebody restores from the replica"
        elif len(removed) == len(doomed):
            removed += [name for name in due[len(doomed) :] if self._deleted(name)]
        self.report["removed"] = len(removed)
        strike_off(self._target, set(removed))

    def _deleted(self, name: str) -> bool:
        try:
            self._target.delete(name)
        except Locked as error:
            self.report["held_back"] = str(error)
            return False
        return True
