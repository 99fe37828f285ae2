"""The table of what is audited fits the desks that it is about."""

from __future__ import annotations

import inspect

import pytest

from orchestrator import audit
from orchestrator.actor import acting_as, whoami
from orchestrator.audit import Act, Journal, audited
from orchestrator.catalog.store import Catalog
from orchestrator.service import Service
from tests.controller.test_service import config, service

__all__ = ["config", "service"]


def test_every_act_is_a_method_with_those_arguments(service: Service) -> None:
    for desk, acts in service._changing():
        for name, act in acts.items():
            parameters = inspect.signature(getattr(type(desk), name)).parameters
            assert {act.of, *act.detail} <= parameters.keys(), (name, act)


def test_no_secret_is_among_them() -> None:
    tables = [value for value in vars(audit).values() if isinstance(value, dict) and "__" not in str(value)[:4]]
    acts = [act for table in tables for act in table.values() if isinstance(act, Act)]
    assert len(acts) > 20
    assert not [act for act in acts if {"passphrase", "approval", "key", "phrase_file"} & {act.of, *act.detail}]


class Desk:
    def sell(self, name: str, *, price: int = 0, dry_run: bool = False) -> int:
        if price < 0:
            raise ValueError(f"no {name} is given away")
        return 0 if dry_run else price

    def sell_all(self) -> int:
        return self.sell("all", price=2)


def test_calls_are_noted_with_who_made_them(catalog: Catalog) -> None:
    journal = Journal(catalog, lambda _, value: f"<{value}>")
    desk = audited(Desk(), journal, {"sell": Act("desk.sell", "name", ("price",))})
    assert desk.sell("chair", price=3) == 3
    assert desk.sell("chair", dry_run=True) == 0
    with acting_as("schedule"):
        assert desk.sell_all() == 2
    with pytest.raises(ValueError, match="no table is given away"):
        desk.sell("table", price=-1)
    found = [(one.actor, one.action, one.subject, one.detail) for one in journal.recent(9)]
    assert found[::-1] == [
        (whoami(), "desk.sell", "<chair>", "price 3"),
        ("schedule", "desk.sell", "<all>", "price 2"),
        (whoami(), "desk.sell", "<table>", "price -1"),
        (whoami(), "desk.sell", "<table>", "failed: ValueError"),
    ]
