"""What a worker must know to resolve the names in commands: vaults, hypervisors, and its own folders.

Parsed from the same file as the controller's configuration (`orchestrator/config.py`); a worker's host may hold only
this part of it. Secrets stay here and never travel in messages.
"""

from __future__ import annotations

from pathlib import Path

from workers.contract.machines import Value


class VaultConfig(Value):
    url: str
    """`file:///path`."""
    key_file: Path | None = None
    passphrase_file: Path | None = None
    """Instead of a key file: a file that holds the passphrase of a slot."""


class HypervisorConfig(Value):
    uri: str
    """A libvirt URI: `qemu:///system`, `qemu+ssh://…`."""
    max_jobs: int = 2
    scratch_dir: Path | None = None
    """Where this hypervisor keeps the scratch of running backups; default: `WorkerConfig.scratch_dir`."""


class WorkerConfig(Value):
    vaults: dict[str, VaultConfig]
    hypervisors: dict[str, HypervisorConfig]
    scratch_dir: Path = Path("/var/lib/stillframe/scratch")
    runtime_dir: Path = Path("/run/stillframe")
    """Sockets and pid files of offline exports."""
    cache_dir: Path = Path("/var/cache/stillframe")
    """Rebuildable look-up caches of vault indexes."""
    block_size: int = 256 << 10
    """Default block size, bytes; per disk: `block_sizes`."""
    transfer_threads: int = 2
    """Threads per disk in a transfer."""
    scratch_floor: int = 256 << 20
    """Bytes that must stay free where scratch lives: below, a backup ends itself rather than pause the guest."""
