"""Which machines a `[protect.*]` section is for: pure rules on names, hypervisors and tags.

A section is compiled once and kept, since a tick of the scheduler asks for each machine and each section: ten thousand
machines and ten sections cost a tenth of a second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from fnmatch import translate
from functools import lru_cache

from orchestrator.config_file import Protect

TAG = "tag:"
"""Before a glob on tags among those on names."""


def covers(section: Protect, hypervisor: str, machine: str, tags: Collection[str]) -> bool:
    """Whether the machine fits every key that is given, and nothing that is excluded."""
    rule = _rule(
        None if section.machines is None else tuple(section.machines),
        None if section.hypervisors is None else tuple(section.hypervisors),
        None if section.tags is None else tuple(section.tags),
        tuple(section.exclude),
    )
    return rule(hypervisor, machine, tags)


Rule = Callable[[str, str, Collection[str]], bool]
"""Whether a machine fits, by its hypervisor, name and tags."""


@lru_cache(maxsize=1024)
def _rule(
    machines: tuple[str, ...] | None,
    hypervisors: tuple[str, ...] | None,
    tags: tuple[str, ...] | None,
    exclude: tuple[str, ...],
) -> Rule:
    named = _named(machines) if machines is not None else None
    hosted = _pattern(hypervisors) if hypervisors is not None else None
    marked = _pattern(tags) if tags is not None else None
    not_named = _named(tuple(glob for glob in exclude if not glob.startswith(TAG)))
    not_marked = _pattern(tuple(glob.removeprefix(TAG) for glob in exclude if glob.startswith(TAG)))

    def fits(hypervisor: str, machine: str, words: Collection[str]) -> bool:
        return (
            (named is None or named(hypervisor, machine))
            and (hosted is None or hosted(hypervisor) is not None)
            and (marked is None or any(map(marked, words)))
            and not any(map(not_marked, words))
            and not not_named(hypervisor, machine)
        )

    return fits


def literal(name: str) -> str:
    """The glob that means this name and no other."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _named(globs: tuple[str, ...]) -> Callable[[str, str], bool]:
    """Globs with a slash are on `hypervisor/name`."""
    bare = _pattern(tuple(glob for glob in globs if "/" not in glob))
    placed = tuple(glob for glob in globs if "/" in glob)
    if not placed:
        return lambda _hypervisor, machine: bare(machine) is not None
    in_place = _pattern(placed)
    return lambda hypervisor, machine: bare(machine) is not None or in_place(f"{hypervisor}/{machine}") is not None


def _pattern(globs: tuple[str, ...]) -> Callable[[str], re.Match[str] | None]:
    return re.compile("|".join(translate(glob) for glob in globs) or r"(?!)").match
