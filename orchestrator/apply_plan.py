"""What a configuration will change for whom, before it does: pure, from what the scheduler would put in force.

What is in force is what the catalog's duties say; so the plan is a difference, and the second plan of the same file is
empty.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from orchestrator.scheduler import Adopt, Decision, Drop, Duty, Key, Machine

FIELDS = ("section", "policy", "vault", "schedule")


class Kind(StrEnum):
    PROTECTED = "protected"
    CHANGED = "changed"
    UNPROTECTED = "unprotected"


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that will be another: a section, policy, vault or schedule. Empty: none."""

    field: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Change:
    """What changes for a machine."""

    kind: Kind
    machine: Machine
    differences: tuple[Difference, ...]
    next: datetime | None = None
    """When its next backup begins then; None: none begins by itself."""


@dataclass(frozen=True, slots=True)
class Plan:
    changes: list[Change]
    """Newly protected first, then what changes, then what is protected no longer; by name."""
    unchanged: int
    """Machines that stay as they are protected."""
    unprotected: int
    """Machines that nothing protects, before or after."""
    away: int
    """Machines that cannot be backed up now, and of which nothing is decided."""
    decisions: list[Decision]
    """Puts it in force."""


_Words = tuple[str, str, str, str]
"""As FIELDS."""


def plan(
    decisions: Sequence[Decision],
    machines: Iterable[Machine],
    duties: Mapping[Key, Duty],
    next_runs: Mapping[str, datetime],
) -> Plan:
    known = {machine.uuid: machine for machine in machines}
    before: dict[str, list[_Words]] = defaultdict(list)
    for (uuid, name), duty in duties.items():
        before[uuid].append(_words(name, duty))
    after = {uuid: list(found) for uuid, found in before.items()}
    for one in decisions:
        match one:
            case Adopt(machine=machine, section=section, before=old, after=new):
                mine = after.setdefault(machine.uuid, [])
                if old is not None:
                    mine.remove(_words(section.name, old))
                mine.append(_words(section.name, new))
            case Drop(uuid=uuid, section=gone, before=last):
                after[uuid].remove(_words(gone, last))
    changes = [
        _change(known.get(uuid) or Machine(uuid, "", uuid), before.get(uuid, []), mine, next_runs.get(uuid))
        for uuid, mine in after.items()
        if sorted(before.get(uuid, [])) != sorted(mine)
    ]
    order = list(Kind)
    return Plan(
        changes=sorted(changes, key=lambda one: (order.index(one.kind), one.machine.name, one.machine.uuid)),
        unchanged=sum(1 for uuid, mine in after.items() if mine and sorted(before.get(uuid, [])) == sorted(mine)),
        unprotected=sum(1 for uuid, one in known.items() if not (one.away or after.get(uuid) or before.get(uuid))),
        away=sum(1 for one in known.values() if one.away),
        decisions=[one for one in decisions if isinstance(one, Adopt | Drop)],
    )


def _words(section: str, duty: Duty) -> _Words:
    return section, duty.policy, duty.vault, duty.schedule


def _change(machine: Machine, before: list[_Words], after: list[_Words], next: datetime | None) -> Change:
    kind = Kind.CHANGED if before and after else Kind.PROTECTED if after else Kind.UNPROTECTED
    gone, new = [one for one in before if one not in after], [one for one in after if one not in before]
    differences = [one for old, fresh in _pairs(gone, new) for one in _differences(old, fresh)]
    return Change(kind, machine, tuple(differences), next if after else None)


def _pairs(gone: list[_Words], new: list[_Words]) -> list[tuple[_Words | None, _Words | None]]:
    """What takes the place of what: of the same section, else into the same vault, else anything."""
    pairs: list[tuple[_Words | None, _Words | None]] = []
    for same in (lambda old, fresh: old[0] == fresh[0], lambda old, fresh: old[2] == fresh[2], lambda _o, _f: True):
        for old in list(gone):
            fresh = next((one for one in new if same(old, one)), None)
            if fresh is not None:
                gone.remove(old)
                new.remove(fresh)
                pairs.append((old, fresh))
    return pairs + [(old, None) for old in gone] + [(None, fresh) for fresh in new]


def _differences(before: _Words | None, after: _Words | None) -> list[Difference]:
    nothing = ("", "", "", "")
    old, new = before or nothing, after or nothing
    return [Difference(name, a, b) for name, a, b in zip(FIELDS, old, new, strict=True) if a != b]
