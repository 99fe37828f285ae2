"""Image files: made, exported while their machine is off, and written at a restore, all by QEMU's own tools.

An offline export takes no lock on the image (`file.locking=off`): a machine that somebody starts meanwhile simply
starts, and the backup notices and drops itself (DESIGN section 4: a start wins). That the image did not change while
it was read is proved afterwards by its `stat`, not by a lock.
"""

from __future__ import annotations

from pathlib import Path

from workers.contract.hosts import Host, looked
from workers.contract.machines import Value
from workers.contract.messages import ImageFormat

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


def fingerprint(host: Host, path: Path) -> Fingerprint:
    """Raises DiskError if the image cannot be looked at."""
    found = looked(host, path)
    return Fingerprint(
        device=found.device, inode=found.inode, size=found.size, mtime_ns=found.mtime_ns, ctime_ns=found.ctime_ns
    )


def driver(format: ImageFormat) -> str:
    """QEMU's name of a format."""
    return _DRIVERS.get(format, format)


def create(host: Host, path: Path, format: ImageFormat, size: int, options: dict[str, str] | None = None) -> None:
    """A new, empty image of `size` bytes that grows as it is written; of `options`, those that a qcow2 knows are
    used for one."""
    argv = ["qemu-img", "create", "-q", "-f", driver(format)]
    kept = _SUBFORMATS.get(format, {})
    if format == "qcow2":
        kept = {name: value for name, value in (options or {}).items() if name in _KEPT_OPTIONS}
    if kept:
        argv += ["-o", ",".join(f"{name}={value}" for name, value in sorted(kept.items()))]
    host.run([*argv, str(path), str(size)])


def _quoted(path: Path) -> str:
    return str(path).replace(",", ",,")  # QEMU's own escape inside options


def export_readonly(host: Host, image: Path, format: str, socket: Path, *, bitmap: str | None) -> None:
    """Serve an image of a machine that is off, at `socket`, until `stop_exports`. Export name: empty."""
    driver = "host_device" if looked(host, image).is_block_device else "file"
    locking = ",file.locking=off" if driver == "file" else ""
    options = f"driver={format},file.driver={driver},file.filename={_quoted(image)}{locking}"
    _serve(host, ["--read-only", "--image-opts", options, *(["--bitmap", bitmap] if bitmap else [])], socket)


def export_writable(host: Host, image: Path, format: ImageFormat, socket: Path) -> None:
    """Serve a new image to be written, at `socket`, until `stop_exports`. Export name: empty."""
    _serve(host, ["--format", driver(format), "--discard=unmap", str(image)], socket)


def _serve(host: Host, arguments: list[str], socket: Path) -> None:
    pid_file = socket.with_suffix(".pid")
    serve = ["qemu-nbd", "--fork", "--persistent", "--shared=0", "--pid-file", str(pid_file), "--socket", str(socket)]
    host.run([*serve, *arguments])


def stop_exports(host: Host, folder: Path) -> None:
    """End every qemu-nbd that serves a socket in `folder`, and wait for it. The process's own command line must name
    the folder: a pid that was taken over by another program is left alone (invariant 4)."""
    for name in host.names(folder, "*.pid"):
        host.end(folder / name, str(folder))
        host.remove([folder / name])
