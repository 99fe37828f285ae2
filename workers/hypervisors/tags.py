"""Tags of a machine: words by which a configuration chooses what it protects (`tag:gold`).

Whoever owns the machine writes them, in its metadata (`virsh metadata`) or, where only that can be edited, in its
description: `[stillframe: gold nightly]`. What is not a plain word is no tag, so that nothing of a tag can mean
something anywhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from workers.contract.errors import HypervisorError
from workers.hypervisors import xml

NAMESPACE = "urn:stillframe:tags"
MOST = 32
"""Tags of one machine; more are not read."""
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_BREAK = re.compile(r"[\s,;]+")
_IN_DESCRIPTION = re.compile(r"\[stillframe:([^\[\]]{0,2000})\]")
_LONGEST = 64 << 10
"""Characters of a text that are looked at."""


def words(text: str) -> list[str]:
    """The tags in `text`, apart by blanks, commas or semicolons."""
    return [word for word in _BREAK.split(text[:_LONGEST]) if _WORD.fullmatch(word)]


def in_description(text: str) -> list[str]:
    """Those of every `[stillframe: …]` in a description."""
    return [word for found in _IN_DESCRIPTION.findall(text[:_LONGEST]) for word in words(found)]


def of_definition(definition: str) -> list[str]:
    """Those of a libvirt definition: `<metadata><stillframe:tags xmlns:stillframe="urn:stillframe:tags">gold
    nightly</stillframe:tags></metadata>`, and those in its description. One that cannot be read has none, and keeps
    nobody from seeing the machine."""
    try:
        root = xml.parse(definition)
    except HypervisorError:
        return []
    element = root.find(f"metadata/{{{NAMESPACE}}}tags")
    mine = words("".join(element.itertext())) if element is not None else []
    return once([*mine, *in_description(root.findtext("description") or "")])


def once(found: Iterable[str]) -> list[str]:
    """Each once, in order, not too many."""
    return list(dict.fromkeys(found))[:MOST]
