"""What stores honour, and that a vault is refused where they do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.vault.buckets import Server
from tests.vault.faulty import FaultyStore, Plan
from workers.contract.errors import VaultError
from workers.contract.seams import Store
from workers.vault.probe import Ability, probe
from workers.vault.stores import DirectoryStore


@pytest.fixture(params=["directory", "moto", "localbucket"])
def good(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "directory":
        return DirectoryStore(tmp_path / "v", create=True)
    server: Server = request.getfixturevalue(request.param)
    return server.store(server.url(), create=True)


def test_what_a_vault_can_be_kept_in(good: Store) -> None:
    for thorough in (False, True):
        found = probe(good, thorough=thorough)
        found.require()
        assert set(found.lacks) == {Ability.LOCK}
    assert list(good.list("")) == []


def test_bucket_with_lock(moto: Server) -> None:
    store = moto.store(moto.url("locked"), create=True)
    assert probe(store, thorough=True).lacks == {}
    assert list(store.list("")) == []


def test_bucket_that_does_not_know_conditions_is_refused(nanio: Server) -> None:
    store = nanio.store(nanio.url(), create=True)
    found = probe(store)
    assert set(found.unfit) == {Ability.CREATE, Ability.RANGE}  # of a range that begins inside and ends beyond
    with pytest.raises(VaultError, match="conditional create") as caught:
        found.require()
    assert "If-None-Match" in caught.value.hint
    assert list(store.list("")) == []


class Careless(FaultyStore):
    """Does not honour something."""

    def __init__(self, inner: Store, lacks: Ability) -> None:
        super().__init__(inner, Plan())
        self._lacks = lacks
        if lacks is Ability.LOCK:
            self.features = replace(self.features, locks=True)

    def put(self, name: str, data: bytes) -> bool:
        return super().put(name, data) or self._lacks is Ability.CREATE

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if self._lacks is Ability.RANGE and length is not None:
            return super().get(name)
        return super().get(name, offset, length)

    def list(self, prefix: str):  # type: ignore[no-untyped-def]
        return super().list(prefix if self._lacks is not Ability.LIST else "none/")

    def delete(self, name: str) -> None:
        if self._lacks is not Ability.DELETE:
            super().delete(name)

    def retain(self, name: str, until: object) -> None:
        pass


@pytest.mark.parametrize("lacks", list(Ability))
def test_what_is_not_honoured_is_found(tmp_path: Path, lacks: Ability) -> None:
    store = Careless(DirectoryStore(tmp_path, create=True), lacks)
    found = probe(store, thorough=True)
    assert lacks in found.lacks
    assert bool(found.unfit) == (lacks is not Ability.LOCK)


@pytest.mark.parametrize("fails", ["put", "get", "list"])
def test_store_that_fails_is_not_judged(tmp_path: Path, fails: str) -> None:
    inner = DirectoryStore(tmp_path, create=True)
    plan = Plan()
    probe(FaultyStore(inner, plan))
    number = [call for call, _ in plan.calls].index(fails)
    act: Callable[[], object] = lambda: probe(FaultyStore(inner, Plan(fail_at=number)))  # noqa: E731
    with pytest.raises(VaultError, match="injected"):
        act()
