"""libvirt's storage pools, as far as they are folders that restored disks go into."""

from __future__ import annotations

from pathlib import Path

import libvirt

from workers.contract.errors import UsageError
from workers.hypervisors import domain_xml, errors


def folder_of(connection: libvirt.virConnect, name: str) -> Path:
    """Raises NotFound for an unknown pool, UsageError for one that is not a folder, or not active: its file system may
    not be mounted."""
    with errors.translated(f"looking at storage pool {name}"):
        pool = connection.storagePoolLookupByName(name)
        folder, active = domain_xml.pool_folder(pool.XMLDesc(0)), pool.isActive()
    if folder is None:
        raise UsageError(f"storage pool {name} is not a folder", hint="name a pool of type dir, or use --dir")
    if not active:
        raise UsageError(f"storage pool {name} is not active", hint=f"virsh pool-start {name}")
    return Path(folder)


def refresh(connection: libvirt.virConnect, name: str) -> None:
    """Let libvirt see files that were put into a pool."""
    with errors.translated(f"refreshing storage pool {name}"):
        connection.storagePoolLookupByName(name).refresh()
