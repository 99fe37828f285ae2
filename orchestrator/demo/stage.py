"""What the demo shows: steps with the command that would do the same, results, a table; or JSON lines.

Everything for people goes through one rich console that records it, so that the picture in the README is what a real
run printed and nothing else.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orchestrator.cli.follow import Follower, JsonFollower, follower
from orchestrator.cli.output import Output, duration, size
from orchestrator.views import PointView

WIDTH = 120


class Stage:
    def __init__(self, *, as_json: bool) -> None:
        self._out = Output(as_json=as_json, quiet=False, verbose=False)
        self._console = Console(file=StringIO() if as_json else None, record=True, highlight=False)
        if not self._console.is_terminal:
            self._console = Console(file=self._console.file, record=True, highlight=False, width=WIDTH)
        self._begun = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the demo began."""
        return time.monotonic() - self._begun

    def follower(self) -> Follower:
        """Shows the progress of jobs: bars on a terminal, else lines."""
        return JsonFollower(self._out) if self._out.as_json else follower(self._out)

    def say(self, text: str = "") -> None:
        self._console.print(text)

    def command(self, text: str, remark: str = "") -> None:
        """A command to copy: never broken into lines."""
        self._console.print(f"  {text}" + (f"   [dim]# {remark}[/]" if remark else ""), soft_wrap=True)

    def record(self, kind: str, value: dict[str, object]) -> None:
        """A JSON line, if JSON was asked for."""
        self._out.record(kind, value)

    @contextmanager
    def step(self, title: str, command: str = "") -> Iterator[list[str]]:
        """A step of the story, with the command that does the same. The body puts its results into the list."""
        begun = time.monotonic()
        results: list[str] = []
        self.say(f"\n[bold cyan]▸ {escape(title)}[/]")
        if command:
            self.say(f"  [dim]$ {escape(command)}[/]")
        yield results
        seconds = time.monotonic() - begun
        for result in results[:-1]:
            self.say(f"  [green]✓[/] {escape(result)}")
        for result in results[-1:]:
            self.say(f"  [green]✓[/] {escape(result)}  [dim]{duration(seconds)}[/]")
        self.record("step", {"title": title, "command": command, "results": results, "seconds": round(seconds, 3)})

    def points(self, points: Sequence[PointView]) -> None:
        """The table of points, one line per disk."""
        table = Table(title="Recovery points", title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in ("point", "consistency", "frozen"):
            table.add_column(column)
        table.add_column("disk", style="bold")
        table.add_column("mode")
        for column in ("size", "read", "new", "stored"):
            table.add_column(column, justify="right")
        for point in points:
            frozen = f"{point.frozen_ms} ms" if point.frozen_ms is not None else "–"
            head = (point.id[:8], point.consistency.value, frozen)
            for disk in point.disks:
                sizes = (disk.capacity, disk.read_bytes, disk.new_bytes, disk.stored_bytes)
                table.add_row(*head, disk.target, disk.mode.value, *(size(count) for count in sizes))
                head = ("", "", "")
            self.record("point", point.model_dump(mode="json"))
        self.say()
        self._console.print(table)

    def save_svg(self, path: Path) -> None:
        """Draw all that was printed into `path`."""
        drawn = self._console.export_svg(title="./deploy/quickstart")
        # rich names a font on somebody's server: a picture in a README has to do without.
        path.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL))
