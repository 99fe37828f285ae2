"""A command that waited until its job had been given up and released finds that out, and touches nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.app import make_app
from workers.config import VaultConfig, WorkerConfig
from workers.context import Context
from workers.contract.errors import NotFound, VaultError
from workers.contract.machines import MachineRef
from workers.contract.messages import TakeSnapshot
from workers.contract.points import Consistency
from workers.tasks import Tasks
from workers.vault import Vault
from workers.vault.keys import write_key_file
from workers.vault.stores import DirectoryStore


def test_a_late_snapshot_is_not_taken(tmp_path: Path) -> None:
    key = write_key_file(tmp_path / "main.key")
    Vault.create(DirectoryStore(tmp_path / "vault", create=True), key=key, cache_dir=tmp_path / "cache")[0].close()
    vaults = {"main": VaultConfig(url=f"file://{tmp_path}/vault", key_file=tmp_path / "main.key")}
    context = Context(WorkerConfig(vaults=vaults, hypervisors={}, cache_dir=tmp_path / "cache"))
    tasks = Tasks(make_app(backend_url=f"file://{tmp_path}/results"), context)
    command = TakeSnapshot(
        job="one",
        machine=MachineRef(hypervisor="lab", uuid="u", name="web"),
        vault="main",
        online=True,
        disks=[],
        excluded=[],
        goal=Consistency.CRASH,
    )
    with pytest.raises(VaultError, match="job one has ended"):
        tasks.take_snapshot(command)
    context.vault("main").announce("one", "p" * 32)
    with pytest.raises(NotFound, match="no hypervisor"):
        tasks.take_snapshot(command)
    context.close()
