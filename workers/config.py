"""What a worker must know to resolve the names in commands: vaults, hypervisors, and its own folders.

Parsed from the same file as the controller's configuration (`orchestrator/config.py`); a worker's host may hold only
this part of it. Secrets stay here and never travel in messages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from workers.contract.machines import Value


class S3Access(Value):
    """How to reach a bucket. Credentials are the environment's (`AWS_ACCESS_KEY_ID` …), or those of the file."""

    endpoint: str | None = None
    """`https://host:port`; None: Amazon's."""
    region: str | None = None
    path_style: bool = False
    """`https://endpoint/bucket/…` instead of `https://bucket.endpoint/…`."""
    ca_file: Path | None = None
    """PEM, for an endpoint with a certificate of one's own."""
    credentials_file: Path | None = None
    """In the format of `~/.aws/credentials`, profile `default`."""


class VaultConfig(Value):
    url: str
    """`file:///path` or `s3://bucket/prefix`."""
    s3: S3Access = S3Access()
    """For all s3:// URLs of this vault."""
    mirrors: list[str] = []
    """URLs of further stores that hold every object too."""
    key_file: Path | None = None
    passphrase_file: Path | None = None
    """Instead of a key file: a file that holds the passphrase of a slot."""
    key_command: list[str] = []
    """Instead of a key file: a program that prints its content."""
    replica_of: str | None = None
    """Name of the vault that this one is a replica of: `vault replicate` writes to it, backups do not."""
    bandwidth: int | None = None
    """Bytes per second that replication to this vault may use."""
    delete_delay_days: int = 7
    """Of a replica: for how long it keeps what the original no longer has."""
    soft_delete_days: int = 14
    """For how long a deletion of a point can be taken back."""
    max_jobs: int | None = None
    """Jobs that may write to it, or read from it, at once; None: no limit."""


class HypervisorConfig(Value):
    uri: str
    """A libvirt URI: `qemu:///system`, `qemu+ssh://…`; or `qmp+unix:///run/vm.sock`, a QEMU without libvirt."""
    max_jobs: int = 2
    """Jobs that may be under way at once."""
    max_transfers: int | None = None
    """Disks that one worker transfers at once from and to it; None: as many as its jobs have."""
    bandwidth: int | None = None
    """Bytes per second that one worker reads from and writes to it."""
    key_file: Path | None = None
    """Private SSH key for `qemu+ssh://`; None: what the user's own ssh would take."""
    host_key: str | None = None
    """`ssh-ed25519 AAAA…` of that host; None: it must be known to the user's ssh, or pinned by `hypervisor add`."""
    scratch_dir: Path | None = None
    """Where this hypervisor keeps the scratch of running backups; default: `WorkerConfig.scratch_dir`."""


class GuestAccess(Value):
    """How to get into the guests of some machines."""

    machines: str
    """Glob on the machine's name, or on `hypervisor/name`."""
    channel: Literal["auto", "agent", "ssh"] = "auto"
    """`auto`: the guest agent where it allows commands, else SSH, with a key planted by the agent if none is named."""
    address: str | None = None
    """For SSH; None: the agent is asked for the guest's addresses."""
    port: int = 22
    user: str = "root"
    """Another one needs `sudo` without a password."""
    key_file: Path | None = None
    host_key: str | None = None
    """`ssh-ed25519 AAAA…`; None: the one seen first is pinned."""
    extension: bool = True
    """False: nothing is installed in these guests; they are frozen through the agent only."""


class ExtensionConfig(Value):
    """What a worker must know to put extensions into guests."""

    packages: Path
    """Folder of built packages."""
    public_key: str | None = None
    """Ed25519, 64 hex digits; None: no package is trusted, and none installed."""
    host_keys: Path
    """File with the pinned SSH host keys of guests."""


class WorkerConfig(Value):
    vaults: dict[str, VaultConfig]
    hypervisors: dict[str, HypervisorConfig]
    extension: ExtensionConfig | None = None
    """None: guests are frozen through the agent only."""
    guests: list[GuestAccess] = []
    """The first one that fits a machine counts; without one, the defaults of GuestAccess."""
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
