"""Disks with an ext4 file system inside, made without mounting anything on the host (no root, no loop device)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from orchestrator.demo.kernel import GuestBuildError
from workers.tools import run


def make_ext4_disk(path: Path, size: int, *, format: str = "qcow2", content: Path | None = None) -> None:
    """Make a disk image of `size` bytes at `path` with an ext4 file system on it (no partition table), holding the
    files under `content`. The file system is initialised completely: otherwise the guest's kernel would go on doing so
    after the mount, and every incremental would show changes that nobody made."""
    mke2fs = shutil.which("mke2fs") or shutil.which("mke2fs", path="/usr/sbin:/sbin")
    if mke2fs is None:
        raise GuestBuildError("mke2fs is not installed", hint="on Debian: apt-get install e2fsprogs")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".mke2fs-") as work:
        raw = Path(work) / "disk.raw"
        with raw.open("wb") as file:
            file.truncate(size)
        extra = ["-d", str(content)] if content else []
        options = "lazy_itable_init=0,lazy_journal_init=0,nodiscard,root_owner=0:0"
        run([mke2fs, "-q", "-F", "-t", "ext4", "-m", "0", "-E", options, *extra, str(raw)], timeout=600)
        if format == "raw":
            raw.rename(path)
        else:
            run(["qemu-img", "convert", "-f", "raw", "-O", format, str(raw), str(path)], timeout=600)


def make_empty_disk(path: Path, size: int, *, format: str = "qcow2") -> None:
    """Make a disk image of `size` bytes at `path` with nothing on it."""
    run(["qemu-img", "create", "-q", "-f", format, str(path), str(size)])
