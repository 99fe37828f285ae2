"""A full guest: a whole Debian (or Ubuntu, as the host is) with systemd, the packaged guest agent and sshd.

The tiny guest has no init system, no udev, no log that writes by itself; what works there may still fail where file
systems are busy and the agent is a service. Built by mmdebstrap from the host's own package sources, turned into an
image by mke2fs without a mount, and cached under the hash of the recipe. A new image is made once a month at the
latest, so that it does not rot.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import libvirt

from orchestrator.demo.disks import make_ext4_disk
from orchestrator.demo.kernel import GuestBuildError
from orchestrator.demo.tiny_guest import CMDLINE, TinyDisk, TinyImage, tiny_xml
from tests.guests.machines import MACHINE_PREFIX, MIB, Guest

PACKAGES = "systemd,systemd-sysv,udev,dbus,qemu-guest-agent,openssh-server,e2fsprogs,iproute2,procps"
SIZE = 2 << 30

# Run in the new system's root ($1) before it becomes an image. Without a network and a console login it boots faster.
SETUP = r"""
set -e
echo full-guest > "$1/etc/hostname"
printf '/dev/vda / ext4 defaults,noatime 0 1\n' > "$1/etc/fstab"
printf '/dev/vdb /data/vdb ext4 nofail,noatime,x-systemd.device-timeout=180s 0 2\n' >> "$1/etc/fstab"
mkdir -p "$1/data/vdb" "$1/root/.ssh"
printf '[Match]\nName=en* eth*\n[Network]\nDHCP=yes\n' > "$1/etc/systemd/network/20-dhcp.network"
chroot "$1" systemctl enable -q systemd-networkd ssh
chroot "$1" systemctl mask -q systemd-networkd-wait-online.service getty@tty1.service apt-daily.timer \
    apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service
chroot "$1" passwd -q -d root
rm -f "$1/etc/machine-id" && : > "$1/etc/machine-id"
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a full guest is made of. What `setup` leaves in /data/vdb becomes the content of the second disk."""

    name: str = "full"
    packages: str = PACKAGES
    setup: str = SETUP
    size: int = SIZE
    data_size: int = 128 * MIB


FULL = Recipe()


def build_full_image(cache: Path, recipe: Recipe = FULL) -> tuple[Path, Path]:
    """System and data disk of the full guest (qcow2, ext4 without a partition table) in `cache`, built if they are
    not there; copy them before use. Takes a minute or two and network access the first time. Raises GuestBuildError."""
    codename = _codename()
    month = datetime.date.today().strftime("%Y-%m")
    text = "\n".join([codename, recipe.packages, str(recipe.size), str(recipe.data_size), recipe.setup, month])
    stem = f"{recipe.name}-{codename}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    system, data = cache / f"{stem}.qcow2", cache / f"{stem}-vdb.qcow2"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{recipe.name}.lock").open("w") as lock:
        # Two test runs must not build the same thing twice.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (system.exists() and data.exists()):
            for old in cache.glob(f"{recipe.name}-*.qcow2"):
                old.unlink()
            _build(codename, recipe, system, data)
    return system, data


def _build(codename: str, recipe: Recipe, system: Path, data: Path) -> None:
    if shutil.which("mmdebstrap") is None:
        raise GuestBuildError("mmdebstrap is not installed", hint="try: deploy/install-packages --dev")
    with tempfile.TemporaryDirectory(dir=system.parent, prefix=".full-") as name:
        root = Path(name) / "root"
        argv = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={recipe.packages}"]
        argv += ["--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/locale/*"]
        argv += ["--dpkgopt=path-exclude=/usr/share/man/*", f"--customize-hook={recipe.setup.replace('$1', '${1}')}"]
        argv += [codename, str(root), *_sources(codename)]
        # /usr/sbin is not on everybody's PATH, and dpkg insists on it.
        environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin", "LC_ALL": "C"}
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            raise GuestBuildError(f"mmdebstrap failed: {done.stderr.strip()[-2000:]}")
        second = Path(name) / "vdb"
        (root / "data/vdb").rename(second)
        (root / "data/vdb").mkdir()
        for content, size, path in ((second, recipe.data_size, data), (root, recipe.size, system)):
            image = Path(name) / "image.qcow2"
            make_ext4_disk(image, size, content=content)
            image.rename(path)


def _codename() -> str:
    found = re.search(r"^VERSION_CODENAME=(\S+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    if found is None:
        raise GuestBuildError("the full guest is built from this host's distribution, which has no code name")
    return found.group(1).strip('"')


def _sources(codename: str) -> list[str]:
    """The host's own package sources of its distribution, as files for mmdebstrap; sources of others are left out."""
    suite = re.compile(rf"(?<![\w-]){re.escape(codename)}(-updates|-security)?(?![\w-])")
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    texts = {path: path.read_text() for path in files if path.suffix in (".list", ".sources") and path.is_file()}
    return [str(path) for path, text in texts.items() if suite.search(re.sub(r"(?m)#.*$", "", text))]


def define_full(
    connection: libvirt.virConnect,
    name: str,
    image: TinyImage,
    disks: list[TinyDisk],
    folder: Path,
    *,
    ssh_port: int | None = None,
) -> libvirt.virDomain:
    """Define a full guest that boots `image` with the system on the first of `disks`; its console's text goes to
    `folder/<name>.log`. With `ssh_port` it has a network card, and its sshd answers on that port of 127.0.0.1."""
    xml = tiny_xml(
        name,
        image,
        disks,
        folder / f"{name}.log",
        cmdline=f"{CMDLINE} root=/dev/{disks[0].target} systemd.show_status=false",
        memory_mib=768,
    )
    # Without a source of randomness sshd and systemd wait for the kernel's.
    seed = "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"
    xml = xml.replace("</devices>", f"{seed}</devices>")
    if ssh_port is not None:
        # libvirt's own user networking forwards no ports. It gives out slots from the bottom.
        words = ["-netdev", f"user,id=ssh,restrict=on,hostfwd=tcp:127.0.0.1:{ssh_port}-:22"]
        words += ["-device", "virtio-net-pci,netdev=ssh,addr=0x1e"]
        arguments = "".join(f"<qemu:arg value='{word}'/>" for word in words)
        xml = xml.replace("</domain>", f"<qemu:commandline>{arguments}</qemu:commandline></domain>")
        xml = xml.replace("<domain ", "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' ", 1)
    return connection.defineXML(xml)


def make_full_guest(
    connection: libvirt.virConnect,
    image: TinyImage,
    cache: Path,
    folder: Path,
    *,
    label: str = "full",
    ssh_port: int | None = None,
    recipe: Recipe = FULL,
) -> Guest:
    """A full guest in a folder of its own under `folder`, shut off: the system on vda, an ext4 vdb that is empty if
    the recipe puts nothing there."""
    name = f"{MACHINE_PREFIX}{os.getpid()}-{label}-1"
    home = folder / name
    home.mkdir(mode=0o755)
    disks = [TinyDisk("vda", home / "vda.qcow2"), TinyDisk("vdb", home / "vdb.qcow2")]
    for cached, disk in zip(build_full_image(cache, recipe), disks, strict=True):
        shutil.copyfile(cached, disk.path)
    return Guest(define_full(connection, name, image, disks, home, ssh_port=ssh_port), disks, image, home)
