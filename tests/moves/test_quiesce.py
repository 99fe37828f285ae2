"""A frozen guest is always thawed, a held one always resumed, in the right order, whatever fails.

The guest and its extension here are models: a handful of file systems, and a list of what was called. The real ones are
held to the same seams in `tests/contracts/` and `tests/extension/`.
"""

from __future__ import annotations

import base64
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from workers import quiesce
from workers.contract.errors import GuestError, HypervisorError
from workers.contract.guests import GuestInfo, GuestOs, Quiesced, Ran, Resumed, ScriptOutcome, ScriptRun, Status
from workers.contract.points import Consistency
from workers.contract.seams import Package, QuiesceRequest
from workers.quiesce import Guest, Held, Notes, make_point

POSTGRES = ScriptRun(name="50-postgresql", phase="pre", outcome=ScriptOutcome.OK)


class ModelGuest:
    """Three file systems. `trouble` maps a call to what goes wrong with it, once each."""

    def __init__(self, file_systems: int = 3, **trouble: str) -> None:
        self.file_systems = file_systems
        self.is_frozen = False
        self.trouble = trouble
        self.calls: list[str] = []
        self.notes: Notes | None = None

    def _goes_wrong(self, call: str) -> str:
        self.calls.append(call)
        return self.trouble.pop(call, "")

    def info(self) -> GuestInfo:
        return GuestInfo(os=GuestOs.LINUX)

    def ping(self) -> bool:
        return True

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float) -> Ran:
        raise GuestError(f"nothing is run here: {argv} {stdin!r} {timeout}")

    def put_file(self, path: str, data: bytes) -> None:
        raise GuestError(f"{path} {data!r}")

    def get_file(self, path: str, *, limit: int) -> bytes:
        raise GuestError(f"{path} {limit}")

    def close(self) -> None:
        pass

    def freeze(self, mounts: Sequence[str] = ()) -> int:
        assert self.notes is not None
        assert self.notes.frozen.exists(), "noted before it is done"
        wrong = self._goes_wrong("freeze")
        self.is_frozen = wrong != "refused"
        if wrong:
            raise GuestError(wrong)
        return len(mounts) or self.file_systems

    def thaw(self) -> int:
        if self._goes_wrong("thaw") == "lost":
            raise GuestError("no reply")
        thawed = self.file_systems if self.is_frozen else 0
        self.is_frozen = "stuck" in self.trouble and self.is_frozen
        if "vss" in self.trouble:
            raise GuestError(self.trouble["vss"])
        return thawed

    def frozen(self) -> bool:
        return self.is_frozen


class ModelExtension:
    """Answers as it is told; notes that nothing is asked of it while its guest is frozen."""

    def __init__(
        self,
        guest: ModelGuest,
        quiesced: Quiesced | GuestError,
        resumed: Resumed | GuestError,
        after_quiesce: Callable[[], None] = lambda: None,
    ) -> None:
        self._guest, self._quiesced, self._resumed, self._after = guest, quiesced, resumed, after_quiesce
        self.request: QuiesceRequest | None = None

    def quiesce(self, request: QuiesceRequest) -> Quiesced:
        assert self._guest.notes is not None
        assert self._guest.notes.held.exists(), "noted before it is done"
        self._guest.calls.append("quiesce")
        self.request = request
        if isinstance(self._quiesced, GuestError):
            raise self._quiesced
        self._after()
        return self._quiesced

    def resume(self, job: str) -> Resumed:
        assert not self._guest.is_frozen, "a frozen agent runs nothing"
        self._guest.calls.append(f"resume {job}")
        if isinstance(self._resumed, GuestError):
            raise self._resumed
        return self._resumed

    def status(self, uuid: str) -> Status | None:
        raise GuestError(uuid)

    def install(self, package: Package, uuid: str) -> Status:
        raise GuestError(f"{package} {uuid}")

    def uninstall(self) -> bool:
        raise GuestError("no")


REQUEST = QuiesceRequest(job="j1", uuid="u1", goal=Consistency.APPLICATION, freeze_s=90, limit_s=120)
READY = Quiesced(watchdog=True, scripts=[POSTGRES], mounts=["/data"])
SILENT = Resumed(watchdog="silent")


