"""Steps: the calls by which a process changes the world, seen from outside the product.

The product knows nothing of this: the interpreter's profiler reports every call of a C function, and the few that
change a hypervisor, a file or the catalog are steps. So the walk also covers the step that somebody adds tomorrow,
without a hook to remember. Calls that only look are no steps: between two of them nothing has changed.
"""

from __future__ import annotations

import _posixsubprocess
import os
import posix
import signal
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import libvirt
import libvirt_qemu

# What is changed, under the names that C code knows. Bound methods (`commit`) are found by name, see `_kind`.
_HYPERVISOR = (
    "virDomainBackupBegin",
    "virDomainAbortJob",
    "virDomainCheckpointCreateXML",
    "virDomainCheckpointDelete",
    "virDomainDefineXML",
    "virDomainUndefineFlags",
    "virDomainCreate",
    "virDomainDestroy",
)
_FILES = ("link", "rename", "replace", "unlink", "remove", "mkdir", "rmdir", "fsync", "fdatasync", "ftruncate")
_CALLS: dict[Any, str] = {
    **{getattr(libvirt.libvirtmod, name): name for name in _HYPERVISOR},
    **{getattr(posix, name): name for name in _FILES},
    libvirt_qemu.libvirtmod_qemu.virDomainQemuAgentCommand: "agent",
    _posixsubprocess.fork_exec: "run",
}
_CHANGES_BY_ITSELF = frozenset({*_HYPERVISOR, "agent", "link", "run", "commit"})
"""After these the world is another one at once; the state after the others is that before the next step."""

_HERE = Path(__file__).resolve().parents[2]
_OURS = tuple(str(_HERE / part) for part in ("orchestrator", "workers"))
_ASKS = ("guest-ping", "guest-info", "guest-sync")

Hook = Callable[[str, int], None]
"""Told each step as (label, how many times it occurred until now)."""


def _kind(function: Any) -> str | None:
    found = _CALLS.get(function)
    if found is None and function.__name__ == "commit" and isinstance(function.__self__, sqlite3.Connection):
        return "commit"
    return found


def _label(kind: str, frame: FrameType) -> str | None:
    """`kind` with what it was about; None for what is not ours."""
    names = frame.f_locals
    if kind == "agent":
        command = str(names["cmd"])
        return None if any(ask in command for ask in _ASKS) else f"agent {command.split('guest-')[1].split(chr(34))[0]}"
    if kind == "run":
        return " ".join(["run", *[str(word) for word in names["args"][:2] if not str(word).startswith("-")]])
    if kind == "commit" and "sqlalchemy" in frame.f_code.co_filename:
        return "commit catalog"
    caller = _caller(frame)
    if caller is None:
        return None
    what = str(caller.f_locals["name"]).split("/")[0] if kind == "link" and "name" in caller.f_locals else ""
    return " ".join(word for word in (kind, caller.f_code.co_name, what) if word)


def _caller(frame: FrameType | None) -> FrameType | None:
    """The nearest of our own functions, if only pathlib, shutil and their like stand between."""
    for _ in range(8):
        if frame is None or "site-packages" in frame.f_code.co_filename:
            return None
        if frame.f_code.co_filename.startswith(_OURS):
            return frame
        frame = frame.f_back
    return None


def watch(hook: Hook) -> None:
    """Call `hook` at every step of this thread and of those that it will start."""
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    def profile(frame: FrameType, event: str, function: Any) -> None:
        if not event.startswith("c_"):
            return
        kind = _kind(function)
        if kind is None or (event != "c_call" and kind not in _CHANGES_BY_ITSELF):
            return
        label = _label(kind, frame)
        if label is None:
            return
        label = f"{'before' if event == 'c_call' else 'after'} {label}"
        with lock:
            counts[label] += 1
            nth = counts[label]
        hook(label, nth)

    threading.setprofile(profile)
    sys.setprofile(profile)


def chosen(steps: list[str], *, last: bool) -> list[tuple[str, int]]:
    """Of the labels that a run reported: each at its first occurrence and, if `last`, at its last: what is done once
    for each disk, file or segment is then died at in the middle of it and at its end."""
    counts = Counter(steps)
    seen: Counter[str] = Counter()
    found = []
    for label in steps:
        seen[label] += 1
        if seen[label] == 1 or (last and seen[label] == counts[label]):
            found.append((label, seen[label]))
    return found


def die() -> None:
    """As after a power cut, as far as this process is concerned: nothing of it is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_soon(seconds: float) -> None:
    """Go on, and die meanwhile: in the middle of a call that takes longer than that."""
    threading.Timer(seconds, die).start()


def stand_still() -> None:
    """All threads, until somebody sends SIGCONT: time for a test to do its worst, without a race."""
    os.kill(os.getpid(), signal.SIGSTOP)
