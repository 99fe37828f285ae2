"""A machine to measure with: real libvirt and QEMU, real data, but no guest that boots.

It is started paused, so nothing but the benchmark writes to its disks and every contestant reads the same bytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from orchestrator.demo.host import connect, remove_machine

NAME = "sf-bench"
STILLFRAME = str(Path(sys.executable).with_name("stillframe"))


@contextmanager
def folder(base: str) -> Iterator[Path]:
    """A folder that QEMU's user can pass through; removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="sfb-", dir=base))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def paused_machine(disks: dict[str, Path]) -> Iterator[Any]:
    """A paused domain with qcow2 disks (target → image)."""
    connection = connect()
    for left in connection.listAllDomains():
        if left.name() == NAME:
            remove_machine(left)
    disk_xml = "".join(
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>"
        f"<source file={quoteattr(str(image))}/><target dev={quoteattr(target)} bus='virtio'/></disk>"
        for target, image in disks.items()
    )
    domain = connection.defineXML(
        f"<domain type='qemu'><name>{NAME}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>"
        f"<os><type arch='x86_64' machine='pc'>hvm</type></os><devices>{disk_xml}"
        "<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"
    )
    import libvirt

    domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    try:
        yield domain
    finally:
        remove_machine(domain)
        connection.close()


def write(domain: Any, device: str, offset: int, length: int, pattern: int) -> None:
    """Write through the running QEMU, as a guest would, so that dirty bitmaps see it."""
    import libvirt_qemu

    node = f"/machine/peripheral/virtio-disk{ord(device[-1]) - ord('a')}/virtio-backend"
    command = f'qemu-io -d {node} "write -q -P {pattern} {offset} {length}"'
    answer = libvirt_qemu.qemuMonitorCommand(domain, command, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
    if answer.strip():
        raise RuntimeError(f"{command}: {answer}")


def install(base: Path, *, block_size: str | None = None, extension: str = "install = false") -> Path:
    """A Stillframe of its own in `base`; its configuration file."""
    config = base / "stillframe.toml"
    backup = f'[backup]\nblock_size = "{block_size}"\n' if block_size else ""
    config.write_text(
        f'[catalog]\nurl = "sqlite:///{base}/catalog.db"\n'
        f'[vaults.main]\nurl = "file://{base}/vault"\nkey_file = "{base}/main.key"\n'
        f'[hypervisors.here]\nuri = "qemu:///system"\n{backup}[extension]\n{extension}\n'
        f'[paths]\nscratch = "{base}/s"\nruntime = "{base}/r"\ncache = "{base}/c"\n'
    )
    subprocess.run([STILLFRAME, "init", "--config", str(config)], check=True, capture_output=True)
    return config


def system_files(image: Path, size: int) -> int:
    """Fill `image` with files of this system, each beginning on a 4 KiB border as on a file system; bytes written."""
    written = 0
    seen: set[tuple[int, int]] = set()
    with image.open("wb") as out:
        for root in ("/usr/lib", "/usr/share", "/usr", "/root", "/opt", "/var/lib"):
            for place, _, names in os.walk(root, followlinks=False):
                for name in sorted(names):
                    path = Path(place, name)
                    try:
                        info = path.lstat()
                        if not path.is_file() or path.is_symlink() or (info.st_dev, info.st_ino) in seen:
                            continue
                        seen.add((info.st_dev, info.st_ino))
                        with path.open("rb") as source:
                            shutil.copyfileobj(source, out, 1 << 20)
                    except OSError:
                        continue
                    written = -(-out.tell() // 4096) * 4096
                    out.seek(written)
                    if written >= size:
                        out.truncate(written)
                        return written
        out.truncate(written)
    return written