def run(
    guest: ModelGuest,
    place: Path,
    *,
    extension: ModelExtension | None = None,
    make: Callable[[], None] | None = None,
    goal: Consistency = Consistency.APPLICATION,
    os: GuestOs = GuestOs.LINUX,
    point_seconds: float = quiesce.POINT_SECONDS,
    failed_writers: Callable[[str], list[str] | None] = lambda _text: None,
) -> Held:
    guest.notes = Notes(place / "frozen", place / "held")

    def point() -> None:
        guest.calls.append("point frozen" if guest.is_frozen else "point")
        if make:
            make()

    way = Guest(freezer=guest, extension=extension, os=os, point_seconds=point_seconds, failed_writers=failed_writers)
    try:
        return make_point(way, replace(REQUEST, goal=goal), point, guest.notes)
    finally:
        assert guest.notes.frozen.exists() is guest.is_frozen, "the note goes with the confirmed thaw"


def test_the_order_of_things(tmp_path: Path) -> None:
    guest = ModelGuest()
    held = run(guest, tmp_path, extension=ModelExtension(guest, READY, SILENT))
    assert guest.calls == ["quiesce", "freeze", "point frozen", "thaw", "resume j1"]
    assert held.verdict.consistency is Consistency.APPLICATION
    assert held.frozen_ms is not None
    assert not (tmp_path / "held").exists()


def test_without_the_extension_it_is_filesystem_and_says_why(tmp_path: Path) -> None:
    held = run(ModelGuest(), tmp_path)
    assert held.verdict.consistency is Consistency.FILESYSTEM
    assert "the extension is not used" in held.verdict.reason


def test_only_the_selected_file_systems_are_frozen(tmp_path: Path) -> None:
    guest = ModelGuest(file_systems=1)
    partial = READY.model_copy(update={"partial": True})
    held = run(guest, tmp_path, extension=ModelExtension(guest, partial, SILENT))
    assert "1 file system frozen" in held.verdict.reason


def test_where_nothing_of_the_selected_disks_can_be_frozen_nothing_is(tmp_path: Path) -> None:
    guest = ModelGuest()
    none = READY.model_copy(update={"partial": True, "mounts": []})
    held = run(guest, tmp_path, extension=ModelExtension(guest, none, SILENT))
    assert (held.verdict.consistency, "freeze" in guest.calls) == (Consistency.CRASH, False)


def test_no_watchdog_no_freeze(tmp_path: Path) -> None:
    guest = ModelGuest()
    bare = Quiesced(watchdog=False, watchdog_detail="neither sysrq nor fsfreeze", scripts=[POSTGRES])
    held = run(guest, tmp_path, extension=ModelExtension(guest, bare, SILENT))
    assert guest.calls == ["quiesce", "point", "resume j1"]
    assert held.verdict.consistency is Consistency.CRASH
    assert "neither sysrq nor fsfreeze" in held.verdict.reason


def test_a_quiesce_that_fails_is_resumed_and_nothing_is_frozen(tmp_path: Path) -> None:
    guest = ModelGuest()
    held = run(guest, tmp_path, extension=ModelExtension(guest, GuestError("it hung"), SILENT))
    assert guest.calls == ["quiesce", "point", "resume j1"]
    assert (held.verdict.consistency, "it hung" in held.verdict.reason) == (Consistency.CRASH, True)


def test_a_resume_that_fails_keeps_its_note_and_warns(tmp_path: Path) -> None:
    guest = ModelGuest()
    held = run(guest, tmp_path, extension=ModelExtension(guest, READY, GuestError("gone")))
    assert held.verdict.consistency is Consistency.FILESYSTEM
    assert (tmp_path / "held").exists()
    assert any("gone" in warning for warning in held.report.warnings)


def test_records_log_and_scripts_are_reported(tmp_path: Path) -> None:
    guest = ModelGuest()
    said = {"50-postgresql/backup_label": base64.b64encode(b"START WAL").decode(), "bad": "%%%"}
    resumed = Resumed(watchdog="silent", records=said, log=base64.b64encode(b"done\xff").decode())
    report = run(guest, tmp_path, extension=ModelExtension(guest, READY, resumed)).report
    assert report.records == {"50-postgresql/backup_label": "START WAL", "bad": ""}
    assert report.log.startswith("done")
    assert report.scripts == [POSTGRES]


def test_a_freeze_that_somebody_broke_is_crash(tmp_path: Path) -> None:
    guest = ModelGuest()
    held = run(guest, tmp_path, make=lambda: setattr(guest, "is_frozen", False))
    assert held.verdict.consistency is Consistency.CRASH
    assert "3 file systems frozen, 0 thawed" in held.verdict.reason


@pytest.mark.parametrize("trouble", ["refused", "timed out, but it landed"])
def test_a_freeze_that_fails_is_crash_and_thawed(trouble: str, tmp_path: Path) -> None:
    guest = ModelGuest(freeze=trouble)
    held = run(guest, tmp_path, extension=ModelExtension(guest, READY, SILENT))
    assert guest.calls == ["quiesce", "freeze", "thaw", "point", "resume j1"]
    assert (held.verdict.consistency, held.frozen_ms) == (Consistency.CRASH, None)
    assert trouble in held.verdict.reason


