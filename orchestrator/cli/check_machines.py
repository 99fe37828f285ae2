"""What `stillframe doctor` looks at beyond this host: hypervisors, their machines, and what a crash left behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from orchestrator.cli.checks import Check
from orchestrator.cli.run import Session
from workers.contract.errors import StillframeError
from workers.contract.machines import Disk, Inventory, Power

if TYPE_CHECKING:
    from orchestrator.config import Config
    from workers.context import Context
    from workers.contract.hosts import Host
    from workers.contract.seams import Hypervisor


def check_hypervisors(session: Session, config: Config) -> Iterator[Check]:
    """Hypervisors and all that is on them."""
    from workers.context import Context

    if not config.worker.hypervisors:
        mend = f'add [hypervisors.local] with uri = "qemu:///system" to {config.path}'
        yield Check("FAIL", "hypervisor", "none is configured", mend)
    known = _known_checkpoints(config)
    active = _active_jobs(session, config)
    context = Context(config.worker)
    try:
        for name in config.worker.hypervisors:
            yield from _hypervisor(context, config, name, known, active)
            yield from _strays(context, name, active)
        yield from _sessions(context, config, active)
    finally:
        context.close()


def _catalog_file_missing(config: Config) -> bool:
    url = config.catalog_url
    return url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists()


def _known_checkpoints(config: Config) -> set[str] | None:
    """Checkpoints that a point refers to; None if no catalog can tell."""
    from orchestrator.catalog.points import document, points_of
    from orchestrator.catalog.store import Catalog

    if _catalog_file_missing(config):
        return None
    try:
        with Catalog.open(config.catalog_url) as catalog, catalog.read() as reading:
            points = [document(row) for row in points_of(reading)]
    except StillframeError:
        return None  # reported as the catalog's own finding
    return {disk.checkpoint for point in points for disk in point.disks if disk.checkpoint}


def _active_jobs(session: Session, config: Config) -> set[str]:
    if _catalog_file_missing(config):
        return set()
    try:
        return {view.id for view in session.peek().jobs(active_only=True)}
    except StillframeError:
        return set()


def _hypervisor(
    context: Context, config: Config, name: str, known: set[str] | None, active: set[str]
) -> Iterator[Check]:
    subject = f"hypervisor {name}"
    uri = config.worker.hypervisors[name].uri
    try:
        hypervisor = context.hypervisor(name)
        machines = hypervisor.machines()
    except StillframeError as error:
        yield Check("FAIL", subject, str(error), error.hint or _reach(uri))
        return
    features = hypervisor.features
    if not features.backup:
        yield Check(
            "FAIL",
            subject,
            f"{features.version} cannot make backups",
            "libvirt 7.2 and QEMU 4.2 or newer; without libvirt QEMU 5.2",
        )
        return
    yield Check("OK", subject, f"{uri}, {features.version}, {len(machines)} machines")
    for machine in machines:
        uuid = machine.machine.uuid
        try:
            inventory = hypervisor.inventory(uuid)
        except StillframeError as error:
            yield Check("WARN", f"machine {machine.machine.name}", str(error), error.hint)
            continue
        yield from _machine(hypervisor, inventory)
        yield from _leftovers(hypervisor, inventory, known, active)


def _reach(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.hostname is None:
        return "systemctl start libvirtd"
    return f"ssh {parts.username + '@' if parts.username else ''}{parts.hostname} virsh list"


def _machine(hypervisor: Hypervisor, inventory: Inventory) -> Iterator[Check]:
    subject = f"machine {inventory.machine.name}"
    included = [disk for disk in inventory.disks if not disk.excluded]
    flaws: list[tuple[str, str]] = []
    if inventory.power is Power.RUNNING and not inventory.agent:
        mend = "install qemu-guest-agent in it, and give it the channel org.qemu.guest_agent.0"
        flaws.append(("no guest agent answers: points are crash-consistent", mend))
    if inventory.foreign_job:
        flaws.append((f"a job of somebody else runs on it ({inventory.foreign_job})", "wait until it has ended"))
    flaws += [(remark, "") for remark in inventory.remarks]
    if not included:
        flaws.append(("it has no disk that can be backed up", ""))
    for disk in included:
        flaws += _disk(disk, hypervisor.host)
    if not flaws:
        disks = ", ".join(f"{disk.target} {disk.format}" for disk in included)
        agent = ", agent answers" if inventory.agent else ""
        yield Check("OK", subject, f"{inventory.power}{agent}, {disks}")
    for detail, mend in flaws:
        yield Check("WARN", subject, detail, mend)


def _disk(disk: Disk, host: Host) -> list[tuple[str, str]]:
    if disk.danger:
        from workers.snapshot import DANGER_HINT

        return [(f"{disk.target} cannot be backed up while it runs: {disk.danger}", DANGER_HINT)]
    if not disk.tracks_changes:
        mend = f"qemu-img convert -O qcow2 {disk.source} …, for incremental backups"
        return [(f"{disk.target} is {disk.format}: changes are not tracked, every backup reads all of it", mend)]
    if backing := _backing(host, Path(disk.source)):
        mend = "virsh blockcommit or blockpull, if the external snapshot is no longer wanted"
        return [(f"{disk.target} stands on {backing}: a restore brings back one whole image", mend)]
    return []


def _backing(host: Host, image: Path) -> str:
    """The file on which an image stands (an external snapshot), or nothing."""
    if not host.look([image])[image].is_file:
        return ""
    try:
        found = json.loads(host.run(["qemu-img", "info", "-U", "--output=json", str(image)], timeout=20))
    except StillframeError:
        return ""  # the machine's own finding says why it cannot be read
    return str(found.get("backing-filename") or "")


# --- what a crash left behind ----------------------------------------------------------------------------------


def _leftovers(
    hypervisor: Hypervisor, inventory: Inventory, known: set[str] | None, active: set[str]
) -> Iterator[Check]:
    machine = inventory.machine
    subject = f"leftovers on {machine.name}"
    try:
        left = hypervisor.leftovers(machine.uuid)
    except StillframeError as error:
        yield Check("WARN", subject, str(error), error.hint)
        return
    if left.backup_job and left.backup_job not in active:
        yield Check("WARN", subject, f"backup job {left.backup_job} runs without its owner", "stillframe job list")
    ours = {f"sf-{job}" for job in active}
    stray = [name for name in left.checkpoints if name not in ours and name not in (known or set())]
    if stray and known is not None:
        # Ours by name, but perhaps another controller's with another catalog: the mend must leave room for that.
        first = hypervisor.features.drop_checkpoint.format(machine=machine.name, checkpoint=stray[0])
        mend = f"if no other Stillframe backs this machine up: {first}{' …' if len(stray) > 1 else ''}"
        yield Check("WARN", subject, f"no point in this catalog refers to {', '.join(stray)}", mend)
    elif stray:
        mend = "stillframe vault rebuild-catalog"
        yield Check("WARN", subject, f"no catalog tells what {', '.join(stray)} belongs to", mend)


def _strays(context: Context, name: str, active: set[str]) -> Iterator[Check]:
    from workers.snapshot import strays

    places = context.places(name)
    try:
        jobs = strays(places)
    except StillframeError:
        return  # the hypervisor's own finding says why
    for job in jobs:
        if job not in active:
            found = places.host.look([places.scratch_of(job), places.runtime_of(job)])
            folders = [str(path) for path, seen in found.items() if seen.exists]
            mend = f"settled by the next command; else rm -r {' '.join(folders)}"
            on = "" if places.host.local else f" on {places.host.name}"
            yield Check("WARN", "leftovers", f"files of job {job}{on}, which does not run", mend)


def _sessions(context: Context, config: Config, active: set[str]) -> Iterator[Check]:
    for name in config.worker.vaults:
        try:
            sessions = context.vault(name).sessions()
        except StillframeError:
            continue  # the vault's own finding says why
        for one in sessions:
            if one.session not in active:
                detail = f"session {one.session} of a writer that is not one of our running jobs"
                yield Check("WARN", f"vault {name}", detail, "another controller's, or settled by the next command")
