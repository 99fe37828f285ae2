"""One database guest for all tests of application scripts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import libvirt

    from orchestrator.demo.tiny_guest import TinyImage
    from tests.guests.machines import Guest


@pytest.fixture(scope="package")
def database_guest(
    libvirt_host: libvirt.virConnect, tiny_guest_image: TinyImage, guest_cache: Path, guest_folder: Path
) -> Iterator[Guest]:
    """A booted guest with PostgreSQL and MariaDB, and the application scripts under test in it."""
    from tests.extension.apps.runs import put_apps
    from tests.guests.database_guest import database_guest_up

    with database_guest_up(libvirt_host, tiny_guest_image, guest_cache, guest_folder) as guest:
        put_apps(guest)
        yield guest


@pytest.fixture(params=["dash", "busybox"])
def shell(request: pytest.FixtureRequest) -> str:
    """What runs the script, and whose small programs it finds."""
    return str(request.param)
