from __future__ import annotations

from pathlib import Path

import pytest

from tests.vault.pictures import new_vault
from workers.vault import Vault


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return new_vault(tmp_path)
