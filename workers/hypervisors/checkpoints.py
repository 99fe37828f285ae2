"""Checkpoints: judged per disk, deleted whatever state they are in.

libvirt keeps the list of checkpoints, the images keep the bitmaps, and the two can disagree (invariant 6). libvirt
deletes or validates a checkpoint on all of its disks or on none, so a checkpoint that is broken on one disk is
*narrowed*: redefined for fewer disks, which libvirt allows at any time and which touches no bitmap. QEMU is not asked
directly: a monitor command would mark the machine as tainted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import libvirt

from workers.contract.errors import Busy, DiskError
from workers.contract.hosts import Host
from workers.contract.machines import BitmapState, Disk
from workers.hypervisors import backup_xml, errors, host_files

_REDEFINE: int = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
_VALIDATE: int = _REDEFINE | libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE
_NOT_COVERED = "the checkpoint does not cover this disk"


@dataclass(frozen=True, slots=True)
class Verdict:
    state: BitmapState
    detail: str = ""


def _tracking(disks: Sequence[Disk]) -> list[Disk]:
    return [disk for disk in disks if not disk.excluded and disk.tracks_changes]


def lookup(domain: libvirt.virDomain, name: str) -> libvirt.virDomainCheckpoint | None:
    """The checkpoint as libvirt knows it; None if it does not."""
    try:
        return domain.checkpointLookupByName(name)
    except libvirt.libvirtError as error:
        if errors.code(error) == libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
            return None
        raise


def names(domain: libvirt.virDomain) -> list[str]:
    """Ours that libvirt knows, oldest first."""
    aged = [
        (backup_xml.creation_time(found.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN)), found.getName())
        for found in domain.listAllCheckpoints()
        if found.getName().startswith(backup_xml.PREFIX)
    ]
    return [name for _, name in sorted(aged)]


def names_in_images(host: Host, disks: Sequence[Disk]) -> list[str]:
    """Ours that the images hold, whether or not libvirt knows them. An image that cannot be read holds none."""
    found: set[str] = set()
    for disk in _tracking(disks):
        try:
            held = host_files.bitmaps(host, Path(disk.source), shared=True)
        except (DiskError, Busy):
            continue
        found.update(bitmap.name for bitmap in held if bitmap.depth == 0)
    return sorted(name for name in found if name.startswith(backup_xml.PREFIX))


# --- judging ---------------------------------------------------------------------------------------------------


def judge(
    host: Host, domain: libvirt.virDomain, active: bool, disks: Sequence[Disk], base: str, base_xml: str | None
) -> dict[str, Verdict]:
    """Whether checkpoint `base` can serve each of `disks` that can keep a bitmap; redefined where libvirt lost it."""
    document = base_xml
    if document is None:
        known = lookup(domain, base)
        document = known.getXMLDesc(0) if known is not None else None
    verdicts = {disk.target: Verdict(BitmapState.MISSING, _NOT_COVERED) for disk in disks if not disk.excluded}
    if document is None:
        lost = Verdict(BitmapState.MISSING, f"libvirt does not know the checkpoint {base}")
        return dict.fromkeys(verdicts, lost)
    covered = backup_xml.tracked_targets(document)
    candidates = [disk for disk in _tracking(disks) if disk.target in covered]
    if active:
        verdicts.update(_judge_running(host, domain, candidates, base, document))
    else:
        verdicts.update({disk.target: _judge_image(host, disk, base) for disk in candidates})
    return verdicts


def _judge_running(
    host: Host, domain: libvirt.virDomain, candidates: Sequence[Disk], base: str, document: str
) -> dict[str, Verdict]:
    """Validate, and take away the disk that libvirt names until the rest passes. What libvirt then knows covers the
    good disks; the next validation of the whole, and `delete`, start from more than that."""
    rest = {disk.target: disk for disk in candidates}
    verdicts: dict[str, Verdict] = {}
    while rest:
        try:
            domain.checkpointCreateXML(backup_xml.narrowed(document, rest), _VALIDATE)
            break
        except libvirt.libvirtError as error:
            words = errors.text(error)
            target = errors.disk_named(words) if errors.unusable_bitmap(error) else None
            if target not in rest:
                verdicts.update({each: Verdict(BitmapState.MISSING, words) for each in rest})
                return verdicts
            verdicts[target] = Verdict(_missing_or_inconsistent(host, rest.pop(target), base), words)
    verdicts.update({target: Verdict(BitmapState.VALID) for target in rest})
    return verdicts


def _missing_or_inconsistent(host: Host, disk: Disk, base: str) -> BitmapState:
    """A bitmap that a running QEMU refuses is in the image if it is inconsistent, and nowhere if it is missing."""
    return BitmapState.INCONSISTENT if base in names_in_images(host, [disk]) else BitmapState.MISSING


def _judge_image(host: Host, disk: Disk, base: str) -> Verdict:
    """Busy if somebody writes the image."""
    found = [bitmap for bitmap in host_files.bitmaps(host, Path(disk.source), shared=False) if bitmap.name == base]
    if not found:
        return Verdict(BitmapState.MISSING, f"{disk.source} holds no bitmap {base}")
    if any(bitmap.depth for bitmap in found):
        return Verdict(BitmapState.INCONSISTENT, f"bitmap {base} is spread over backing files of {disk.source}")
    if found[0].in_use:
        return Verdict(BitmapState.INCONSISTENT, f"bitmap {base} in {disk.source} is in use after a crash")
    if not found[0].auto:
        return Verdict(BitmapState.INCONSISTENT, f"bitmap {base} in {disk.source} does not record")
    return Verdict(BitmapState.VALID)


# --- deleting --------------------------------------------------------------------------------------------------


def delete(host: Host, domain: libvirt.virDomain, active: bool, disks: Sequence[Disk], name: str) -> None:
    """Remove checkpoint `name` from libvirt and from every disk that holds its bitmap. Absent already: no error.

    Bitmaps go first, the entry that lets them be found again goes last.
    """
    backup_xml.require_ours(name)
    if active:
        _delete_running(domain, _tracking(disks), name)
    else:
        for disk in _tracking(disks):
            held = host_files.bitmaps(host, Path(disk.source), shared=False)
            if any(bitmap.name == name and bitmap.depth == 0 for bitmap in held):
                host_files.remove_bitmap(host, Path(disk.source), name)
    left = lookup(domain, name)
    if left is not None:
        left.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)


def _delete_running(domain: libvirt.virDomain, disks: Sequence[Disk], name: str) -> None:
    """On all disks in one step where libvirt's entry is right, else disk by disk: each may hold it or not."""
    targets = {disk.target for disk in disks}
    known = lookup(domain, name)
    if known is not None:
        covered = backup_xml.tracked_targets(known.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN))
        if _deleted(known):
            targets -= covered
    definition = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    for target in sorted(targets):
        alone = backup_xml.minimal_checkpoint(name, {target}, [target], definition=definition)
        _deleted(domain.checkpointCreateXML(alone, _REDEFINE))


def _deleted(checkpoint: libvirt.virDomainCheckpoint) -> bool:
    """Delete bitmaps and entry; False, with nothing changed, where a bitmap is not there."""
    try:
        checkpoint.delete(0)
    except libvirt.libvirtError as error:
        if errors.unusable_bitmap(error):
            return False
        raise
    return True
