"""The freeze governor's side on the host: quiesce, freeze, one point, thaw, resume, in every case.

A guest that stays frozen is worse than no backup. Four independent things end a freeze: the `finally` here; a timer of
this process, should the one call in between hang; a guard beside this process, should it be killed; and the watchdog in
the guest, armed before, should the host or the way to the guest be gone. Where an extension is there but no watchdog
could be armed, nothing is frozen.

Two notes on the hypervisor's host tell whoever cleans up after a crash what may have been begun: `held` (the extension
was asked to quiesce, its resume is not confirmed) and `frozen` (a freeze was sent, its thaw is not confirmed).
"""

from __future__ import annotations

import base64
import binascii
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from workers.contract.errors import GuestError, StillframeError
from workers.contract.guests import GuestOs, GuestReport, Quiesced, Resumed, printable
from workers.contract.points import Consistency
from workers.contract.seams import Extension, GuestChannel, QuiesceRequest
from workers.guests.guard import guarded
from workers.verdict import Facts, Verdict, judge, warnings

THAW_TRIES = 3
SCRIPTS_SECONDS = 120
"""For all pre scripts together."""
POINT_SECONDS = 20.0
"""From the freeze's reply to the point, where the guest knows no shorter limit."""
WATCHDOG_SECONDS = 90
"""Freeze 30 + point 20 + thaw 3 × 10 + 10: later than anything that a living host does."""
UNFREEZE_SECONDS = 10.0
"""How long a freeze of somebody else is waited for before it is ended."""


@dataclass(frozen=True, slots=True)
class Guest:
    """What a snapshot may do with the guest of its machine."""

    freezer: GuestChannel | None = None
    why_no_freezer: str = "no guest agent answers: install and start qemu-guest-agent in the guest"
    extension: Extension | None = None
    why_no_extension: str = "the extension is not used"
    thaw_command: Sequence[str] = ()
    """Program for the guard; see `guests/guard.py`."""
    os: GuestOs = GuestOs.OTHER
    point_seconds: float = POINT_SECONDS
    """How long the freeze is good for, from its reply on; then it is ended, and the point is `crash`."""
    failed_writers: Callable[[str], list[str] | None] = lambda _text: None
    """Windows: names of the VSS writers that failed, from what `vssadmin list writers` printed; None: unreadable."""


class Note(Protocol):
    """A mark that outlives this process: a file here or on the hypervisor's host."""

    def touch(self) -> None: ...

    def exists(self) -> bool: ...

    def unlink(self, missing_ok: bool = ...) -> None: ...


@dataclass(frozen=True, slots=True)
class Notes:
    """See the module."""

    frozen: Note
    held: Note


@dataclass(frozen=True, slots=True)
class Held:
    """What making one point of a guest came to."""

    verdict: Verdict
    frozen_ms: int | None
    report: GuestReport


def make_point(guest: Guest, request: QuiesceRequest, make: Callable[[], None], notes: Notes) -> Held:
    """Call `make` once, with the guest as quiet as it can be made. Raises what `make` raises, after the thaw and the
    resume; GuestError if the guest may still be frozen."""
    facts = _quiesced(guest, request, notes)
    frozen_ms = None
    try:
        if facts.not_frozen:
            make()
        else:
            assert guest.freezer is not None
            with guarded(guest.thaw_command):
                facts, frozen_ms = _frozen(guest.freezer, guest.point_seconds, facts, make, notes.frozen)
    finally:
        if guest.extension is not None and notes.held.exists():
            facts = _resumed(guest, guest.extension, request.job, facts, notes)
    return Held(judge(facts), frozen_ms, _report(facts))


def _quiesced(guest: Guest, request: QuiesceRequest, notes: Notes) -> Facts:
    facts = Facts(request.goal, guest.os, not_quiesced=guest.why_no_extension)
    if request.goal is Consistency.CRASH:
        return replace(facts, not_frozen="crash consistency was asked for")
    if guest.freezer is None:
        return replace(facts, not_frozen=guest.why_no_freezer)
    if guest.extension is None:
        return facts
    notes.held.touch()
    try:
        quiesced = guest.extension.quiesce(request)
    except StillframeError as error:
        why = f"the extension could not prepare the guest: {error}"
        return replace(facts, not_frozen=why, not_quiesced=why)
    if not quiesced.watchdog:
        why = f"no watchdog could be armed in the guest ({quiesced.watchdog_detail or 'no reason given'})"
        return replace(facts, quiesced=quiesced, not_quiesced="", not_frozen=f"{why}, so it was not frozen")
    if quiesced.partial and not quiesced.mounts:  # to freeze none of them would be to freeze all
        why = "no file system of the selected disks can be frozen"
        return replace(facts, quiesced=quiesced, not_quiesced="", not_frozen=why)
    return replace(facts, quiesced=quiesced, not_quiesced="")


