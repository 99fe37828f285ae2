"""What is known of one disk now: the definition's word, libvirt's and the image's own, put together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import libvirt

from workers.contract.errors import HypervisorError, StillframeError
from workers.contract.hosts import Host, Seen
from workers.contract.machines import Disk
from workers.hypervisors import errors, host_files
from workers.hypervisors.domain_xml import DiskElement

_SECTOR = 512
"""Bytes that QEMU, and so every export, rounds the size of a raw file up to."""


class DiskFacts:
    """The disks of one machine; `seen`: what its images' paths have shown, see `look`."""

    def __init__(
        self, connection: libvirt.virConnect, domain: libvirt.virDomain, host: Host, seen: dict[Path, Seen]
    ) -> None:
        self._connection, self._domain, self._host, self._seen = connection, domain, host, seen

    @staticmethod
    def look(host: Host, elements: Iterable[DiskElement]) -> dict[Path, Seen]:
        """At all images with a path of their own at once: a look costs a round trip."""
        wanted = [Path(each.path) for each in elements if not each.excluded and not each.volume and each.path]
        return host.look(wanted, head=host_files.HEAD) if wanted else {}

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
            refused=element.refused,
            address=element.address,
        )

    def _included(self, element: DiskElement) -> Disk:
        path, capacity = self._volume(*element.volume) if element.volume else self._image(element)
        capacity = -(-capacity // _SECTOR) * _SECTOR
        seen = self._seen.get(path) or self._host.look([path], head=host_files.HEAD)[path]
        identity = host_files.identity(path, seen)
        options = host_files.qcow2_options(path, seen) if element.format == "qcow2" else {}
        return Disk(
            target=element.target,
            source=str(path),
            format=element.format,
            capacity=capacity,
            identity=identity,
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
