"""Commands that go down to workers, events that come back up.

One Celery task runs one command (`workers/tasks.py`) and sends one event to the task `stillframe.advance` on the
queue `control`. Commands name vaults and hypervisors, never secrets: the worker resolves names in its own
configuration. A command can arrive twice and is then harmless: acts are named after the job, and events are guarded
by the job's state. Workers decide nothing: a command says all that was decided, an event all that was found.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, get_args

from pydantic import Field, TypeAdapter

from workers.contract.errors import ErrorInfo
from workers.contract.guests import ExtensionState, GuestReport
from workers.contract.machines import Disk, Inventory, MachineRef, MachineSummary, Value
from workers.contract.points import Bottleneck, Consistency, DiskPoint, Mode, Point

ImageFormat = Literal["qcow2", "raw", "vhd", "vhdx", "vmdk"]
"""In which a restored disk can be written."""
IMAGE_FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)


def sf_name(job: str) -> str:
    """The name that everything of a job carries on a hypervisor: the proof of ownership (invariant 4)."""
    return f"sf-{job}"


class DiskPlan(Value):
    """What was decided for one disk of a backup."""

    target: str
    mode: Mode
    reason: str
    """In words for people: shown as `vdb: full, because …`."""
    block_size: int
    base_checkpoint: str | None = None
    """Set when incremental."""
    base_root: str | None = None
    """Root of the base's block map; also set for a full read in a chain, whose known blocks it warms."""
    base_capacity: int | None = None
    tracks_changes: bool = True


class ExportInfo(Value):
    """`seams.Export` as it travels in messages, with what a transfer must know of the disk."""

    target: str
    socket: str
    name: str
    bitmap: str | None
    capacity: int


class SnapshotInfo(Value):
    """A snapshot that stands: what to read, and what release needs to end it."""

    name: str
    """`sf-<job>`."""
    online: bool
    """By libvirt's backup job (True) or by qemu-nbd on images of a machine that is off."""
    exports: list[ExportInfo]
    checkpoint: str | None
    """The new checkpoint, if one was made."""
    checkpoint_xml: str | None
    time: str
    """ISO 8601, UTC."""
    consistency: Consistency
    consistency_reason: str
    frozen_ms: int | None
    guest: GuestReport = GuestReport()
    definition: str
    nvram: bytes | None = None

    model_config = {"frozen": True, "extra": "forbid", "ser_json_bytes": "base64", "val_json_bytes": "base64"}


# --- commands --------------------------------------------------------------------------------------------------


class Prepare(Value):
    """Look at the machine, open the vault, announce the session, see to the extension in the guest. → Prepared"""

    kind: Literal["prepare"] = "prepare"
    job: str
    machine: MachineRef
    vault: str
    point: str
    """Id that the point will have."""
    base_point: str | None = None
    """Whose maps an incremental would inherit from; announced with the session, so that it stays."""
    base_checkpoint: str | None = None
    base_xml: str | None = None
    goal: Consistency = Consistency.CRASH
    """`crash` needs nothing of the guest, and leaves it alone."""


class TakeSnapshot(Value):
    """Make scratch, quiesce, freeze, begin, thaw, resume. → SnapshotTaken | BaseRefused"""

    kind: Literal["take_snapshot"] = "take_snapshot"
    job: str
    machine: MachineRef
    vault: str
    """Where the job's session says whether it is still wanted."""
    online: bool
    disks: list[DiskPlan]
    excluded: list[str]
    goal: Consistency
    options: dict[str, str] = {}
    """Application → word, for its script in the guest."""
    extension: ExtensionState | None = None
    """As `Prepared` has told it; only an enabled one is asked to quiesce."""


class TransferDisk(Value):
    """Read what is to be read, write blocks, map and index. → DiskTransferred"""

    kind: Literal["transfer_disk"] = "transfer_disk"
    job: str
    machine: MachineRef
    vault: str
    plan: DiskPlan
    disk: Disk
    """As the inventory found it: source, format, identity and options go into the event's `DiskPoint`."""
    export: ExportInfo
    online: bool


class CommitPoint(Value):
    """Create the manifest, exclusively. → PointCommitted"""

    kind: Literal["commit_point"] = "commit_point"
    job: str
    vault: str
    point: Point


