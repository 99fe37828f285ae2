"""What is known of one disk now: the definition's word, libvirt's and the image's own, put together."""

from __future__ import annotations

from pathlib import Path

import libvirt

from workers.contract.errors import HypervisorError, StillframeError
from workers.contract.machines import Disk
from workers.hypervisors import errors, local_files
from workers.hypervisors.domain_xml import DiskElement

_SECTOR = 512
"""Bytes that QEMU, and so every export, rounds the size of a raw file up to."""


class DiskFacts:
    """The disks of one machine."""

    def __init__(self, connection: libvirt.virConnect, domain: libvirt.virDomain) -> None:
        self._connection, self._domain = connection, domain

    def disk(self, element: DiskElement, *, lenient: bool) -> Disk:
        """`lenient`: a disk whose image cannot be read is listed as excluded; otherwise it is a HypervisorError, for
        a backup must not leave out a disk in silence."""
        if element.excluded:
            return self._excluded(element, element.excluded)
        try:
            return self._included(element)
        except StillframeError as error:
            if not lenient:
                raise HypervisorError(f"{self._domain.name()}: {element.target}: {error}", hint=error.hint) from None
            return self._excluded(element, f"its image cannot be read: {error}")

    def _excluded(self, element: DiskElement, reason: str) -> Disk:
        return Disk(
            target=element.target,
            source=element.path,
            format=element.format,
            capacity=0,
            identity=element.path,
            tracks_changes=False,
            excluded=reason,
            address=element.address,
        )

    def _included(self, element: DiskElement) -> Disk:
        path, capacity = self._volume(*element.volume) if element.volume else self._image(element)
        capacity = -(-capacity // _SECTOR) * _SECTOR
        options = local_files.qcow2_options(path) if element.format == "qcow2" else {}
        return Disk(
            target=element.target,
            source=str(path),
            format=element.format,
            capacity=capacity,
            identity=local_files.identity(path),
            tracks_changes=options.get("compat") == "1.1" and "data_file" not in options,
            address=element.address,
            source_options=options,
        )

    def _image(self, element: DiskElement) -> tuple[Path, int]:
        with errors.translated(element.path):
            return Path(element.path), int(self._domain.blockInfo(element.target)[0])

    def _volume(self, pool: str, name: str) -> tuple[Path, int]:
        """libvirt knows no capacity for a disk named as a volume while its machine is off: the pool does."""
        with errors.translated(f"volume {pool}/{name}"):
            volume = self._connection.storagePoolLookupByName(pool).storageVolLookupByName(name)
            return Path(volume.path()), int(volume.info()[1])
