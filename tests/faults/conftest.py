"""Fixtures: commands that start fast, and places in memory for them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest

from orchestrator.demo.disks import make_empty_disk
from orchestrator.demo.tiny_guest import TinyImage
from tests.faults.paused import Paused, paused_machine
from tests.faults.place import Nursery, Place, memory_folder
from tests.faults.walk import SIZE, Walked
from tests.guests.machines import MIB, GuestFactory

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
def place(new_place: NewPlace) -> Iterator[Place]:
    place = new_place()
    yield place
    place.let_go()


@pytest.fixture(scope="module")
def quiet_factory(
    libvirt_host: libvirt.virConnect, tiny_guest_image: TinyImage, memory: Path
) -> Iterator[GuestFactory]:
    """Makes guests that serve all tests of a module."""
    factory = GuestFactory(libvirt_host, tiny_guest_image, memory)
    try:
        yield factory
    finally:
        factory.close()


@pytest.fixture
def machine(tiny_guest: GuestFactory) -> Paused:
    """A paused machine with two empty disks, vda and vdb."""
    return paused_machine(tiny_guest)


@pytest.fixture(scope="module")
def walked(
    libvirt_host: libvirt.virConnect, tiny_guest_image: TinyImage, guest_folder: Path, new_place: NewPlace
) -> Iterator[Walked]:
    """The guest of a module's walks."""
    factory = GuestFactory(libvirt_host, tiny_guest_image, guest_folder)
    try:
        guest = factory({"vda": 64 * MIB, "vdb": SIZE}, label="kill", start=False)
        guest.disk("vdb").unlink()
        make_empty_disk(guest.disk("vdb"), SIZE)
        guest.start()
        walked = Walked(guest, new_place())
        walked.change()
        walked.place.backed_up(guest.name)
        walked.remember()
        yield walked
    finally:
        factory.close()
