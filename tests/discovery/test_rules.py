"""What has become of machines, by rule: drawn as `a: web=running db=off | b: -`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.discovery import Answer, Awaited, Known, Listed, News, Seen, Silent, decide
from workers.contract.machines import Power

NOW = datetime(2026, 11, 24, 2, tzinfo=UTC)
WEB = Known("web", "a", "web", Power.RUNNING)


def answers(drawn: str, asked: datetime = NOW) -> dict[str, Answer]:
    """`a: web=running db=off | b: - | c: silent | d: awaited`; a machine's UUID is its name."""
    found: dict[str, Answer] = {}
    for part in drawn.split("|"):
        name, _, said = part.strip().partition(":")
        match said.strip():
            case "silent":
                found[name] = Silent("no route to host")
            case "awaited":
                found[name] = Awaited()
            case listed:
                pairs = [word.split("=") for word in listed.split() if word != "-"]
                found[name] = Listed({uuid: Seen(uuid, Power(power)) for uuid, power in pairs}, asked)
    return found


def after(before: Known | None, drawn: str, now: datetime = NOW) -> tuple[Known | None, dict[News, str]]:
    """The machine `web` afterwards, and what is told."""
    changes = decide({before.uuid: before} if before else {}, answers(drawn), now)
    mine = [change for change in changes if change.machine.uuid == "web"]
    return (mine[0].machine, dict(mine[0].news)) if mine else (before, {})


@pytest.mark.parametrize(
    ("drawn", "home", "told"),
    [
        ("a: web=running | b: -", "a", {}),
        ("a: - | b: web=running", "b", {News.MOVED: "from a to b: it runs there"}),
        ("a: - | b: web=off", "b", {News.MOVED: "from a to b: it is no longer on a"}),
        ("a: web=off | b: web=running", "b", {News.MOVED: "from a to b: it runs there; it is defined on a and b"}),
        ("a: web=running | b: web=off", "a", {}),
        ("a: web=off | b: web=off", "a", {}),
        ("a: web=running | b: web=paused", "a", {}),  # on its way: the new one waits for the last pages
        ("a: web=off | b: web=paused", "b", {News.MOVED: "from a to b: it is paused there; it is defined on a and b"}),
        ("a: silent | b: -", "a", {}),
        ("a: silent | b: web=off", "a", {}),  # it may well run on a
        (
            "a: silent | b: web=running",
            "b",
            {News.MOVED: "from a to b: it runs there, and a does not answer (no route to host)"},
        ),
        ("a: awaited | b: web=running", "a", {}),
        ("b: web=off", "b", {News.MOVED: "from a to b: it is no longer on a"}),  # a is not configured any more
    ],
)
def test_where_a_machine_is(drawn: str, home: str, told: dict[News, str]) -> None:
    found, news = after(WEB, drawn)
    assert found is not None
    assert (found.hypervisor, found.gone, found.missed, found.doubt) == (home, False, None, "")
    assert news == told


def test_a_new_one_and_a_renamed_one() -> None:
    found, news = after(None, "a: web=off | b: awaited")
    assert found == Known("web", "a", "web", Power.OFF)
    assert news == {News.NEW: "found on a"}
    found, news = after(Known("web", "a", "old", Power.OFF), "a: web=off")
    assert news == {News.RENAMED: "from old to web"}


def test_power_and_tags_are_noted_without_a_word() -> None:
    [change] = decide({"web": WEB}, {"a": Listed({"web": Seen("web", Power.OFF, ("gold",))}, NOW)}, NOW)
    assert (change.machine.power, change.machine.tags, change.news) == (Power.OFF, ("gold",), ())


@pytest.mark.parametrize("others", ["b: awaited", "b: silent", "b: - | c: silent"])
def test_it_is_not_gone_while_somebody_who_may_have_it_has_not_answered(others: str) -> None:
    found, news = after(WEB, f"a: - | {others}")
    assert found is not None
    assert (found.missed, news) == (NOW, {})
    assert after(found, f"a: - | {others}", NOW + timedelta(hours=1)) == (found, {})