class Release(Value):
    """Thaw and resume the guest; settle whether the point exists; end the snapshot; remove scratch, sockets, helpers
    and session; delete the checkpoint that is no longer needed. Idempotent; carries all that may exist, whatever of it
    does. → Released"""

    kind: Literal["release"] = "release"
    job: str
    machine: MachineRef
    vault: str
    point: str
    commit_sent: bool
    """Whether a manifest may exist: then it is looked for, and its name fenced if it does not."""
    thaw: bool
    """Whether the guest may be frozen, or held quiesced."""
    new_checkpoint: str | None
    """Deleted if the point does not exist."""
    old_checkpoint: str | None
    """Deleted if the point exists (invariant 1)."""


class RestoreDisk(Value):
    """Write one disk of a point into a new file. → DiskRestored"""

    kind: Literal["restore_disk"] = "restore_disk"
    job: str
    vault: str
    point: str
    target: str
    hypervisor: str | None = None
    """On whose host; None: on the worker's."""
    path: str
    """Its temporary name is `<path>.sf-<job>` until it is whole."""
    format: ImageFormat
    standalone: bool
    """True: the file is all that is wanted. False: a machine will be defined on it; until then the temporary name
    stays as a second link, the proof that the file is this job's and may be discarded."""


class DefineMachine(Value):
    """Define a machine from a point on restored disks, and start it if asked. → MachineDefined"""

    kind: Literal["define_machine"] = "define_machine"
    job: str
    vault: str
    point: str
    hypervisor: str
    uuid: str
    name: str
    disks: dict[str, str]
    """target → path of the restored file."""
    formats: dict[str, ImageFormat]
    pool: str | None = None
    """Storage pool that the disks lie in, to be refreshed afterwards."""
    replace: bool
    """Keep UUID, MACs and name, and take the place of the machine that has them (it is stopped)."""
    start: bool


class PrepareRestore(Value):
    """Announce the session, check point, target folder or pool, space and names, before anything is written.
    → RestorePrepared"""

    kind: Literal["prepare_restore"] = "prepare_restore"
    job: str
    vault: str
    point: str
    targets: list[str]
    """Disks to restore; empty: all of the point."""
    hypervisor: str | None
    """None: a single disk to a file."""
    name: str | None
    uuid: str | None
    directory: str | None
    pool: str | None
    to: str | None
    """Path of a single restored disk."""
    format: ImageFormat | None
    """None: as the disk was, `raw` if neither qcow2 nor raw."""
    replace: bool


class Discard(Value):
    """Undo a restore that did not end: remove its files, its machine and its session, nothing else. → Discarded"""

    kind: Literal["discard"] = "discard"
    job: str
    vault: str
    paths: list[str]
    hypervisor: str | None
    uuid: str | None
    """The machine to undefine, if this job may have defined it."""


class Thaw(Value):
    """Thaw a guest, at once, on the queue `rescue`, and let its applications go on. → Thawed"""

    kind: Literal["thaw"] = "thaw"
    job: str
    machine: MachineRef


class ListMachines(Value):
    """Say what machines a hypervisor has. → MachinesListed"""

    kind: Literal["list_machines"] = "list_machines"
    job: str
    """Of no job: whoever asked knows the answer by it."""
    hypervisor: str
    disks: bool = False
    """Look at their disks too, which takes longer."""
    asked: datetime
    """When: what is listed is from then, or later."""


Command = Annotated[
    Prepare
    | TakeSnapshot
    | TransferDisk
    | CommitPoint
    | Release
    | PrepareRestore
    | RestoreDisk
    | DefineMachine
    | Discard
    | Thaw
    | ListMachines,
    Field(discriminator="kind"),
]
COMMAND: TypeAdapter[Command] = TypeAdapter(Command)


# --- events ----------------------------------------------------------------------------------------------------


class Prepared(Value):
    kind: Literal["prepared"] = "prepared"
    inventory: Inventory
    online: bool
    extension: ExtensionState | None = None
    """None: nobody looked, for nothing of the guest was needed."""
    base_readable: bool = True
    """False: the base point is no longer in the vault, or on its way out: nothing can be inherited from it."""


class SnapshotTaken(Value):
    kind: Literal["snapshot_taken"] = "snapshot_taken"
    snapshot: SnapshotInfo


class BaseRefused(Value):
    """The hypervisor refused the base of one disk at the last moment; nothing was begun."""

    kind: Literal["base_refused"] = "base_refused"
    target: str | None
    """None: it did not say which; all incremental disks are meant."""
    reason: str


