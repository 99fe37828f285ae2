"""What `vault verify` and `point verify` share: levels from flags, progress, and how findings are shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from orchestrator.cli.output import is_terminal
from orchestrator.cli.run import FAILED, OK, Session

if TYPE_CHECKING:
    from workers.vault.verify import Finding, Level, VerifyReport


class At(Protocol):
    """Where a long piece of work is."""

    @property
    def stage(self) -> str: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...


Advance = Callable[[At], None]

_WORDS = {
    "ids": "every block is in the index",
    "packs": "every pack is what was written",
    "sample": "every block is in the index, and a sample of them was read and hashed",
    "full": "every block was read, decrypted and hashed",
}


def level_of(*, ids: bool, packs: bool, sample: bool, full: bool, default: str) -> Level:
    """The level that was asked for. Raises UsageError if there are two."""
    from workers.contract.errors import UsageError
    from workers.vault.verify import Level

    asked = {"ids": ids, "packs": packs, "sample": sample, "full": full}
    chosen = [name for name, wanted in asked.items() if wanted]
    if len(chosen) > 1:
        raise UsageError(f"--{' and --'.join(chosen)} exclude each other")
    return Level(chosen[0] if chosen else default)


@contextmanager
def advancing(session: Session, what: str) -> Iterator[Advance]:
    """A bar while something is checked, where somebody looks."""
    out = session.out
    if out.quiet or out.as_json or not is_terminal(sys.stderr):
        yield lambda _: None
        return
    from rich.progress import Progress as Bars

    with Bars(console=out.console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda at: bars.update(task, completed=at.done, total=at.total, description=f"{what}: {at.stage}")


def show_report(session: Session, what: str, level: Level, report: VerifyReport) -> int:
    """Show what a verification found; its exit code."""
    out = session.out
    code = FAILED if report.findings else OK
    out.record("verify", {**report.model_dump(mode="json"), "what": what, "level": level.value, "ok": code == OK})
    for finding in report.findings:
        out.say(f"{what}: {finding.object}: {finding.problem}{needed_by(finding)}")
    if report.repaired:
        out.say(f"{what}: {report.repaired} packs that were damaged are whole again")
    if code == OK:
        out.say(f"{what}: {_WORDS[level.value]}")
    else:
        out.note("stillframe vault repair takes good copies from mirrors and replicas, if there are any")
    return code


def needed_by(finding: Finding) -> str:
    hit = [f"{one.point[:8]} ({one.machine} {one.target})" for one in finding.affected]
    more = f" and {len(hit) - 5} more" if len(hit) > 5 else ""
    return f"; needed by {', '.join(hit[:5])}{more}" if hit else ""
