"""Which machines a `[protect.*]` section is for: pure rules on names, hypervisors and tags.

Globs of one key are compiled into one pattern and kept, since a tick of the scheduler asks for each machine and each
section: ten thousand machines cost a fraction of a second.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from fnmatch import translate
from functools import lru_cache

from orchestrator.config_file import Protect

TAG = "tag:"
"""Before a glob on tags among those on names."""


def covers(section: Protect, hypervisor: str, machine: str, tags: Collection[str]) -> bool:
    """Whether the machine fits every key that is given, and nothing that is excluded."""
    return (
        (section.machines is None or _named(section.machines, hypervisor, machine))
        and (section.hypervisors is None or _any(section.hypervisors, (hypervisor,)))
        and (section.tags is None or _any(section.tags, tags))
        and not excludes(section, hypervisor, machine, tags)
    )


def excludes(section: Protect, hypervisor: str, machine: str, tags: Collection[str]) -> bool:
    """Whether the section leaves the machine out, whatever else fits."""
    names = [glob for glob in section.exclude if not glob.startswith(TAG)]
    marked = [glob.removeprefix(TAG) for glob in section.exclude if glob.startswith(TAG)]
    return _named(names, hypervisor, machine) or _any(marked, tags)


def literal(name: str) -> str:
    """The glob that means this name and no other."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _named(globs: Sequence[str], hypervisor: str, machine: str) -> bool:
    """Globs with a slash are on `hypervisor/name`."""
    bare = [glob for glob in globs if "/" not in glob]
    placed = [glob for glob in globs if "/" in glob]
    return _any(bare, (machine,)) or _any(placed, (f"{hypervisor}/{machine}",))


def _any(globs: Sequence[str], words: Collection[str]) -> bool:
    if not globs or not words:
        return False
    pattern = _pattern(tuple(globs))
    return any(pattern.match(word) for word in words)


@lru_cache(maxsize=1024)
def _pattern(globs: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(translate(glob) for glob in globs))
