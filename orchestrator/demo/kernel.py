"""A kernel for the demo's guests, without installing one on this host.

The distribution's own package is downloaded through the machine's configured sources and unpacked beside the cache:
installing it would touch /boot and run the boot loader's hooks on a machine that only wanted to try us. A kernel in
/boot that can be read is the fallback, where there is no apt.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from workers.contract.errors import StillframeError
from workers.tools import run

# Small kernels made for virtual machines: Debian's, then Ubuntu's.
METAPACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual")

# In the order in which they must be loaded. What a kernel has built in, or does not know, is left out.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "failover",
    "net_failover",
    "virtio_net",
    "crc16",
    "crc32c_generic",
    "libcrc32c",
    "mbcache",
    "jbd2",
    "ext4",
)
NEEDED = ("virtio_pci", "virtio_blk", "virtio_console", "ext4")


class GuestBuildError(StillframeError):
    """A guest of the demo cannot be made on this host."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel image and its modules, as uncompressed files in loading order."""

    image: Path
    modules: tuple[Path, ...]


def find_kernel(cache: Path) -> Kernel:
    """The kernel for guests: from `cache`, downloaded into it, or from /boot. Raises GuestBuildError."""
    problems: list[str] = []
    if shutil.which("apt-get") and shutil.which("dpkg-deb"):
        for metapackage in METAPACKAGES:
            package = _resolved(metapackage)
            if package is None:
                problems.append(f"apt knows no {metapackage}")
                continue
            return _read(_downloaded(package, cache))
    for tree in sorted(cache.glob("kernel/linux-image-*"), reverse=True):
        return _read(tree)
    for image in sorted(Path("/boot").glob("vmlinuz-*"), reverse=True):
        version = image.name.removeprefix("vmlinuz-")
        try:
            image.open("rb").close()
        except PermissionError:
            problems.append(f"{image} is readable by root only")
            continue
        return _pick(image, Path("/lib/modules") / version)
    problems.append("no kernel in /boot")
    raise GuestBuildError(
        f"no kernel for the demo's guest: {'; '.join(problems)}",
        hint="on Debian and Ubuntu: sudo apt-get update; elsewhere make a /boot/vmlinuz-* readable",
    )


def _resolved(metapackage: str) -> str | None:
    """The package with the kernel in it, on which `metapackage` depends today."""
    done = subprocess.run(["apt-cache", "depends", metapackage], capture_output=True, text=True, check=False)
    found = re.search(r"Depends: (linux-image-\d\S+)", done.stdout)
    return found.group(1) if found else None


def _downloaded(package: str, cache: Path) -> Path:
    """Folder with `package` unpacked; its name is the package's, so a newer kernel gets a folder of its own."""
    tree = cache / "kernel" / package
    if tree.is_dir():
        return tree
    tree.parent.mkdir(parents=True, exist_ok=True)
    # Ubuntu keeps the modules in a package of their own.
    wanted = [package]
    modules = package.replace("linux-image-", "linux-modules-")
    if subprocess.run(["apt-cache", "show", modules], capture_output=True, check=False).returncode == 0:
        wanted.append(modules)
    with tempfile.TemporaryDirectory(dir=tree.parent, prefix=".unpack-") as name:
        work = Path(name)
        done = subprocess.run(
            ["apt-get", "-qq", "download", *wanted], cwd=work, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise GuestBuildError(f"apt-get download {package}: {why}", hint="try: sudo apt-get update")
        for archive in work.glob("*.deb"):
            run(["dpkg-deb", "-x", str(archive), str(work / "tree")])
        for image in work.glob("tree/boot/vmlinuz-*"):
            image.chmod(0o644)
        try:
            (work / "tree").rename(tree)
        except OSError:
            # Another process was quicker; its tree is as good.
            if not tree.is_dir():
                raise
    return tree


def _read(tree: Path) -> Kernel:
    images = sorted(tree.glob("boot/vmlinuz-*"))
    folders = [*tree.glob("lib/modules/*"), *tree.glob("usr/lib/modules/*")]
    if not images or not folders:
        raise GuestBuildError(f"no kernel in {tree}", hint=f"remove it and try again: rm -r {tree}")
    return _pick(images[-1], folders[0])


def _pick(image: Path, folder: Path) -> Kernel:
    files = {path.name.split(".ko")[0].replace("-", "_"): path for path in folder.glob("kernel/**/*.ko*")}
    builtin_list = folder / "modules.builtin"
    text = builtin_list.read_text() if builtin_list.exists() else ""
    builtin = {Path(line).stem.replace("-", "_") for line in text.splitlines()}
    missing = [name for name in NEEDED if name not in files and name not in builtin]
    if missing:
        raise GuestBuildError(f"{image} has no {', '.join(missing)}", hint="another kernel in /boot may have them")
    chosen = [files[name] for name in MODULES if name in files]
    packed = [path.name for path in chosen if path.suffix != ".ko"]
    if packed:
        raise GuestBuildError(f"{folder}: modules are compressed ({packed[0]}): not supported for the demo's guest")
    return Kernel(image, tuple(chosen))
