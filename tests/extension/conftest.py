"""The extension in a sandbox on this host, with each kind of shell, and in a guest."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.extension.sandbox import Sandbox


@pytest.fixture(params=["dash", "busybox", "bash"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A place where the extension can be installed; nothing is yet."""
    if os.geteuid() != 0:
        pytest.fail("these tests need root: they make mounts and processes of their own", pytrace=False)
    if shutil.which(request.param) is None:
        pytest.fail(f"there is no {request.param} here; type: deploy/install-packages --dev", pytrace=False)
    seen = Path(tempfile.mkdtemp(prefix="sf-ext-"))
    seen.chmod(0o755)
    made = Sandbox(seen, request.param)
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def installed(sandbox: Sandbox) -> Sandbox:
    """The extension in force, without application scripts."""
    sandbox.install()
    return sandbox
