from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vault.pictures import new_vault
from workers.vault import Vault
from workers.vault.immutable import set_immutable


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return new_vault(tmp_path)


@pytest.fixture(autouse=True)
def flags_go(tmp_path: Path) -> Iterator[None]:
    """Takes immutable flags off again, so that what a test has locked can be removed."""
    yield
    for path in tmp_path.rglob("*"):
        if path.lstat().st_mode & 0o777 == 0o400:
            set_immutable(path, False)
