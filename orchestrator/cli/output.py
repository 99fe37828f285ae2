"""What the terminal shows, and what a program reads.

Results go to standard output, remarks and progress to standard error, so that a pipe carries results only. For
programs (`--json`): one JSON object a line, each with its `type`; this form is relied on by others. For people: tables
by rich on a terminal, plain columns elsewhere. rich is imported only where there is a terminal: it costs more than
some commands do.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from workers.contract.errors import ErrorInfo

_ANSWERS = ("did you mean", "there are", "say which", "it has", "configured:")
"""Beginnings of hints that are no command to try."""
_COLOURS = {"OK": "\x1b[32m", "WARN": "\x1b[33m", "FAIL": "\x1b[1;31m"}
_PLAIN = "\x1b[0m"
_CONTROL = re.compile(
    # Control characters but tab and newline; what turns the direction of writing around, or cannot be seen.
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_LONGEST = 400
"""Characters of one cell or one line of a message."""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(count: float | None) -> str:
    """`count` bytes in binary units, three or four digits: `1.5 GiB`."""
    if count is None:
        return "–"
    value = float(count)
    for unit in _UNITS:
        if abs(value) < 1024 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"


def printable(text: str) -> str:
    """`text` for a terminal: names come from machines, and must not steer it, nor pass for other names."""
    clean = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    if len(clean) <= _LONGEST:
        return clean
    return "\n".join(line if len(line) <= 10 * _LONGEST else f"{line[:_LONGEST]}…" for line in clean.split("\n"))


def on_one_line(text: str) -> str:
    """The same for a place in a table: no line of it can pass for another row."""
    clean = printable(text).replace("\n", "\N{REPLACEMENT CHARACTER}").replace("\t", " ")
    return clean if len(clean) <= _LONGEST else f"{clean[:_LONGEST]}…"


def moment(time: datetime | str | None) -> str:
    """A moment in local time, to the second: `2026-11-22 02:00:07`."""
    if time is None:
        return "–"
    moment = datetime.fromisoformat(time) if isinstance(time, str) else time
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def is_terminal(stream: TextIO) -> bool:
    """Whether people look at `stream` and escape sequences are understood there."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def coloured(stream: TextIO) -> bool:
    """Whether colours are wanted on `stream` (no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


class Output:
    """Where a command says things. `as_json` and `quiet` as typed."""

    def __init__(self, *, as_json: bool, quiet: bool, verbose: bool) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.verbose = verbose

    def record(self, kind: str, value: Mapping[str, object]) -> None:
        """One JSON line, if JSON was asked for; `value` is plain data."""
        if self.as_json:
            sys.stdout.write(json.dumps({"type": kind, **value}) + "\n")
            sys.stdout.flush()

    def say(self, text: str = "", *, label: str = "") -> None:
        """A result, for people; with a word before it (OK, WARN, FAIL) that is coloured on a terminal."""
        if self.as_json:
            return
        if label:
            colour, plain = (_COLOURS[label], _PLAIN) if coloured(sys.stdout) else ("", "")
            sys.stdout.write(f"{colour}{label:<4}{plain}  ")
        sys.stdout.write(printable(text) + "\n")

    def note(self, text: str) -> None:
        """A remark beside the result; `-q` silences it."""
        if not self.quiet:
            sys.stderr.write(printable(text) + "\n")
            sys.stderr.flush()

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = ()) -> None:
        """A table, for people; columns named in `right` are aligned there."""
        if self.as_json:
            return
        lines = [[on_one_line(cell) for cell in row] for row in rows]
        if is_terminal(sys.stdout):
            _rich_table(self.console(), columns, lines, set(right))
        else:
            sys.stdout.write(_plain_table(columns, lines, set(right)))

    def console(self, *, stderr: bool = False) -> Console:
        """A rich console; it honours NO_COLOR by itself."""
        from rich.console import Console

        return Console(stderr=stderr, highlight=False)

    def error(self, error: ErrorInfo) -> None:
        """An error: what, why, and the next command to type."""
        what, _, why = printable(error.message).partition("\n")
        red, plain = (_COLOURS["FAIL"], _PLAIN) if coloured(sys.stderr) else ("", "")
        lines = [f"{red}error:{plain} {what}", *(f"       {line}" for line in why.splitlines())]
        if hint := on_one_line(error.hint):
            lines.append(f"       {hint}" if hint.startswith(_ANSWERS) else f"  try: {hint}")
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()
        self.record("error", error.model_dump(mode="json"))


def _plain_table(columns: Sequence[str], rows: list[list[str]], right: set[str]) -> str:
    grid = [[column.upper() for column in columns], *rows]
    widths = [max(len(line[place]) for line in grid) for place in range(len(columns))]
    text = ""
    for line in grid:
        cells = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        )
        text += "  ".join(cells).rstrip() + "\n"
    return text


def _rich_table(console: Console, columns: Sequence[str], rows: list[list[str]], right: set[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    console.print(table)


_STYLES = {
    "OK": "green",
    "WARN": "yellow",
    "FAIL": "bold red",
    "succeeded": "green",
    "failed": "bold red",
    "cancelled": "yellow",
    "crash": "yellow",
    "running": "green",
    "damaged": "bold red",
}
