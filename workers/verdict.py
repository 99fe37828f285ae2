"""What a point is worth, from what was measured (invariant 7; `extensions/CONTRACT.md` section 6).

Pure: facts in, verdict and reason out, so that every combination is a line of a test. Any doubt lowers the verdict; the
reason names the first doubt, in words for people.
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.contract.guests import GuestOs, Quiesced, Resumed, ScriptOutcome, ScriptRun
from workers.contract.points import Consistency


@dataclass(frozen=True, slots=True)
class Verdict:
    consistency: Consistency
    reason: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What happened between the decision to make a point and its end."""

    goal: Consistency
    os: GuestOs = GuestOs.OTHER
    not_frozen: str = ""
    """Why no freeze was sent; empty: one was."""
    freeze_error: str = ""
    frozen: int = 0
    thawed: int = 0
    thaw_error: str = ""
    late: str = ""
    """The host's deadline passed before the point was made."""
    not_quiesced: str = ""
    """Why the extension took no part; empty: it did."""
    quiesced: Quiesced | None = None
    resumed: Resumed | None = None
    """None: the extension did not answer any more, and why is in `resume_error`."""
    resume_error: str = ""
    failed_writers: list[str] | None = None
    """Windows: writers that are not stable; None: nothing that proves any."""


def judge(facts: Facts) -> Verdict:
    broken = _broken(facts)
    if broken:
        return Verdict(Consistency.CRASH, broken)
    counted = f"{facts.frozen} file system{'s' if facts.frozen != 1 else ''} frozen and thawed"
    if facts.goal is not Consistency.APPLICATION:
        return Verdict(Consistency.FILESYSTEM, counted)
    doubt = _application_doubt(facts)
    if doubt:
        return Verdict(Consistency.FILESYSTEM, f"{counted}; not application: {doubt}")
    return Verdict(Consistency.APPLICATION, f"{_prepared(facts)}; {counted}")


def _broken(facts: Facts) -> str:
    """Why the freeze is not proven; empty: it is."""
    if facts.not_frozen:
        return facts.not_frozen
    if facts.freeze_error:
        return f"the guest could not be frozen: {facts.freeze_error}"
    if facts.frozen == 0:
        return "the guest froze no file system"
    if facts.late:
        return facts.late
    if facts.resumed is not None and facts.resumed.watchdog == "fired":
        return "the watchdog in the guest ended the freeze: it had reached its deadline"
    if facts.thawed != facts.frozen:
        why = f" ({facts.thaw_error})" if facts.thaw_error else ""
        return f"the freeze was broken meanwhile: {facts.frozen} file systems frozen, {facts.thawed} thawed{why}"
    return ""


def _application_doubt(facts: Facts) -> str:
    if facts.quiesced is None:
        return facts.not_quiesced or "the extension took no part"
    if facts.resumed is None:
        return f"the extension did not answer after the thaw: {facts.resume_error}"
    if facts.os is GuestOs.WINDOWS:
        return _vss_doubt(facts)
    failed = [run for run in facts.quiesced.scripts if run.phase == "pre" and not _fine(run)]
    if failed:
        return "; ".join(described(run) for run in failed)
    if not _applied(facts.quiesced):
        return "no application that has a script was found in the guest"
    if facts.resumed.holders_lost:
        lost = ", ".join(facts.resumed.holders_lost)
        return f"{lost} no longer held its application when the guest was thawed"
    if facts.resumed.watchdog != "silent":
        return "the watchdog in the guest was gone before the thaw"
    return ""


def _vss_doubt(facts: Facts) -> str:
    if facts.failed_writers is None:
        return "the states of the VSS writers could not be read"
    if facts.failed_writers:
        return f"VSS writers failed: {', '.join(facts.failed_writers)}"
    return ""


def _fine(run: ScriptRun) -> bool:
    return run.outcome in (ScriptOutcome.OK, ScriptOutcome.NOT_APPLICABLE)


def _applied(quiesced: Quiesced) -> list[str]:
    return [run.name for run in quiesced.scripts if run.phase == "pre" and run.outcome is ScriptOutcome.OK]


def _prepared(facts: Facts) -> str:
    if facts.os is GuestOs.WINDOWS:
        return "all VSS writers are stable"
    assert facts.quiesced is not None
    return f"prepared by {', '.join(_applied(facts.quiesced))}"


_WORDS = {
    ScriptOutcome.OK: "done",
    ScriptOutcome.FAILED: "failed",
    ScriptOutcome.TIMEOUT: "took too long and was killed",
    ScriptOutcome.NOT_APPLICABLE: "not needed",
    ScriptOutcome.REFUSED: "was not run",
    ScriptOutcome.SKIPPED: "was not run",
}


def described(run: ScriptRun) -> str:
    """`50-postgresql pre failed (exit code 1: no such role)`."""
    code = f"exit code {run.code}" if run.outcome is ScriptOutcome.FAILED else ""
    why = ": ".join(part for part in (code, run.detail.strip()) if part)
    return f"{run.name} {run.phase} {_WORDS[run.outcome]}" + (f" ({why})" if why else "")


def warnings(facts: Facts) -> list[str]:
    """What somebody should look at, whatever the verdict."""
    found = list(facts.quiesced.notes) if facts.quiesced else []
    if facts.resumed is not None:
        found += [described(run) for run in facts.resumed.scripts if not _fine(run)]
        found += facts.resumed.notes
    elif facts.quiesced is not None:
        found.append(
            f"the extension did not answer after the thaw ({facts.resume_error}); its watchdog resumes the guest"
        )
    return found
