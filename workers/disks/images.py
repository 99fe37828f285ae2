"""Image files: made, exported while their machine is off, and written at a restore, all by QEMU's own tools.

An offline export takes no lock on the image (`file.locking=off`): a machine that somebody starts meanwhile simply
starts, and the backup notices and drops itself (DESIGN section 4: a start wins). That the image did not change while
it was read is proved afterwards by its `stat`, not by a lock.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from workers.contract.errors import DiskError
from workers.contract.machines import Value
from workers.contract.messages import ImageFormat
from workers.tools import run

_KEPT_OPTIONS = frozenset({"cluster_size", "compat", "lazy_refcounts", "refcount_bits", "extended_l2"})
_DRIVERS = {"vhd": "vpc"}
"""QEMU's own names, where they differ."""
_SUBFORMATS = {
    # Without force_size, a VHD's size is rounded to a geometry of cylinders.
    "vhd": {"subformat": "dynamic", "force_size": "on"},
    "vhdx": {"subformat": "dynamic"},
    "vmdk": {"subformat": "monolithicSparse"},
}


class Fingerprint(Value):
    """Changes whenever the file is written or replaced."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


def fingerprint(path: Path) -> Fingerprint:
    """Raises DiskError if the image cannot be looked at."""
    try:
        found = path.stat()
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror}") from None
    return Fingerprint(
        device=found.st_dev,
        inode=found.st_ino,
        size=found.st_size,
        mtime_ns=found.st_mtime_ns,
        ctime_ns=found.st_ctime_ns,
    )


def driver(format: ImageFormat) -> str:
    """QEMU's name of a format."""
    return _DRIVERS.get(format, format)


def create(path: Path, format: ImageFormat, size: int, options: dict[str, str] | None = None) -> None:
    """A new, empty image of `size` bytes that grows as it is written; of `options`, those that a qcow2 knows are
    used for one."""
    argv = ["qemu-img", "create", "-q", "-f", driver(format)]
    kept = _SUBFORMATS.get(format, {})
    if format == "qcow2":
        kept = {name: value for name, value in (options or {}).items() if name in _KEPT_OPTIONS}
    if kept:
        argv += ["-o", ",".join(f"{name}={value}" for name, value in sorted(kept.items()))]
    run([*argv, str(path), str(size)])


def _quoted(path: Path) -> str:
    return str(path).replace(",", ",,")  # QEMU's own escape inside options


def export_readonly(image: Path, format: str, socket: Path, *, bitmap: str | None) -> None:
    """Serve an image of a machine that is off, at `socket`, until `stop_exports`. Export name: empty."""
    driver = "host_device" if image.is_block_device() else "file"
    locking = ",file.locking=off" if driver == "file" else ""
    options = f"driver={format},file.driver={driver},file.filename={_quoted(image)}{locking}"
    _serve(["--read-only", "--image-opts", options, *(["--bitmap", bitmap] if bitmap else [])], socket)


def _serve(arguments: list[str], socket: Path) -> None:
    pid_file = socket.with_suffix(".pid")
    run(
        [
            "qemu-nbd",
            "--fork",
            "--persistent",
            "--shared=0",
            "--pid-file",
            str(pid_file),
            "--socket",
            str(socket),
            *arguments,
        ]
    )


def stop_exports(folder: Path) -> None:
    """End every qemu-nbd that serves a socket below `folder`, and wait for it. The process's own command line must name
    the folder: a pid that was taken over by another program is left alone (invariant 4)."""
    for pid_file in sorted(folder.rglob("*.pid")):
        pid = int(pid_file.read_text().strip() or 0)
        if pid and str(folder) in _command_line(pid):
            handle = os.pidfd_open(pid)
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGTERM)
            _wait(handle, pid)
            os.close(handle)
        pid_file.unlink(missing_ok=True)


def _wait(handle: int, pid: int, seconds: float = 60.0) -> None:
    import select

    if not select.select([handle], [], [], seconds)[0]:
        raise DiskError(f"qemu-nbd (process {pid}) did not end within {seconds:.0f} s")


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
