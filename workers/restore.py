"""Bring disks and machines back from a point. The mirror of transfer: block map → reader → image.

Nothing needs the machine that the point was taken of, its hypervisor, or the catalog: a vault and its key are enough
(invariant 9). Every block is checked against its id as it is read, so a restored disk is a verified one.

A disk is written under a temporary name that carries the job's, and gets its own by a link, which never overwrites.
Whoever dies in between leaves files that are provably the job's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from workers.contract.errors import DiskError, NoSpace, NotFound, StillframeError, TargetExists, UsageError
from workers.contract.hosts import Host
from workers.contract.machines import Inventory
from workers.contract.messages import (
    DefineMachine,
    Discard,
    Discarded,
    DiskRestored,
    ImageFormat,
    MachineDefined,
    PrepareRestore,
    RestoreDisk,
    RestorePrepared,
    sf_name,
)
from workers.contract.points import DiskPoint, Point
from workers.contract.seams import Hypervisor, NewMachine
from workers.disks.foreign import require_room_for
from workers.disks.targets import HERE, Landing, open_target
from workers.hosts.local import LOCAL
from workers.parallel import share_out
from workers.vault import BlockMap, BlockReader, Span, Vault

WATCH_SECONDS = 0.5
SPACE_MARGIN = 64 << 20
"""Bytes beyond the disks' own data that must be free where they are restored to: image metadata, a little air."""


@dataclass(slots=True)
class Written:
    """What a running restore has done so far; bytes and seconds."""

    total_bytes: int
    done_bytes: int = 0
    written_bytes: int = 0
    seconds: float = 0.0


Watch = Callable[[Written], None]
"""Called every half second; raises to stop the restore."""


def disk_of(point: Point, target: str) -> DiskPoint:
    """Raises NotFound, naming the disks that there are."""
    for disk in point.disks:
        if disk.target == target:
            return disk
    there = ", ".join(disk.target for disk in point.disks)
    raise NotFound(f"point {point.id[:8]} has no disk {target}", hint=f"it has: {there}")


# --- before anything is written --------------------------------------------------------------------------------


def prepare(
    vault: Vault, hypervisor: Hypervisor | None, command: PrepareRestore, folder: Path | None
) -> RestorePrepared:
    """Check everything that can be checked: point, disks, names, space. `folder` is where disks of a machine go."""
    point = vault.point(command.point)
    disks = [disk_of(point, target) for target in command.targets] if command.targets else point.disks
    formats: dict[str, ImageFormat] = {disk.target: command.format or _as_it_was(disk) for disk in disks}
    for disk in disks:
        require_room_for(formats[disk.target], disk.capacity)
    if command.to is not None:
        host: Host = LOCAL
        files = {disks[0].target: str(Path(command.to).absolute())}
    else:
        if folder is None or hypervisor is None or command.name is None:
            raise UsageError("a restored machine needs a place for its disks", hint="give --dir DIR or --pool POOL")
        host = hypervisor.host
        _require_free_name(hypervisor, command)
        stem = f"{command.name}-restored-{command.job[:8]}" if command.replace else command.name
        files = {disk.target: str(folder.absolute() / f"{stem}-{disk.target}.{formats[disk.target]}") for disk in disks}
        hypervisor.redefined(point.definition, _new_machine(point, command, files, formats))
    reader = vault.reader()
    needed: dict[Path, int] = {}
    for disk in disks:
        path = Path(files[disk.target])
        _require_new(host, path)
        place = _existing_parent(host, path)
        needed[place] = needed.get(place, SPACE_MARGIN) + _data_bytes(reader, disk)
    for place, size in needed.items():
        free = host.free(place)
        if free < size:
            raise NoSpace(
                f"the restore needs {size >> 20} MiB in {place}, {free >> 20} MiB are free",
                hint="choose another place with --dir or --to",
            )
    return RestorePrepared(files=files, formats=formats, point=point)


def _as_it_was(disk: DiskPoint) -> ImageFormat:
    return "qcow2" if disk.format == "qcow2" else "raw"


