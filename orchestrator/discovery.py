"""What has become of machines: new, renamed, moved, gone, back, or there twice. Pure.

The UUID is a machine's identity, and what hypervisors list is all that is believed of where it is. What is easy to get
wrong costs somebody a backup, or raises a false alarm:

* A hypervisor that does not answer has lost no machine.
* A machine that two hypervisors list is usually one that runs here and is still defined there.
* A machine that is moved while its hypervisors are asked, one after the other, may be listed by neither or by both. So
  it is gone only when every hypervisor was asked *after* it was first missed, and has said no.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from workers.contract.machines import Power

TOGETHER = timedelta(seconds=60)
"""Answers further apart than that are not of one moment: what runs in the newer one runs there."""


class News(StrEnum):
    """What is worth telling. Changes of power and tags are not."""

    NEW = "new"
    RENAMED = "renamed"
    MOVED = "moved"
    GONE = "gone"
    BACK = "back"
    DOUBTFUL = "doubtful"
    """It runs on two hypervisors at once."""
    CLEAR = "clear"
    """It does so no longer."""


@dataclass(frozen=True, slots=True)
class Known:
    """A machine as the catalog has it."""

    uuid: str
    hypervisor: str
    name: str
    power: Power | None
    """None: nobody looked, or it is gone."""
    tags: tuple[str, ...] = ()
    gone: bool = False
    missed: datetime | None = None
    """When its hypervisor first listed its machines without it."""
    doubt: str = ""
    """Why nobody can say which of two machines it is; empty: one can."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A machine as one hypervisor lists it."""

    name: str
    power: Power
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Listed:
    """A hypervisor's answer: UUID → machine, all that it has."""

    machines: Mapping[str, Seen]
    asked: datetime
    """It is from then, or later."""


@dataclass(frozen=True, slots=True)
class Silent:
    """It does not answer."""

    why: str


@dataclass(frozen=True, slots=True)
class Awaited:
    """It was asked just now and may yet answer, or was never asked."""


Answer = Listed | Silent | Awaited


@dataclass(frozen=True, slots=True)
class Change:
    """The machine as it is to be in the catalog from now on, and why."""

    machine: Known
    news: tuple[tuple[News, str], ...] = ()
    """Each with its reason; empty: nothing that people would be told."""


def decide(
    known: Mapping[str, Known], answers: Mapping[str, Answer], now: datetime, *, only: Collection[str] | None = None
) -> list[Change]:
    """What the last `answers` of all configured hypervisors (name → answer) change in what is `known` (UUID →
    machine); of the machines `only`, or of all."""
    places = _places(answers, only)
    wanted = known.keys() | places.keys() if only is None else set(only)
    found = (_change(uuid, known.get(uuid), places.get(uuid, {}), answers, now) for uuid in sorted(wanted))
    return [change for change in found if change is not None]


Places = Mapping[str, tuple[Seen, datetime]]
"""Hypervisor → the machine as seen there, and when that was asked."""


def _places(answers: Mapping[str, Answer], only: Collection[str] | None) -> dict[str, dict[str, tuple[Seen, datetime]]]:
    places: dict[str, dict[str, tuple[Seen, datetime]]] = {}
    for hypervisor, answer in answers.items():
        if isinstance(answer, Listed):
            for uuid in answer.machines if only is None else answer.machines.keys() & set(only):
                places.setdefault(uuid, {})[hypervisor] = (answer.machines[uuid], answer.asked)
    return places


def _change(
    uuid: str, before: Known | None, places: Places, answers: Mapping[str, Answer], now: datetime
) -> Change | None:
    if not places:
        return _missed(before, answers, now) if before is not None and not before.gone else None
    home = before.hypervisor if before is not None else ""
    chosen, why, doubt = _choose(home, places, answers)
    if chosen is None:
        return None
    seen, _ = places[chosen]
    after = Known(uuid, chosen, seen.name, seen.power, seen.tags, doubt=doubt)
    return Change(after, tuple(_news(before, after, why))) if before != after else None


def _missed(before: Known, answers: Mapping[str, Answer], now: datetime) -> Change | None:
    """Nobody lists it. It is gone only if everybody who could have it was asked since, and said no."""
    home = answers.get(before.hypervisor)
    if before.hypervisor not in answers:
        reason = f"{before.hypervisor} is no hypervisor of the configuration, and none of those has the machine"
    elif isinstance(home, Listed):
        reason = f"{before.hypervisor} has no machine with its UUID any more, and no other hypervisor has it"
    else:
        return None
    if before.missed is None:
        return Change(replace(before, missed=now))
    if all(isinstance(answer, Listed) and answer.asked > before.missed for answer in answers.values()):
        return Change(replace(before, power=None, gone=True, missed=None, doubt=""), ((News.GONE, reason),))
    return None


def _choose(home: str, places: Places, answers: Mapping[str, Answer]) -> tuple[str | None, str, str]:
    """Which of the hypervisors that list a machine has it, why, and what is doubtful about that. None: wait."""
    running = _running(places)
    if len(running) > 1:
        doubt = f"it runs on {' and '.join(running)} at once"
        return (home if home in running else running[0]), doubt, doubt
    word = answers.get(home)
    if home in places or word is None or isinstance(word, Listed):
        return *_among(home, places, running), ""
    if isinstance(word, Silent) and running:
        return running[0], f"it runs there, and {home} does not answer ({word.why})", ""
    return None, "", ""


def _running(places: Places) -> list[str]:
    """Where it runs, by the newest answers."""
    found = {name: asked for name, (seen, asked) in places.items() if seen.power is Power.RUNNING}
    newest = max(found.values(), default=None)
    return sorted(name for name, asked in found.items() if newest is not None and newest - asked <= TOGETHER)


def _among(home: str, places: Places, running: list[str]) -> tuple[str, str]:
    """Where it is and why there, when its home lists it, or said that it does not, or is not configured any more."""
    others = f"; it is defined on {' and '.join(sorted(places))}" if len(places) > 1 else ""
    if running:
        return running[0], f"it runs there{others}"
    paused = sorted(name for name, (seen, _) in places.items() if seen.power is Power.PAUSED)
    if paused:
        return (home if home in paused else paused[0]), f"it is paused there{others}"
    if home in places:
        return home, ""
    return min(places), f"it is no longer on {home}{others}"


def _news(before: Known | None, after: Known, why: str) -> Iterator[tuple[News, str]]:
    if before is None:
        yield News.NEW, f"found on {after.hypervisor}"
    else:
        if before.gone:
            yield News.BACK, f"found on {after.hypervisor} again"
        if before.hypervisor != after.hypervisor:
            yield News.MOVED, f"from {before.hypervisor} to {after.hypervisor}: {why}"
        if before.name != after.name:
            yield News.RENAMED, f"from {before.name} to {after.name}"
        if before.doubt and not after.doubt:
            yield News.CLEAR, f"it runs on {after.hypervisor} alone" if after.power else f"it is on {after.hypervisor}"
    if after.doubt and (before is None or before.doubt != after.doubt):
        yield News.DOUBTFUL, after.doubt
