"""What `vssadmin list writers` printed: which VSS writers were not at rest after a freeze.

The text is in the guest's language and has been through a code page that may not have been its own, so words cannot be
relied on. What stays the same: the GUIDs, `[7]` for the state, and the order of the lines. That a writer has no error
is said in words only. They are known for the languages of which there are recordings; in another one they are what
most of the writers say. That most of them have one and the same error, are in state 1 all the same, and the freeze has
worked, is the case in which this would be wrong.

Any doubt is a failure, or `None` where nothing is proven.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

FINE = frozenset({1, 5})
"""`VSS_WS_STABLE`, and `VSS_WS_WAITING_FOR_BACKUP_COMPLETE`: the agent's requester never says that the backup is
complete, so writers may stay there after a good one. 0 is unknown, 2 to 4 are steps before the thaw, others fail."""

_ENOUGH = 3
"""Writers that must say the same for their words to count. Every Windows has more than that."""
_NO_ERROR = {"last error": "no error", "letzter fehler": "kein fehler", "dernière erreur": "aucune erreur"}
"""What stands before the colon → what stands behind it where all is well."""
_GUID = re.compile(r"\{[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}\}")
_STATE = re.compile(r"\[(\d{1,3})\]")
_QUOTED = re.compile(r"['\"«»„“”‘’](.+)['\"«»„“”‘’]")


@dataclass(frozen=True, slots=True)
class Writer:
    name: str
    id: str
    """GUID of its kind, `{e8132975-…}`."""
    state_code: int
    """`VSS_WRITER_STATE`; 0: unknown, or not said."""
    error: str
    """In the guest's words."""


def writers(text: str) -> list[Writer]:
    """All writers in the order of the text; none if it is something else."""
    lines = [line for raw in text.splitlines() if (line := raw.strip())]
    # A block has a name, the GUID of the kind, that of the instance, a state, an error.
    begins = [at for at, line in enumerate(lines) if at and _GUID.search(line) and not _GUID.search(lines[at - 1])]
    ends = [begin - 1 for begin in begins[1:]] + [len(lines)]
    return [_writer(lines[begin - 1 : end]) for begin, end in zip(begins, ends, strict=False)]


def _writer(block: list[str]) -> Writer:
    found = _GUID.search(block[1])
    id = found.group() if found else ""
    for at, line in enumerate(block[2:], start=2):
        state = _STATE.search(line)
        if state and not _GUID.search(line):
            error = _value(block[at + 1]) if at + 1 < len(block) else ""
            return Writer(_name(block[0]) or id, id, int(state.group(1)), error)
    return Writer(_name(block[0]) or id, id, 0, "")


def _value(line: str) -> str:
    """Behind the first colon, which some languages write wide."""
    parts = re.split(r"[:：]", line, maxsplit=1)
    return parts[-1].strip()


def _name(line: str) -> str:
    quoted = _QUOTED.search(line)
    return (quoted.group(1) if quoted else _value(line)).strip()


def failed_writers(text: str) -> list[str] | None:
    """`SqlServerWriter (state 8: Timed out)` for each writer that is not stable or has an error. None: the text does
    not prove anything."""
    found = writers(text)
    fine = _fine_words(text, [writer.error.casefold() for writer in found if writer.state_code in FINE])
    if not found or fine is None:
        return None
    return [
        f"{writer.name} (state {writer.state_code}: {writer.error or 'no word of an error'})"
        for writer in found
        if writer.state_code not in FINE or writer.error.casefold() not in fine
    ]


def _fine_words(text: str, errors: list[str]) -> set[str] | None:
    """Words that mean that there is no error, given those of the writers that are fine. None: nobody can tell."""
    known = {words for label, words in _NO_ERROR.items() if label in text.casefold()}
    if known or not errors:
        return known
    usual, count = Counter(errors).most_common(1)[0]
    return {usual} if usual and count >= _ENOUGH and count * 2 > len(errors) else None