def _require_free_name(hypervisor: Hypervisor, command: PrepareRestore) -> None:
    if command.replace:
        return
    for summary in hypervisor.machines(disks=False):
        if summary.machine.name == command.name or summary.machine.uuid == command.uuid:
            raise TargetExists(
                f"a machine named {summary.machine.name} exists already",
                hint="choose another --name, or --replace to put the point in its place",
            )


def _require_new(host: Host, path: Path) -> None:
    if host.taken(path):
        raise TargetExists(f"{path} exists already", hint="a restore never overwrites: choose another path")


def _existing_parent(host: Host, path: Path) -> Path:
    parent = path.parent
    found = host.look([parent, parent.parent])
    if not found[parent].exists:
        parent = parent.parent  # one new folder is made; more would rather be a slip of the hand, or a missing mount
    if not found[parent].is_folder:
        raise UsageError(f"there is no folder {parent}", hint=f"mkdir -p {parent}, if that is what you meant")
    if not host.writable(parent):
        raise DiskError(f"{parent} cannot be written to", hint="choose another place with --dir or --to")
    return parent


def _map_of(reader: BlockReader, disk: DiskPoint) -> BlockMap:
    return BlockMap(reader, bytes.fromhex(disk.root), disk.capacity, disk.block_size)


def _data_bytes(reader: BlockReader, disk: DiskPoint) -> int:
    return sum(count * disk.block_size for _, count, id in _map_of(reader, disk).runs() if id is not None)


# --- one disk --------------------------------------------------------------------------------------------------


def temporary(path: Path, job: str) -> Path:
    return path.with_name(f"{path.name}.{sf_name(job)}")


def restore_disk(
    vault: Vault, command: RestoreDisk, threads: int, watch: Watch, landing: Landing = HERE
) -> DiskRestored:
    """Write one disk of a point; it has its name only when it is whole."""
    started = time.monotonic()
    disk = disk_of(vault.point(command.point), command.target)
    host, path = landing.host, Path(command.path)
    _require_new(host, path)
    host.make_folder(path.parent, 0o777)
    unfinished = temporary(path, command.job)
    host.remove([unfinished])
    reader = vault.reader()
    run = _Run(_map_of(reader, disk), reader, watch)
    target = open_target(landing, unfinished, command.format, disk.capacity, run.ranges, disk.options)
    threads = max(threads, vault.store.features.reads_at_once)  # most wait for the store, not for a processor
    try:
        share_out(reader.spans(run.blocks()), lambda work: target.write(run.decoded(work)), threads)
        run.report()
    finally:
        target.close()
        vault.tell_damage()
    _publish(host, unfinished, path, keep=not command.standalone)
    return DiskRestored(
        target=command.target, written_bytes=run.written.written_bytes, seconds=round(time.monotonic() - started, 3)
    )


class _Run:
    """One pass over one map."""

    def __init__(self, blocks: BlockMap, reader: BlockReader, watch: Watch) -> None:
        self._map = blocks
        self._reader = reader
        self._watch = watch
        self.written = Written(blocks.size)
        self._started = self._watched = time.monotonic()

    def ranges(self) -> Iterator[tuple[int, int]]:
        """`(start, length)` of all data."""
        block, size = self._map.block_size, self._map.size
        for first, count, id in self._map.runs():
            if id is not None:
                yield first * block, min((first + count) * block, size) - first * block

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """`(offset, id)` of every block that is not zero. Pulled under the lock of `share_out`, some ahead of the
        reading."""
        block, size = self._map.block_size, self._map.size
        for first, count, id in self._map.runs():
            length = min((first + count) * block, size) - first * block
            self.written.done_bytes += length
            self._tick()
            if id is not None:
                self.written.written_bytes += length
                for index in range(first, first + count):
                    yield index * block, id

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._watched >= WATCH_SECONDS:
            self._watched = now
            self.report()

    def report(self) -> None:
        self.written.seconds = time.monotonic() - self._started
        self._watch(self.written)

    def decoded(self, work: Iterator[Span[int]]) -> Iterator[tuple[int, bytes]]:
        block, size = self._map.block_size, self._map.size
        for span in work:
            for offset, data in self._reader.read(span):
                if len(data) != min(block, size - offset):
                    raise DiskError(f"block at byte {offset} has {len(data)} bytes: the map does not fit the disk")
                yield offset, data


