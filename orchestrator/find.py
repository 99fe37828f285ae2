"""From what people type to the one thing that they mean: machines and points by name, id, or moment.

Guessing is for hints only: a name that fits two things, or none, is an error that lists them, because the next step
may destroy something.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from sqlmodel import Session

from orchestrator.catalog.points import machines_named, points_of, points_with_prefix, seen_machines
from orchestrator.catalog.schema import PointRow
from orchestrator.plan import SHORT
from workers.contract.errors import NotFound, UsageError
from workers.contract.machines import MachineSummary

LATEST = "latest"


def machine_among(summaries: Sequence[MachineSummary], wanted: str) -> MachineSummary:
    """By UUID, `hypervisor/name`, or name. Raises NotFound with the closest names, UsageError if several have it."""
    hypervisor, _, name = wanted.rpartition("/")
    found = [s for s in summaries if s.machine.uuid == wanted]
    found = found or [s for s in summaries if s.machine.name == name and hypervisor in ("", s.machine.hypervisor)]
    if not found:
        raise NotFound(f"no machine {wanted!r}", hint=_closest(name, {s.machine.name for s in summaries}))
    if len(found) > 1:
        names = ", ".join(f"{s.machine.hypervisor}/{s.machine.name}" for s in found)
        raise UsageError(f"several machines are named {wanted}", hint=f"say which: {names}")
    return found[0]


def _closest(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"there are: {', '.join(names[:10])}" if names else "stillframe vm list"


def point_named(session: Session, ref: str) -> PointRow:
    """By id or unique beginning of one, `VM@latest`, or `VM@<ISO moment>`: the newest at or before it (local time if
    no zone is given). A deleted one only by its id. Raises NotFound, UsageError."""
    machine, at, when = ref.rpartition("@")
    if at:
        return _at_moment(session, machine, when)
    found = points_with_prefix(session, ref.lower()) if ref else []
    if len(found) > 1:
        raise UsageError(f"several points begin with {ref}", hint=f"say which: {', '.join(p.id[:16] for p in found)}")
    if found:
        return found[0]
    if ref and machines_named(session, ref):
        raise NotFound(f"no point {ref!r}: that is a machine", hint=f"{ref}@{LATEST}")
    raise NotFound(f"no point {ref!r}", hint="stillframe point list")


def _at_moment(session: Session, machine: str, when: str) -> PointRow:
    machines = machines_named(session, machine)
    points: Sequence[PointRow] = points_of(session, machines)
    if not points:
        names = {row.name for row in seen_machines(session)}
        raise NotFound(f"no point of a machine {machine!r}", hint=_closest(machine, names))
    points = [row for row in points if row.deleted_until is None]
    if not points:
        raise NotFound(f"all points of {machine} are deleted", hint=f"stillframe point list {machine} --deleted")
    where = {machines[row.machine_uuid] for row in points}
    if len(where) > 1:
        choices = ", ".join(f"{name}/{machine}@{when}" for name in sorted(where))
        raise UsageError(f"machines named {machine} have points of several hypervisors", hint=f"say which: {choices}")
    if when == LATEST:
        return points[-1]
    try:
        moment = datetime.fromisoformat(when).astimezone(UTC)
    except ValueError:
        raise UsageError(f"{when!r} is no moment", hint=f"{machine}@{LATEST}, or {machine}@2026-11-22T02:00") from None
    earlier = [row for row in points if row.time <= moment]
    if not earlier:
        first = points[0]
        raise NotFound(
            f"{machine} has no point at or before {when}",
            hint=f"its first is {first.id[:SHORT]}, {first.time:%Y-%m-%dT%H:%M:%S}+00:00",
        )
    return earlier[-1]
