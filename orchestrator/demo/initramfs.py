"""The guests' initramfs: busybox, the host's own qemu-ga with its libraries, and the kernel's drivers, as a cpio.

Written here instead of by the `cpio` program, so that the same parts give the same bytes (times, owners and inode
numbers are fixed): the file's hash is then its name in the cache, and a new qemu-ga or kernel makes a new file by
itself. Not compressed: unpacking under emulation costs more than reading a few more megabytes.
"""

from __future__ import annotations

import hashlib
import shutil
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path

from orchestrator.demo.kernel import GuestBuildError, Kernel

HERE = Path(__file__).parent


def build_initramfs(kernel: Kernel, cache: Path) -> Path:
    """The initramfs for `kernel` in `cache`, made if it is not there. Raises GuestBuildError."""
    archive = pack(_files(kernel))
    path = cache / f"initramfs-{hashlib.sha256(archive).hexdigest()[:16]}.cpio"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_bytes(archive)
        fresh.rename(path)
    return path


def pack(files: Mapping[str, tuple[int, bytes]]) -> bytes:
    """A cpio archive (SVR4 "newc", as the kernel's buffer format describes) of `files`: path → (mode, content).
    Parent folders are added; a symbolic link's content is its target."""
    entries: dict[str, tuple[int, bytes]] = {}
    for name in sorted(files):
        for parent in reversed(Path(name).parents[:-1]):
            entries.setdefault(str(parent), (stat.S_IFDIR | 0o755, b""))
        entries[name] = files[name]
    out = bytearray()
    for number, (name, (mode, content)) in enumerate(entries.items(), start=1):
        _append(out, number, name, mode, content)
    _append(out, 0, "TRAILER!!!", 0, b"")
    return bytes(out)


def _append(out: bytearray, number: int, name: str, mode: int, content: bytes) -> None:
    label = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(label), 0)
    out += b"070701" + b"".join(b"%08X" % field for field in fields) + label
    out += bytes(-len(out) % 4)
    out += content
    out += bytes(-len(out) % 4)


def _files(kernel: Kernel) -> dict[str, tuple[int, bytes]]:
    program = stat.S_IFREG | 0o755
    busybox = _program("busybox", "busybox-static")
    files: dict[str, tuple[int, bytes]] = {
        "init": (program, (HERE / "tiny_init.sh").read_bytes()),
        "sbin/mount-data": (program, (HERE / "tiny_mount_data.sh").read_bytes()),
        "sbin/shutdown": (program, (HERE / "tiny_shutdown.sh").read_bytes()),
        "bin/sh": (stat.S_IFLNK | 0o777, b"busybox"),
        "bin/busybox": (program, busybox.read_bytes()),
        "modules/order": (stat.S_IFREG | 0o644, "".join(f"{path.name}\n" for path in kernel.modules).encode()),
    }
    for module in kernel.modules:
        files[f"modules/{module.name}"] = (stat.S_IFREG | 0o644, module.read_bytes())
    agent = _program("qemu-ga", "qemu-guest-agent")
    files["usr/sbin/qemu-ga"] = (program, agent.read_bytes())
    for library in _libraries(agent):
        files[str(library).lstrip("/")] = (program, library.read_bytes())
    if _libraries(busybox):
        raise GuestBuildError("busybox here needs shared libraries", hint="on Debian: apt-get install busybox-static")
    return files


def _program(name: str, package: str) -> Path:
    # /usr/sbin is not on everybody's PATH.
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if found is None:
        raise GuestBuildError(f"{name} is not installed", hint=f"on Debian: apt-get install {package}")
    return Path(found)


def _libraries(program: Path) -> list[Path]:
    """Shared libraries of `program` and its loader, by the paths under which it looks for them."""
    done = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False, env={"LC_ALL": "C"})
    if done.returncode != 0 and "not a dynamic executable" in done.stderr:
        return []
    lost = [line.split()[0] for line in done.stdout.splitlines() if "not found" in line]
    if done.returncode != 0 or lost:
        raise GuestBuildError(f"libraries of {program} are missing: {', '.join(lost) or done.stderr.strip()}")
    words = done.stdout.split()
    return [Path(word) for word in dict.fromkeys(words) if word.startswith("/")]