def _frozen(
    freezer: GuestChannel, seconds: float, facts: Facts, make: Callable[[], None], note: Note
) -> tuple[Facts, int | None]:
    """Freeze, make the point, thaw."""
    mounts = facts.quiesced.mounts if facts.quiesced and facts.quiesced.partial else []
    note.touch()
    try:
        frozen = freezer.freeze(mounts)
    except GuestError as error:
        thaw(freezer, note)  # the freeze may have landed all the same
        make()
        return replace(facts, freeze_error=str(error)), None
    since = time.monotonic()
    deadline = _Deadline(freezer, seconds)
    try:
        make()
    finally:
        made = time.monotonic() - since
        deadline.end()
        thawed, trouble = thaw(freezer, note)
        frozen_ms = round((time.monotonic() - since) * 1000)
    late = f"the point was made {made:.1f} s after the freeze, more than {seconds:.0f} s" if made > seconds else ""
    return replace(facts, frozen=frozen, thawed=thawed, thaw_error=trouble, late=late), frozen_ms


class _Deadline:
    """Thaws from a thread of its own if the call in between hangs."""

    def __init__(self, freezer: GuestChannel, seconds: float) -> None:
        self._freezer = freezer
        self._timer = threading.Timer(seconds, self._passed)
        self._timer.daemon = True
        self._timer.start()

    def _passed(self) -> None:
        with suppress(StillframeError):  # the thaw in `finally` and the watchdog in the guest remain
            self._freezer.thaw()

    def end(self) -> None:
        self._timer.cancel()
        self._timer.join()


def thaw(freezer: GuestChannel, note: Note) -> tuple[int, str]:
    """Thaw until confirmed, and only then remove `note`; how many file systems were thawed, and what went wrong on the
    way (VSS tells only now that it had let go). Raises GuestError if the guest may still be frozen.

    No patience with an agent that is away: libvirt 9 never connects to one again that comes back while a backup runs
    (measured). So give up, that the backup may be ended; the guard and the rescue task thaw then."""
    thawed, trouble = 0, ""
    for attempt in range(1, THAW_TRIES + 1):
        try:
            thawed += freezer.thaw()
        except GuestError as error:
            trouble = trouble or str(error)
        try:
            if not freezer.frozen():
                note.unlink(missing_ok=True)
                return thawed, trouble
        except GuestError:
            if attempt == THAW_TRIES:
                raise
    raise GuestError("the guest still says that it is frozen after a thaw" + (f": {trouble}" if trouble else ""))


def unfrozen(freezer: GuestChannel, *, patience: float = UNFREEZE_SECONDS) -> str:
    """See that nobody's freeze is in the way: an agent that is frozen, or was thawed behind its back by the watchdog,
    runs no command. Waits for the freeze of somebody who works; ends one that lasts, and says so."""
    end = time.monotonic() + patience
    while freezer.frozen():
        if time.monotonic() > end:
            freezer.thaw()
            return "the guest was found frozen, and has been thawed"
        time.sleep(0.2)
    return ""


def _resumed(guest: Guest, extension: Extension, job: str, facts: Facts, notes: Notes) -> Facts:
    try:
        resumed = extension.resume(job)
    except StillframeError as error:
        return replace(facts, resume_error=str(error))
    notes.held.unlink(missing_ok=True)
    failed = guest.failed_writers(decoded(resumed.writers)) if guest.os is GuestOs.WINDOWS else None
    return replace(facts, resumed=resumed, failed_writers=failed)


def _report(facts: Facts) -> GuestReport:
    quiesced, resumed = facts.quiesced or Quiesced(watchdog=False), facts.resumed or Resumed(watchdog="absent")
    return GuestReport(
        scripts=[run for run in [*quiesced.scripts, *resumed.scripts] if run.outcome != "not_applicable"],
        records={name: decoded(data) for name, data in resumed.records.items()},
        log=printable(decoded(resumed.log)),
        warnings=warnings(facts),
    )


def decoded(data: str) -> str:
    """Text from base64 that a guest sent; what is no base64 is no text."""
    try:
        return base64.b64decode(data, validate=True).decode(errors="replace")
    except (binascii.Error, ValueError):
        return ""
