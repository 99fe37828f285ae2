"""What a point is worth follows from what was measured (invariant 7): every doubt lowers it, and says so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from workers.contract.guests import GuestOs, Quiesced, Resumed, ScriptOutcome, ScriptRun
from workers.contract.points import Consistency
from workers.verdict import Facts, judge, warnings

POSTGRES = ScriptRun(name="50-postgresql", phase="pre", outcome=ScriptOutcome.OK)
MYSQL = ScriptRun(name="50-mysql", phase="pre", outcome=ScriptOutcome.NOT_APPLICABLE, code=3)
BEST = Facts(
    goal=Consistency.APPLICATION,
    os=GuestOs.LINUX,
    frozen=3,
    thawed=3,
    quiesced=Quiesced(watchdog=True, scripts=[POSTGRES, MYSQL]),
    resumed=Resumed(watchdog="silent"),
)


def with_scripts(*runs: ScriptRun) -> Facts:
    return replace(BEST, quiesced=Quiesced(watchdog=True, scripts=list(runs)))


def test_all_is_proven() -> None:
    verdict = judge(BEST)
    assert verdict.consistency is Consistency.APPLICATION
    assert "50-postgresql" in verdict.reason
    assert "3 file systems" in verdict.reason
    assert warnings(BEST) == []


def failed(outcome: ScriptOutcome) -> ScriptRun:
    return POSTGRES.model_copy(update={"outcome": outcome, "code": 1, "detail": "no such role"})


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (with_scripts(POSTGRES, failed(ScriptOutcome.FAILED)), "exit code 1: no such role"),
        (with_scripts(failed(ScriptOutcome.TIMEOUT)), "took too long"),
        (with_scripts(POSTGRES, failed(ScriptOutcome.REFUSED)), "was not run"),
        (with_scripts(POSTGRES, failed(ScriptOutcome.SKIPPED)), "was not run"),
        (with_scripts(MYSQL), "no application"),
        (with_scripts(), "no application"),
        (replace(BEST, resumed=Resumed(watchdog="silent", holders_lost=["50-mysql"])), "50-mysql no longer held"),
        (replace(BEST, resumed=Resumed(watchdog="absent")), "watchdog"),
        (replace(BEST, resumed=None, resume_error="silence"), "silence"),
        (replace(BEST, quiesced=None, resumed=None, not_quiesced="exec is forbidden"), "exec is forbidden"),
        (replace(BEST, goal=Consistency.FILESYSTEM), "frozen and thawed"),
    ],
)
def test_the_freeze_is_proven_but_no_more(facts: Facts, words: str) -> None:
    verdict = judge(facts)
    assert verdict.consistency is Consistency.FILESYSTEM
    assert words in verdict.reason


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (replace(BEST, not_frozen="no guest agent answers"), "no guest agent answers"),
        (replace(BEST, freeze_error="refused"), "refused"),
        (replace(BEST, frozen=0, thawed=0), "no file system"),
        (replace(BEST, thawed=2), "3 file systems frozen, 2 thawed"),
        (replace(BEST, thawed=0, thaw_error="VSS hold write timeout"), "VSS hold write timeout"),
        (replace(BEST, late="the point was made 9 s after"), "9 s after"),
        (replace(BEST, resumed=Resumed(watchdog="fired")), "watchdog"),
    ],
)
@pytest.mark.parametrize("goal", [Consistency.APPLICATION, Consistency.FILESYSTEM])
def test_not_even_the_freeze_is_proven(facts: Facts, words: str, goal: Consistency) -> None:
    verdict = judge(replace(facts, goal=goal))
    assert verdict.consistency is Consistency.CRASH
    assert words in verdict.reason


WINDOWS = replace(
    BEST, os=GuestOs.WINDOWS, quiesced=Quiesced(watchdog=True), resumed=Resumed(watchdog="silent"), failed_writers=[]
)


def test_windows_is_judged_by_its_writers() -> None:
    assert judge(WINDOWS).consistency is Consistency.APPLICATION
    one = judge(replace(WINDOWS, failed_writers=["SqlServerWriter"]))
    assert (one.consistency, "SqlServerWriter" in one.reason) == (Consistency.FILESYSTEM, True)
    assert judge(replace(WINDOWS, failed_writers=None)).consistency is Consistency.FILESYSTEM
    assert judge(replace(WINDOWS, thawed=0)).consistency is Consistency.CRASH


def test_a_failed_post_script_and_notes_are_warnings_only() -> None:
    post = ScriptRun(name="50-postgresql", phase="post", outcome=ScriptOutcome.FAILED, code=2)
    facts = replace(
        BEST,
        quiesced=Quiesced(watchdog=True, scripts=[POSTGRES], notes=["VssOption was 1"]),
        resumed=Resumed(watchdog="silent", scripts=[post]),
    )
    assert judge(facts).consistency is Consistency.APPLICATION
    assert warnings(facts) == ["VssOption was 1", "50-postgresql post failed (exit code 2)"]
