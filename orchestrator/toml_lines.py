"""Where in a TOML text a key stands.

`tomllib` gives values without their lines, and a mistake that is reported without its line is half reported. This is a
finder, not a second parser: the text has been accepted by `tomllib` before, so a simple scan for headers and `key =`
is right wherever people put one key on a line; inside an inline table it answers with the table's line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_DOTTED = rf"{_PART}(?:\s*\.\s*{_PART})*"
_HEADER = re.compile(rf"^\s*\[\[?\s*({_DOTTED})\s*\]\]?\s*(?:#.*)?$")
_ASSIGNMENT = re.compile(rf"^\s*({_DOTTED})\s*=")
_PARTS = re.compile(_PART)


def _split(dotted: str) -> tuple[str, ...]:
    return tuple(part[1:-1] if part[0] in "\"'" else part for part in _PARTS.findall(dotted))


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """Path of each table and key (`("vaults", "main", "url")`) → its first line, counted from 1."""
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = _split(header[1])
            path = table
        elif assignment := _ASSIGNMENT.match(line):
            path = table + _split(assignment[1])
        else:
            continue
        for depth in range(1, len(path) + 1):
            lines.setdefault(path[:depth], number)
    return lines


def line_of(lines: dict[tuple[str, ...], int], path: Sequence[str | int]) -> int:
    """Line of `path`, or of the nearest table around it; 1 if nothing of it is written."""
    words = tuple(str(part) for part in path)
    for depth in range(len(words), 0, -1):
        if words[:depth] in lines:
            return lines[words[:depth]]
    return 1
