"""The tiny guest: a real Linux with the real guest agent, up in seconds under plain emulation.

The demo and the tests need a machine whose file systems can be frozen and whose files can be hashed from inside; a
distribution's image would take a minute to boot without hardware virtualisation, and a fake would prove nothing. Kernel
and initramfs are booted directly, so all disks belong to the data that is backed up. Emulation (`type='qemu'`) always:
/dev/kvm can exist and still not boot a guest.
"""

from __future__ import annotations

import os
import shutil
import uuid as uuids
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

from orchestrator.demo.initramfs import build_initramfs
from orchestrator.demo.kernel import GuestBuildError, find_kernel

if TYPE_CHECKING:
    import libvirt

CMDLINE = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on"
READY = "stillframe-guest: ready"


@dataclass(frozen=True, slots=True)
class TinyImage:
    """What the guests boot from."""

    kernel: Path
    initramfs: Path


@dataclass(frozen=True, slots=True)
class TinyDisk:
    """A disk of a guest: `target` (`vda`), image file, and its format."""

    target: str
    path: Path
    format: str = "qcow2"


def default_cache() -> Path:
    """Where kernels and guest images are kept between runs: $STILLFRAME_TEST_CACHE or ~/.cache/stillframe-tests."""
    named = os.environ.get("STILLFRAME_TEST_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "stillframe-tests"


def build_tiny_image(directory: Path, cache: Path | None = None) -> TinyImage:
    """Kernel and initramfs, copied to `directory` from the cache, which is filled first if need be. A copy, because
    QEMU runs as a user of its own that cannot look into people's homes, and because machines keep the path.
    Raises GuestBuildError."""
    require_traversable(directory)
    cache = cache or default_cache()
    kernel = find_kernel(cache)
    initramfs = build_initramfs(kernel, cache)
    image = TinyImage(directory / kernel.image.name, directory / initramfs.name)
    for source, copy in ((kernel.image, image.kernel), (initramfs, image.initramfs)):
        if not copy.exists() or copy.stat().st_size != source.stat().st_size:
            shutil.copyfile(source, copy)
            copy.chmod(0o644)
    return image


def require_traversable(directory: Path) -> None:
    """Raise GuestBuildError unless any user can pass through `directory` and all its parents, as QEMU has to."""
    for folder in (directory, *directory.resolve().parents):
        if not folder.stat().st_mode & 0o001:
            raise GuestBuildError(
                f"QEMU, which runs as another user, cannot pass through {folder}",
                hint=f"choose another directory, or: chmod o+x {folder}",
            )


def tiny_xml(
    name: str,
    image: TinyImage,
    disks: Sequence[TinyDisk],
    serial: Path,
    *,
    uuid: str | None = None,
    cmdline: str = CMDLINE,
    memory_mib: int = 256,
    agent: bool = True,
) -> str:
    """Domain XML of a guest that boots `image` with `disks`; the console's text goes to the file `serial`."""
    disk_xml = "".join(
        f"<disk type='file' device='disk'><driver name='qemu' type={quoteattr(disk.format)} discard='unmap'/>"
        f"<source file={quoteattr(str(disk.path))}/><target dev={quoteattr(disk.target)} bus='virtio'/></disk>"
        for disk in disks
    )
    channel = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>" if agent else ""
    return f"""<domain type='qemu'>
  <name>{escape(name)}</name>
  <uuid>{uuid or uuids.uuid4()}</uuid>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{escape(str(image.kernel))}</kernel>
    <initrd>{escape(str(image.initramfs))}</initrd>
    <cmdline>{escape(cmdline)}</cmdline>
  </os>
  <features><acpi/></features>
  <on_reboot>restart</on_reboot>
  <devices>
    {disk_xml}
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='file'><source path={quoteattr(str(serial))}/></serial>
    <console type='file'><source path={quoteattr(str(serial))}/><target type='serial'/></console>
    {channel}
  </devices>
</domain>"""


def define_tiny(
    connection: libvirt.virConnect,
    name: str,
    image: TinyImage,
    disks: Sequence[TinyDisk],
    directory: Path,
    *,
    uuid: str | None = None,
    agent: bool = True,
    start: bool = False,
) -> libvirt.virDomain:
    """Define (and start) a tiny guest; its console log is `directory/<name>.log`. Raises libvirt.libvirtError."""
    domain = connection.defineXML(tiny_xml(name, image, disks, directory / f"{name}.log", uuid=uuid, agent=agent))
    if start:
        domain.create()
    return domain