def test_it_is_gone_when_everybody_was_asked_after_it_was_missed() -> None:
    """It may have left `a` for `b` after `b` had answered."""
    found, _ = after(WEB, "a: - | b: -", NOW + timedelta(seconds=1))
    assert found is not None
    assert not found.gone
    later = NOW + timedelta(minutes=5)
    told = answers("a: -", later) | answers("b: -", NOW)
    assert decide({"web": found}, told, later) == []
    [change] = decide({"web": found}, answers("a: - | b: -", later), later)
    assert change.machine.gone
    assert dict(change.news) == {News.GONE: "a has no machine with its UUID any more, and no other hypervisor has it"}
    assert decide({"web": change.machine}, answers("a: - | b: -", later), later) == []
    [back] = decide({"web": change.machine}, answers("a: - | b: web=off", later), later)
    assert back.machine == Known("web", "b", "web", Power.OFF)
    assert News.BACK in dict(back.news)


def test_running_on_two_at_once_is_doubtful_until_it_is_not() -> None:
    found, news = after(WEB, "a: web=running | b: web=running")
    assert found is not None
    assert (found.hypervisor, found.doubt) == ("a", "it runs on a and b at once")
    assert news == {News.DOUBTFUL: "it runs on a and b at once"}
    assert after(found, "a: web=running | b: web=running") == (found, {})
    found, news = after(found, "a: web=off | b: web=running")
    assert found is not None
    assert (found.hypervisor, found.doubt, News.CLEAR in news) == ("b", "", True)


def test_the_newer_of_two_answers_counts_that_are_far_apart() -> None:
    told = answers("a: web=running", NOW - timedelta(hours=1)) | answers("b: web=running")
    [change] = decide({"web": WEB}, told, NOW)
    assert (change.machine.hypervisor, change.machine.doubt) == ("b", "")


POWER = st.sampled_from(Power)
LISTED = st.dictionaries(st.sampled_from("xyz"), POWER).map(
    lambda found: Listed({uuid: Seen(uuid, power) for uuid, power in found.items()}, NOW)
)
ANSWERS = st.dictionaries(st.sampled_from("abc"), st.one_of(LISTED, st.just(Silent("?")), st.just(Awaited())))
KNOWN = st.builds(
    Known,
    uuid=st.sampled_from("xyz"),
    hypervisor=st.sampled_from("abcd"),
    name=st.sampled_from(["x", "old"]),
    power=POWER,
    missed=st.sampled_from([None, NOW - timedelta(hours=1), NOW]),
)


@given(st.lists(KNOWN, unique_by=lambda one: one.uuid), ANSWERS)
def test_rules_that_always_hold(machines: list[Known], told: dict[str, Answer]) -> None:
    known = {machine.uuid: machine for machine in machines}
    changes = decide(known, told, NOW)
    listed = {uuid for answer in told.values() if isinstance(answer, Listed) for uuid in answer.machines}
    for change in changes:
        machine = change.machine
        if machine.gone:
            assert machine.uuid not in listed
            assert all(isinstance(answer, Listed) for answer in told.values())
            assert known[machine.uuid].missed is not None, "missed twice"
        elif machine.missed is None:  # it is where somebody says that it is
            answer = told[machine.hypervisor]
            assert isinstance(answer, Listed)
            assert machine.uuid in answer.machines
    again = {**known, **{change.machine.uuid: change.machine for change in changes}}
    settled = {change.machine.uuid: change.machine for change in decide(again, told, NOW)}
    assert all(machine.gone or machine.missed for machine in settled.values()), "nothing else changes by asking twice"
    some = set(list(known)[:1])
    assert [change for change in changes if change.machine.uuid in some] == decide(known, told, NOW, only=some)
