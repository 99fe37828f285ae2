"""The loop of chores: their turns, who fails, who leads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

from orchestrator.chores import Chore
from orchestrator.serving import Serving
from workers.contract.errors import StillframeError


class Always:
    def __init__(self, holds: bool = True) -> None:
        self.holds = holds

    def claim(self) -> bool:
        return self.holds

    def held(self) -> bool:
        return self.holds


class Counted:
    """A chore that counts its turns, and can be waited for."""

    def __init__(self, name: str, seconds: float, act: Callable[[int], None] = lambda _turn: None) -> None:
        self.turns = 0
        self._act = act
        self._change = threading.Condition()
        self.chore = Chore(name, seconds, self._turn)

    def _turn(self, _now: datetime) -> None:
        with self._change:
            self.turns += 1
            self._change.notify_all()
        self._act(self.turns)

    def wait(self, turns: int) -> None:
        with self._change:
            assert self._change.wait_for(lambda: self.turns >= turns, 10), f"{self.chore.name}: {self.turns}"


@contextmanager
def serving(
    *chores: Counted, claim: Always | None = None, told: list[tuple[str, str]] | None = None
) -> Iterator[Serving]:
    def tell(name: str, error: Exception | None) -> None:
        if told is not None:
            told.append((name, str(error or "")))

    loop = Serving(lambda: [one.chore for one in chores], claim or Always(), tell, renew=0.05)
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        yield loop
    finally:
        loop.stop()
        thread.join(10)
        assert not thread.is_alive()


def test_each_has_its_own_turn() -> None:
    often, seldom = Counted("often", 0.01), Counted("seldom", 60)
    with serving(often, seldom):
        often.wait(5)
    assert seldom.turns == 1


def test_news_bring_a_turn_forward_but_not_every_time() -> None:
    one, rare = Counted("one", 5), Counted("rare", 600)
    with serving(one, rare) as loop:
        one.wait(1)
        rare.wait(1)
        loop.news()
        one.wait(2)
    assert rare.turns == 1, "what costs is not done whenever something happens"


def test_one_that_fails_is_told_once_it_fails_and_once_it_works_and_ends_no_other() -> None:
    def act(turn: int) -> None:
        if turn in (2, 3):
            raise StillframeError(f"broken {turn}")
        if turn == 4:
            raise RuntimeError("a defect")

    told: list[tuple[str, str]] = []
    failing, other = Counted("failing", 0.01, act), Counted("other", 0.01)
    with serving(failing, other, told=told):
        failing.wait(7)
        other.wait(7)
    assert [word for name, word in told if name == "failing"] == ["", "broken 2", "broken 3", "a defect", ""]


def test_only_who_leads_does_anything() -> None:
    claim, chore = Always(holds=False), Counted("one", 0.01)
    with serving(chore, claim=claim) as loop:
        loop.news()
        assert chore.turns == 0
        claim.holds = True
        chore.wait(3)
