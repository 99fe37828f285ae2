"""What a person or a program is told of alerts: pure rules and words.

One message at a time and target, whatever has happened: a vault that is gone lets ten thousand machines fail, and
somebody needs one message of that, not ten thousand. Each target has its own memory of what it was told, so that one
that is away misses nothing, and the others hear nothing twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from orchestrator.alarms import Severity, Topic, ago

RESOLVED = "resolved"
LISTED = 50
"""Alerts that a message spells out; the others are counted."""
LONGEST = 500
"""Characters of a text: it may hold what a guest, a server or a file calls itself."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]+")


@dataclass(frozen=True, slots=True)
class Notice:
    """An alert, as it is to be told."""

    id: int
    key: str
    severity: Severity
    subject: str
    text: str
    hint: str
    first: datetime
    last: datetime
    count: int
    resolved: datetime | None
    ending: str
    acknowledged: bool = False

    @property
    def state(self) -> str:
        """What there is to say of it: its severity, or that it has passed."""
        return RESOLVED if self.resolved else self.severity.value


def unsaid(notice: Notice, said: str | None, threshold: Severity, target: str) -> bool:
    """Whether `target` is to be told, which was last told `said`. What became worse is told again, what passed only
    if it was told or would have been; what somebody has acknowledged, or what is about the target itself, is not."""
    if notice.key == f"{Topic.NOTIFY_FAILED} target:{target}":
        return False
    if notice.resolved:
        return said is not None and said != RESOLVED if notice.acknowledged else _was_for(notice, said, threshold)
    if notice.acknowledged or notice.severity.rank < threshold.rank:
        return False
    return said is None or said == RESOLVED or notice.severity.rank > Severity(said).rank


def _was_for(notice: Notice, said: str | None, threshold: Severity) -> bool:
    """Raised and passed between two turns, it is told as well: something happened."""
    return said != RESOLVED and (said is not None or notice.severity.rank >= threshold.rank)


def backoff(failures: int) -> float:
    """Seconds until a target that failed so often in a row is tried again: a minute, doubled up to an hour."""
    doublings: int = min(failures - 1, 10)
    return min(60.0 * (1 << doublings), 3600.0)


# --- words -----------------------------------------------------------------------------------------------------------


def plain(text: str, longest: int = LONGEST) -> str:
    """One line without anything that steers: names come from machines, and headers end at a line's end."""
    line = _CONTROL.sub(" ", text).strip()
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


@dataclass(frozen=True, slots=True)
class Message:
    host: str
    """That sends it."""
    time: datetime
    notices: tuple[Notice, ...]
    """Worst first, what has passed last."""

    @staticmethod
    def of(host: str, time: datetime, notices: Sequence[Notice]) -> Message:
        def worst_first(one: Notice) -> tuple[bool, int, int]:
            return bool(one.resolved), -one.severity.rank, one.id

        return Message(host, time, tuple(sorted(notices, key=worst_first)))

    @property
    def summary(self) -> str:
        """`2 critical, 1 recovered: web, db and 1 more`."""
        standing = [one for one in self.notices if not one.resolved]
        counts = [
            f"{count} {severity.value}"
            for severity in reversed(Severity)
            if (count := sum(one.severity is severity for one in standing))
        ]
        passed = len(self.notices) - len(standing)
        counts += [f"{passed} recovered"] if passed else []
        names = list(dict.fromkeys(plain(one.subject, 40) for one in self.notices))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"{', '.join(counts) or 'nothing'}: {', '.join(names[:3])}{more}"

    def body(self) -> str:
        """The text of a mail."""
        lines: list[str] = []
        for one in self.notices[:LISTED]:
            lines += _lines(one)
        if len(self.notices) > LISTED:
            lines += [f"And {len(self.notices) - LISTED} more.", ""]
        lines += ["All of it: stillframe status; stillframe alert list", f"Stillframe on {plain(self.host)}"]
        return "\n".join(lines) + "\n"

    def payload(self) -> dict[str, object]:
        """The body for a webhook. The same alert may come twice: `id` and `state` say that it is the same news."""
        return {
            "type": "stillframe.alerts",
            "version": 1,
            "host": self.host,
            "time": self.time.isoformat(),
            "summary": self.summary,
            "alerts": [_record(one) for one in self.notices[:LISTED]],
            "more": max(0, len(self.notices) - LISTED),
        }


def _lines(one: Notice) -> list[str]:
    times = f", {one.count} times" if one.count > 1 else ""
    since = f"since {one.first.astimezone():%Y-%m-%d %H:%M}{times}"
    if one.resolved:
        after = ago(one.resolved - one.first)
        ending = f": {plain(one.ending)}" if one.ending else ""
        return [f"RECOVERED  {plain(one.subject)}{ending}", f"    after {after}{times}; it was: {plain(one.text)}", ""]
    lines = [f"{one.severity.value.upper()}  {plain(one.subject)}: {plain(one.text)}", f"    {since}"]
    return [*lines, *([f"    try: {plain(one.hint)}"] if one.hint else []), ""]


def _record(one: Notice) -> Mapping[str, object]:
    return {
        "id": one.id,
        "key": plain(one.key),
        "state": one.state,
        "severity": one.severity.value,
        "subject": plain(one.subject),
        "text": plain(one.text),
        "hint": plain(one.hint),
        "first": one.first.isoformat(),
        "last": one.last.isoformat(),
        "count": one.count,
        "resolved": one.resolved.isoformat() if one.resolved else None,
        "ending": plain(one.ending),
    }
