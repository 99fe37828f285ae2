from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.catalog.store import Catalog
from tests.controller.scripted import Bench
from tests.jobs.world import World


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog.open(f"sqlite:///{tmp_path}/catalog.db") as catalog:
        yield catalog


@pytest.fixture
def bench(catalog: Catalog) -> Bench:
    return Bench(catalog, World())
