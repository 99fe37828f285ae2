"""Fixtures with real parts: the host's libvirt, guests that boot, S3 servers.

A test that needs libvirt fails where there is none, with the command to type: skipping would call a run green that
proved nothing.

All tests run with as few open files as many systems allow, so that what leaks them fails here, and by itself.
"""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.scheduling import pytest_collection_modifyitems, pytest_xdist_make_scheduler
from tests.servers.fixtures import catalog_url, postgres, redis

if TYPE_CHECKING:
    import libvirt

    from orchestrator.demo.tiny_guest import TinyImage
    from tests.guests.machines import Guest, GuestFactory
    from tests.hosts.host import Host
    from tests.vault.buckets import Server


__all__ = ["catalog_url", "postgres", "pytest_collection_modifyitems", "pytest_xdist_make_scheduler", "redis"]

OPEN_FILES = 512
"""Half of what a login gets from most distributions."""


def pytest_sessionstart() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


@pytest.fixture(scope="session")
def libvirt_host() -> Iterator[libvirt.virConnect]:
    """A connection to this host's libvirt, after removing what killed test runs left on it."""
    from orchestrator.demo.host import URI, connect
    from tests.guests.machines import remove_leftovers
    from workers.contract.errors import HypervisorUnreachable

    try:
        connection = connect()
    except HypervisorUnreachable as error:
        pytest.fail(f"no libvirt answers on {URI} ({error}); type: deploy/libvirtd-up", pytrace=False)
    remove_leftovers(connection)
    yield connection
    connection.close()


@pytest.fixture(scope="session")
def lab() -> Iterator[Host]:
    """Another hypervisor host, with its own libvirtd and sshd."""
    from tests.guests.machines import fresh_folder
    from tests.hosts.host import start_host

    folder = fresh_folder()
    host = start_host(folder / "lab", "lab1", ssh=True)
    try:
        yield host
    finally:
        host.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def guest_cache() -> Path:
    """Where kernels and guest images stay between runs."""
    from orchestrator.demo.tiny_guest import default_cache

    cache = default_cache()
    cache.mkdir(parents=True, exist_ok=True)
    return cache


@pytest.fixture(scope="session")
def guest_folder() -> Iterator[Path]:
    """A folder for disks and guests that QEMU's user can pass through; unlike tmp_path."""
    from tests.guests.machines import fresh_folder

    folder = fresh_folder()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_guest_image(guest_cache: Path, guest_folder: Path) -> TinyImage:
    """Kernel and initramfs of the tiny guest."""
    from orchestrator.demo.tiny_guest import build_tiny_image

    return build_tiny_image(guest_folder, guest_cache)


@pytest.fixture
def tiny_guest(
    libvirt_host: libvirt.virConnect, tiny_guest_image: TinyImage, guest_folder: Path
) -> Iterator[GuestFactory]:
    """Makes tiny guests (see GuestFactory); they are removed after the test."""
    from tests.guests.machines import GuestFactory

    factory = GuestFactory(libvirt_host, tiny_guest_image, guest_folder)
    try:
        yield factory
    finally:
        factory.close()


@pytest.fixture(scope="session")
def booted_guest(libvirt_host: libvirt.virConnect, tiny_guest_image: TinyImage, guest_folder: Path) -> Iterator[Guest]:
    """One booted guest with two ext4 disks, for all tests that leave it as they found it: running, thawed, without
    jobs and checkpoints."""
    from tests.guests.machines import GuestFactory

    factory = GuestFactory(libvirt_host, tiny_guest_image, guest_folder)
    try:
        yield factory(label="shared")
    finally:
        factory.close()


@pytest.fixture(scope="session")
def full_guest(
    libvirt_host: libvirt.virConnect, tiny_guest_image: TinyImage, guest_cache: Path, guest_folder: Path
) -> Iterator[Guest]:
    """A booted full guest: the system on vda, a data disk vdb at /data/vdb. The same rules as for `booted_guest`."""
    from orchestrator.demo.host import remove_machine
    from tests.guests.full_guest import make_full_guest

    guest = make_full_guest(libvirt_host, tiny_guest_image, guest_cache, guest_folder)
    try:
        guest.start()
        guest.out("systemctl start data-vdb.mount", timeout=300)  # its agent is up before that
        yield guest
    finally:
        remove_machine(guest.domain)


# --- S3 servers: see tests/vault/buckets.py --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from tests.vault.buckets import serving

    with serving(tmp_path_factory.mktemp("moto"), "moto") as server:
        yield server


@pytest.fixture(scope="session")
def localbucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from tests.vault.buckets import serving

    with serving(tmp_path_factory.mktemp("localbucket"), "localbucket") as server:
        yield server


@pytest.fixture(scope="session")
def nanio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from tests.vault.buckets import serving

    with serving(tmp_path_factory.mktemp("nanio"), "nanio") as server:
        yield server