class DiskTransferred(Value):
    kind: Literal["disk_transferred"] = "disk_transferred"
    disk: DiskPoint
    """`checkpoint` is None here: which one tracks this disk from now on is decided at the commit."""
    alert: str = ""
    """Not empty: change tracking was found wrong, and the disk was read in full."""
    healed: int = 0
    """Blocks that did not change and were read again, because the vault had lost them."""


class PointCommitted(Value):
    kind: Literal["point_committed"] = "point_committed"
    point: str
    locked_until: datetime | None = None
    """As in its manifest."""


class Released(Value):
    kind: Literal["released"] = "released"
    committed: Point | None
    """The point, if the release had to look and found it."""
    warnings: list[str] = []


class RestorePrepared(Value):
    kind: Literal["restore_prepared"] = "restore_prepared"
    files: dict[str, str]
    """target → path to write."""
    formats: dict[str, ImageFormat]
    point: Point


class DiskRestored(Value):
    kind: Literal["disk_restored"] = "disk_restored"
    target: str
    written_bytes: int
    """Non-zero bytes, each block checked against its id."""
    seconds: float = 0.0


class MachineDefined(Value):
    kind: Literal["machine_defined"] = "machine_defined"
    uuid: str
    name: str
    started: bool
    start_with: str = ""
    """What a person types to start it."""
    replaced: list[str] = []
    """Disk files of the replaced machine, kept aside."""


class Discarded(Value):
    kind: Literal["discarded"] = "discarded"
    warnings: list[str] = []


class Thawed(Value):
    kind: Literal["thawed"] = "thawed"
    thawed: int


class MachinesListed(Value):
    """What a hypervisor has, or why it does not say. Belongs to no job."""

    kind: Literal["machines_listed"] = "machines_listed"
    hypervisor: str
    asked: datetime
    """As in the question."""
    machines: list[MachineSummary] = []
    disks: bool = False
    """Whether their disks were looked at."""
    complete: bool = True
    """Machines that are off are listed too."""
    error: ErrorInfo | None = None
    """Set: nothing is known of its machines."""


class Failed(Value):
    """A command failed; whatever it had begun is named in the job's obligations."""

    kind: Literal["failed"] = "failed"
    command: str
    error: ErrorInfo
    target: str | None = None


class CancelRequested(Value):
    kind: Literal["cancel_requested"] = "cancel_requested"
    by: str


class WorkerLost(Value):
    """The process that ran the job's command is gone (reconciler)."""

    kind: Literal["worker_lost"] = "worker_lost"
    detail: str


class TimedOut(Value):
    kind: Literal["timed_out"] = "timed_out"
    detail: str


Event = Annotated[
    Prepared
    | SnapshotTaken
    | BaseRefused
    | DiskTransferred
    | PointCommitted
    | Released
    | RestorePrepared
    | DiskRestored
    | MachineDefined
    | Discarded
    | Thawed
    | MachinesListed
    | Failed
    | CancelRequested
    | WorkerLost
    | TimedOut,
    Field(discriminator="kind"),
]
EVENT: TypeAdapter[Event] = TypeAdapter(Event)


# --- signs of life ---------------------------------------------------------------------------------------------


class Running(Value):
    """A command that a worker performs now."""

    job: str
    kind: str
    target: str | None = None


class Beat(Value):
    """A worker's sign of life, every `BEAT_SECONDS`, to the task `stillframe.beat` on the queue `control`. What it
    performs is listed: a job that is under way and that no worker mentions any more has lost its command."""

    worker: str
    host: str
    pid: int
    started: str
    """ISO 8601, UTC: tells a worker that was started again from the one before."""
    hypervisors: list[str]
    running: list[Running]
    free: int
    """Threads that wait for work: with none, a command may wait in the queue and is not lost."""
    ending: bool = False
    """It takes no more commands: nothing is begun on it any more."""


BEAT_SECONDS = 10.0
SILENT_SECONDS = 60.0
"""A worker that was not heard of for so long is gone, and so is what it performed."""


# --- progress --------------------------------------------------------------------------------------------------


class Progress(Value):
    """State of a running transfer or restore, at most every 0.5 s per disk; lives in the result backend."""

    target: str
    done_bytes: int
    """Of the disk's range of bytes, settled in any way (read, zero, inherited)."""
    total_bytes: int
    read_bytes: int
    stored_bytes: int
    rate: float
    """Bytes per second read (backup) or written (restore) since the start."""
    bottleneck: Bottleneck | None = None
