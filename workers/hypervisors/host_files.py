"""What a hypervisor's own files tell, through its `Host`.

The header of a qcow2 image is read directly: it tells version and options without a process, and without a lock
that a running QEMU would refuse. Bitmaps are asked of qemu-img, which knows their directory format.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from workers.contract.errors import Busy, DiskError, HypervisorError
from workers.contract.hosts import Host, Seen

HEAD = 112
"""Bytes of an image that tell all that is asked here."""
_MAGIC = b"QFI\xfb"
# Offsets as in QEMU's docs/interop/qcow2.txt; a header of version 2 ends at byte 72.
_VERSION_AT, _CLUSTER_BITS_AT, _FEATURES_AT, _COMPRESSION_AT = 4, 20, 72, 104
_DATA_FILE, _COMPRESSION, _EXTENDED_L2 = 1 << 2, 1 << 3, 1 << 4


@dataclass(frozen=True, slots=True)
class ImageBitmap:
    """A bitmap stored in a qcow2 image."""

    name: str
    in_use: bool
    """A writer has the image open, or died with it open."""
    auto: bool
    """It records changes whenever the image is written."""
    depth: int
    """0: in the top image; else in its backing file at that depth."""


def qcow2_options(path: Path, seen: Seen) -> dict[str, str]:
    """Options of the qcow2 image at `path` under the names of `qemu-img create -o`; empty if it is not qcow2.

    `seen` with the first `HEAD` bytes. Raises HypervisorError if it could not be read.
    """
    if seen.trouble:
        raise HypervisorError(f"cannot read {path}: {seen.trouble}")
    raw = seen.head
    if len(raw) < 72 or raw[:4] != _MAGIC:
        return {}
    (version,) = struct.unpack_from(">I", raw, _VERSION_AT)
    (cluster_bits,) = struct.unpack_from(">I", raw, _CLUSTER_BITS_AT)
    options = {"compat": "1.1" if version >= 3 else "0.10", "cluster_size": str(1 << cluster_bits)}
    if version < 3 or len(raw) < _COMPRESSION_AT:
        return options
    incompatible, compatible = struct.unpack_from(">QQ", raw, _FEATURES_AT)
    if incompatible & _EXTENDED_L2:
        options["extended_l2"] = "on"
    if incompatible & _COMPRESSION and len(raw) > _COMPRESSION_AT and raw[_COMPRESSION_AT] == 1:
        options["compression_type"] = "zstd"
    if incompatible & _DATA_FILE:
        options["data_file"] = "external"
    if compatible & 1:
        options["lazy_refcounts"] = "on"
    return options


def bitmaps(host: Host, path: Path, *, shared: bool) -> list[ImageBitmap]:
    """Bitmaps stored in the image at `path` and its backing files.

    `shared` reads beside a writer (`-U`): good for names only, every bitmap is in use then. Otherwise a writer is
    refused: Busy. Raises DiskError if the image cannot be read.
    """
    argv = ["qemu-img", "info", "--output=json", "--backing-chain", *(["-U"] if shared else []), str(path)]
    try:
        chain = json.loads(host.run(argv, timeout=30))
    except DiskError as error:
        if "lock" in str(error) or "another process" in str(error):
            raise Busy(f"{path} is being written by another process", hint="is the machine starting?") from None
        raise
    return [
        ImageBitmap(bitmap["name"], "in-use" in bitmap["flags"], "auto" in bitmap["flags"], depth)
        for depth, image in enumerate(chain)
        for bitmap in image.get("format-specific", {}).get("data", {}).get("bitmaps", [])
    ]


def remove_bitmap(host: Host, path: Path, name: str) -> None:
    """Remove a bitmap from the image at `path`, whatever its state. Busy if somebody writes the image."""
    try:
        host.run(["qemu-img", "bitmap", "--remove", str(path), name], timeout=60)
    except DiskError as error:
        if "lock" in str(error) or "another process" in str(error):
            raise Busy(f"{path} is being written by another process", hint="is the machine starting?") from None
        raise


def identity(path: Path, seen: Seen) -> str:
    """Changes when another image takes the place of the one at `path`; of a block device: its path."""
    if not seen.exists:
        raise HypervisorError(f"cannot reach {path}: {seen.trouble}")
    return f"{path}:{seen.inode}" if seen.is_file else str(path)


def read_nvram(host: Host, path: Path) -> bytes | None:
    """The UEFI variable store at `path`; None if it does not exist yet (the machine never ran)."""
    try:
        return host.read(path)
    except DiskError as error:
        raise HypervisorError(f"the NVRAM: {error}") from None


def write_nvram(host: Host, path: Path, content: bytes) -> None:
    """Put a UEFI variable store in place whole or not at all; libvirt gives it to QEMU's user at the start."""
    try:
        host.write(path, content)
    except DiskError as error:
        raise HypervisorError(f"the NVRAM: {error}") from None


def socket_folder(host: Host, uri: str, domain_id: int) -> Path | None:
    """The folder that libvirt made for the running machine `domain_id`: QEMU may write there under every AppArmor
    and SELinux policy. None if there is none."""
    if uri.endswith("/session"):
        root = Path(os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")) / "libvirt/qemu/lib"
    else:
        root = Path("/var/lib/libvirt/qemu")
    found = host.names(root, f"domain-{domain_id}-*")
    return root / found[0] if found else None