def test_a_point_that_fails_thaws_and_resumes_all_the_same(tmp_path: Path) -> None:
    guest = ModelGuest()

    def fail() -> None:
        raise HypervisorError("no")

    with pytest.raises(HypervisorError):
        run(guest, tmp_path, extension=ModelExtension(guest, READY, SILENT), make=fail)
    assert guest.calls == ["quiesce", "freeze", "point frozen", "thaw", "resume j1"]
    assert not guest.is_frozen


def test_a_lost_reply_to_the_thaw_is_asked_again(tmp_path: Path) -> None:
    guest = ModelGuest(thaw="lost")
    assert run(guest, tmp_path).verdict.consistency is Consistency.FILESYSTEM
    assert not guest.is_frozen


def test_nothing_is_frozen_where_that_is_not_wanted(tmp_path: Path) -> None:
    guest = ModelGuest()
    held = run(guest, tmp_path, goal=Consistency.CRASH, extension=ModelExtension(guest, READY, SILENT))
    assert (guest.calls, held.verdict.consistency, held.frozen_ms) == (["point"], Consistency.CRASH, None)


def test_a_call_that_hangs_is_thawed_by_the_timer(tmp_path: Path) -> None:
    guest = ModelGuest()
    done = threading.Event()

    def hang() -> None:
        deadline = time.monotonic() + 20
        while guest.is_frozen:
            assert time.monotonic() < deadline, "nobody thawed the guest"
            done.wait(0.01)

    held = run(guest, tmp_path, make=hang, point_seconds=0.05)
    assert (held.verdict.consistency, "more than" in held.verdict.reason) == (Consistency.CRASH, True)


def test_vss_that_let_go_is_told_at_the_thaw(tmp_path: Path) -> None:
    guest = ModelGuest(vss="couldn't hold writes: timed out")
    held = run(guest, tmp_path, os=GuestOs.WINDOWS, extension=ModelExtension(guest, READY, SILENT))
    assert (held.verdict.consistency, "timed out" in held.verdict.reason) == (Consistency.CRASH, True)
    assert not guest.is_frozen


def test_the_writers_of_windows_are_judged(tmp_path: Path) -> None:
    def failed(text: str) -> list[str] | None:
        return ["SqlServerWriter"] if "[8]" in text else []

    def verdict(text: bytes) -> Consistency:
        guest = ModelGuest()
        resumed = Resumed(watchdog="silent", writers=base64.b64encode(text).decode())
        extension = ModelExtension(guest, READY, resumed)
        return run(guest, tmp_path, os=GuestOs.WINDOWS, extension=extension, failed_writers=failed).verdict.consistency

    assert verdict(b"State: [1]") is Consistency.APPLICATION
    assert verdict(b"State: [8]") is Consistency.FILESYSTEM


def test_a_guest_that_stays_silent_after_the_freeze_keeps_its_note(tmp_path: Path) -> None:
    guest = ModelGuest(stuck="an agent that has lost its way")
    note = tmp_path / "frozen"
    note.touch()
    guest.is_frozen = True
    with pytest.raises(GuestError, match="still says that it is frozen"):
        quiesce.thaw(guest, note)
    assert note.exists()


def test_a_freeze_found_in_the_way_is_waited_for_and_then_ended() -> None:
    guest = ModelGuest()
    assert quiesce.unfrozen(guest) == ""
    guest.is_frozen = True
    assert "found frozen" in quiesce.unfrozen(guest, patience=0.1)
    assert not guest.is_frozen
    guest.is_frozen = True
    threading.Timer(0.3, setattr, (guest, "is_frozen", False)).start()
    assert quiesce.unfrozen(guest, patience=30.0) == ""


GUARDED = """
import os, signal, sys
from workers.guests.guard import guarded
with guarded(["touch", sys.argv[1]]):
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "fail":
        raise SystemExit("failed")
"""


@pytest.mark.parametrize(("how", "thawed"), [("kill", True), ("fail", True), ("end well", False)])
def test_a_guard_thaws_for_a_process_that_dies(how: str, thawed: bool, tmp_path: Path) -> None:
    mark = tmp_path / "thawed"
    subprocess.run([sys.executable, "-c", GUARDED, str(mark), how], check=False, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while guards(mark):
        assert time.monotonic() < deadline, "the guard does not end"
        time.sleep(0.01)
    assert mark.exists() is thawed


def guards(mark: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            line = process.read_bytes()
            if b"stillframe-thaw-guard" in line and str(mark).encode() in line:
                found.append(process.parent.name)
    return found
