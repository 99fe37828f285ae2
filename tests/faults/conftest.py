"""Fixtures: commands that start fast, and places in memory for them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.place import Nursery, Place, memory_folder

NewPlace = Callable[..., Place]


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as running:
        yield running


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    """A folder in memory for places and guests' disks."""
    folder = memory_folder()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def new_place(memory: Path, nursery: Nursery) -> NewPlace:
    """Makes places; their catalog, vault and key are made too."""
    numbers = itertools.count(1)

    def make(**fields: str) -> Place:
        place = Place(memory / f"p{next(numbers)}", nursery, **fields)
        place.good("init")
        return place

    return make


@pytest.fixture
def place(new_place: NewPlace) -> Place:
    return new_place()
