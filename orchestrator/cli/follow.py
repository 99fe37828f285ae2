"""Watching jobs: live bars on a terminal, a line per change elsewhere, JSON lines for programs, or nothing.

All four are one interface, `Follower.update`, fed with whole views of a job: a follower that misses one misses
nothing, and the same code serves the process that runs the job and one that only looks on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from orchestrator.cli.output import Output, is_terminal, printable, size

if TYPE_CHECKING:
    from rich.progress import TaskID

    from orchestrator.cli.run import Session
    from orchestrator.views import JobView
    from workers.contract.messages import Progress

_OTHERS_EVERY = 0.5
"""Seconds between looks at the jobs that are not the one waited for."""


def limit_words(progress: Progress) -> str:
    """What holds a transfer back: `limited by read`."""
    return f"limited by {progress.bottleneck.value}" if progress.bottleneck else ""


class Follower:
    """Shows nothing; base of those that do."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def update(self, view: JobView) -> None:
        """Show what is new in `view`."""


class LineFollower(Follower):
    """A line on standard error for each change of state, and for each tenth of a disk."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}
        self._tenths: dict[tuple[str, str], int] = {}

    def update(self, view: JobView) -> None:
        now = f"{view.state} (job {view.id})" + (f": {view.waits}" if view.waits else "")
        if self._states.get(view.id) != now:
            self._states[view.id] = now
            _line(f"{view.machine}: {now}")
        for progress in view.progress:
            tenth = 10 * progress.done_bytes // max(1, progress.total_bytes)
            if self._tenths.get((view.id, progress.target), -1) < tenth:
                self._tenths[view.id, progress.target] = tenth
                _line(f"{view.machine}: {disk_line(progress)}")


def disk_line(progress: Progress) -> str:
    """`vda 40 %, read 1.2 GiB, stored 310 MiB, 205 MiB/s, limited by cpu`."""
    percent = 100 * progress.done_bytes // max(1, progress.total_bytes)
    parts = [
        f"{progress.target} {percent} %",
        f"read {size(progress.read_bytes)}",
        f"stored {size(progress.stored_bytes)}",
        f"{size(progress.rate)}/s",
        limit_words(progress),
    ]
    return ", ".join(part for part in parts if part)


def _line(text: str) -> None:
    sys.stderr.write(printable(text) + "\n")
    sys.stderr.flush()


class JsonFollower(Follower):
    """A JSON line of type `progress` for each change."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._last: dict[str, object] = {}

    def update(self, view: JobView) -> None:
        disks = [progress.model_dump(mode="json") for progress in view.progress]
        value = {"job": view.id, "machine": view.machine, "state": view.state, "waits": view.waits, "disks": disks}
        if self._last.get(view.id) != value:
            self._last[view.id] = value
            self._out.record("progress", value)


class LiveFollower(Follower):
    """Bars on the terminal: one line per job, one per disk."""

    def __init__(self, out: Output, *, several: bool) -> None:
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}", style="dim"),
            console=out.console(stderr=True),
            transient=True,
        )
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._several = several

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def _task(self, job: str, target: str, description: str) -> TaskID:
        if (job, target) not in self._tasks:
            self._tasks[job, target] = self._bars.add_task(description, total=None, detail="")
        return self._tasks[job, target]

    def update(self, view: JobView) -> None:
        from rich.markup import escape

        modes = {str(disk["target"]): str(disk.get("mode") or "") for disk in view.disks}
        machine = escape(printable(view.machine))
        head = self._task(view.id, "", f"[bold]{machine}[/]")
        done = sum(progress.done_bytes for progress in view.progress)
        total = sum(progress.total_bytes for progress in view.progress)
        self._bars.update(head, completed=done, total=total or None, detail=_state(view))
        for progress in view.progress:
            owner = f"{machine} " if self._several else ""
            label = f"  {owner}{progress.target} {modes.get(progress.target, '')}".rstrip()
            detail = f"{size(progress.rate)}/s  read {size(progress.read_bytes)}  stored {size(progress.stored_bytes)}"
            self._bars.update(
                self._task(view.id, progress.target, label),
                completed=progress.done_bytes,
                total=progress.total_bytes,
                detail=f"{detail}  {limit_words(progress)}".rstrip(),
            )


def _state(view: JobView) -> str:
    return f"{view.state}: {view.waits}" if view.waits else str(view.state)


def follower(out: Output, *, several: bool = False, json_progress: bool = False) -> Follower:
    """The one that fits where we run. `several` jobs are followed at once; `json_progress`: with `--json`, progress
    is asked for as well."""
    if out.as_json:
        return JsonFollower(out) if json_progress else Follower()
    if out.quiet:
        return Follower()
    return LiveFollower(out, several=several) if is_terminal(sys.stderr) else LineFollower()


def wait_for(session: Session, jobs: Sequence[str], watcher: Follower, *, cancel: bool) -> list[JobView]:
    """Wait until all `jobs` have ended. `cancel`: an interruption cancels them first, and waits until they have
    released what they held, so that nothing is left behind; a second interruption does not wait."""
    try:
        with watcher:
            return _wait(session, jobs, watcher)
    except KeyboardInterrupt:
        if cancel:
            _cancel(session, jobs)
        raise


def _wait(session: Session, jobs: Sequence[str], watcher: Follower) -> list[JobView]:
    service = session.service
    ended: list[JobView] = []
    for place, job in enumerate(jobs):
        others = jobs[place + 1 :]
        looked = 0.0

        def look(view: JobView, others: Sequence[str] = others) -> None:
            nonlocal looked
            watcher.update(view)
            if others and time.monotonic() - looked > _OTHERS_EVERY:
                looked = time.monotonic()
                for other in others:
                    watcher.update(service.job(other))

        view = service.wait(job, on_progress=look)
        watcher.update(view)
        ended.append(view)
    return ended


def _cancel(session: Session, jobs: Sequence[str]) -> None:
    from orchestrator.jobs.states import TERMINAL

    service = session.service
    running = [job for job in jobs if service.job(job).state not in TERMINAL]
    if running:
        session.out.note("interrupted: the job is being cancelled (once more to leave at once)")
    for job in running:
        service.cancel(job)
    for job in running:
        service.wait(job)