def _publish(host: Host, unfinished: Path, path: Path, *, keep: bool) -> None:
    """Give the finished file its name, unless somebody has taken it meanwhile."""
    try:
        host.link(unfinished, path)
    except TargetExists:
        raise TargetExists(f"{path} was made by somebody else meanwhile") from None
    if not keep:
        host.remove([unfinished])


# --- a machine -------------------------------------------------------------------------------------------------


def define_machine(
    vault: Vault, hypervisor: Hypervisor, command: DefineMachine, landing: Landing = HERE
) -> MachineDefined:
    """Define the machine on its restored disks. With `replace` the one that has its UUID is stopped and gives way;
    its old disks stay where they are and are named in the result."""
    point = vault.point(command.point)
    original = _original(hypervisor, command) if command.replace else None
    wanted = _new_machine(point, command, command.disks, command.formats)
    definition = hypervisor.redefined(point.definition, wanted)
    if original is None:
        how = hypervisor.define(definition, point.nvram, start=command.start)
    else:
        how = _replace(hypervisor, original, definition, point, start=command.start)
    old = [] if original is None else [disk.source for disk in original.disks if not disk.excluded]
    replaced = [source for source in old if source not in command.disks.values()]
    landing.clear()
    hypervisor.host.remove([temporary(Path(path), command.job) for path in command.disks.values()])
    return MachineDefined(
        uuid=command.uuid, name=command.name, started=command.start, start_with=how, replaced=replaced
    )


def _new_machine(
    point: Point,
    command: DefineMachine | PrepareRestore,
    files: Mapping[str, str],
    formats: Mapping[str, ImageFormat],
) -> NewMachine:
    assert command.name is not None
    assert command.uuid is not None
    any_disk = Path(next(iter(files.values())))
    nvram = any_disk.with_name(f"{command.name}-{command.job[:8]}_VARS.fd") if point.nvram is not None else None
    return NewMachine(
        name=command.name,
        uuid=command.uuid,
        disks={target: (path, formats[target]) for target, path in files.items()},
        nvram_path=str(nvram) if nvram else None,
        fresh_macs=not command.replace,
    )


def _original(hypervisor: Hypervisor, command: DefineMachine) -> Inventory | None:
    try:
        return hypervisor.inventory(command.uuid)
    except NotFound:
        return None


def _replace(hypervisor: Hypervisor, original: Inventory, definition: str, point: Point, *, start: bool) -> str:
    """Stop and forget the original, and define the restored machine; if that is refused, put the original back."""
    uuid, nvram = original.machine.uuid, hypervisor.nvram(original)
    hypervisor.undefine(uuid)
    try:
        return hypervisor.define(definition, point.nvram, start=start)
    except StillframeError:
        hypervisor.undefine(uuid)
        hypervisor.define(original.definition, nvram, start=False)
        raise


def _prove_again(hypervisor: Hypervisor, uuid: str, command: Discard) -> None:
    """The temporary names go once the machine is defined: from then on its definition says whose the files are."""
    sources = {disk.source for each in hypervisor.machines() if each.machine.uuid == uuid for disk in each.disks}
    for name in sources.intersection(command.paths):
        with suppress(TargetExists, DiskError):  # it has its proof, or is gone
            hypervisor.host.link(Path(name), temporary(Path(name), command.job))


def discard(hypervisor: Hypervisor | None, command: Discard, landing: Landing = HERE) -> Discarded:
    """Remove what a restore that did not end has made: only files whose temporary name proves them to be the job's,
    and the new machine, if the job may have defined one."""
    if hypervisor is not None and command.uuid is not None:
        _prove_again(hypervisor, command.uuid, command)
        hypervisor.undefine(command.uuid)
    landing.clear()
    proofs = {Path(name): temporary(Path(name), command.job) for name in command.paths}
    found = landing.host.look([*proofs, *proofs.values()])
    ours = [path for path, proof in proofs.items() if found[proof].exists and found[path].same_file(found[proof])]
    landing.host.remove(ours)  # the proofs go last: whoever dies here is understood by the next one
    landing.host.remove([*proofs.values()])
    return Discarded()
