"""Which vaults may be written by people and jobs: all but replicas, which follow their original."""

from __future__ import annotations

from orchestrator.config import Config
from workers.contract.errors import UsageError


def require_primary(config: Config, name: str | None) -> str:
    """The name of the vault that is meant, if it is no replica: only replication writes to those. Raises UsageError."""
    vault = config.vault_name(name)
    original = config.worker.vaults[vault].replica_of
    if original is not None:
        raise UsageError(
            f"vault {vault} is a replica of {original}: it only follows",
            hint=f"use vault {original}; if that is gone for good, take replica_of out of [vaults.{vault}]",
        )
    return vault
