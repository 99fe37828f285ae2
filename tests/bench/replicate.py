"""What a replica costs beside copies that know nothing of vaults.

    python -m tests.bench.replicate [--size GIB] [--dir FOLDER]

A vault of real files is copied to a second folder by `vault replicate`'s own function, by `cp -r`, and by `rclone copy`
where that is installed; then, with a tenth more in the vault, again. Ours checks the SHA-256 of every pack on the way,
so `cp` followed by `sha256sum` of the copy, on all cores, is there too. The folder is on tmpfs unless told otherwise.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from tests.bench.machine import folder, system_files
from tests.vault.pictures import KEY
from workers.vault import Vault, open_store
from workers.vault.replicate import replicate
from workers.vault.stores import DirectoryStore

BLOCK = 256 << 10
MIB = 1 << 20
ROUNDS = 3


def fill(vault: Vault, data: bytes) -> None:
    with vault.writer() as writer:
        for at in range(0, len(data), BLOCK):
            writer.put(memoryview(data)[at : at + BLOCK])
        writer.finish()


def ours(source: Path, target: Path) -> None:
    report = replicate(DirectoryStore(source), DirectoryStore(target, create=True), delay=timedelta(days=7))
    assert not report.not_copied


def cp(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    subprocess.run(["cp", "-ru", f"{source}/.", target], check=True)


def cp_checked(source: Path, target: Path) -> None:
    """What one would do by hand to know that the copy is right."""
    cp(source, target)
    check = "find packs index -type f -print0 | xargs -0 -P2 -n4 sha256sum >/dev/null"
    subprocess.run(check, shell=True, cwd=target, check=True)


def rclone(source: Path, target: Path) -> None:
    subprocess.run(["rclone", "copy", "--config", "/dev/null", source, target], check=True)


def timed(act: Callable[[Path, Path], None], source: Path, target: Path) -> float:
    began = time.perf_counter()
    act(source, target)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=0.5, metavar="GIB")
    parser.add_argument("--dir", default="/dev/shm", metavar="FOLDER")
    asked = parser.parse_args()
    contestants = {"replicate": ours, "cp -r": cp, "cp, sha256": cp_checked}
    if shutil.which("rclone"):
        contestants["rclone copy"] = rclone
    with folder(asked.dir) as base:
        image = base / "image"
        system_files(image, int(asked.size * (1 << 30)))
        data = image.read_bytes()
        image.unlink()
        vault, _ = Vault.create(open_store(f"file://{base}/vault", create=True), key=KEY, cache_dir=base / "cache")
        part = len(data) * 10 // 11
        fill(vault, data[:part])
        first = best(contestants, base)
        size = sum(info.size for info in vault.store.list("packs/"))
        for name in contestants:
            timed(contestants[name], base / "vault", base / name.replace(" ", "_"))
        fill(vault, data[part:])
        print(f"{size / MIB:.0f} MiB in packs; best of {ROUNDS}")
        for name, seconds in first.items():
            again = timed(contestants[name], base / "vault", base / name.replace(" ", "_"))
            ratio = first["cp -r"] / seconds
            print(
                f"{name:<12} {seconds:6.2f} s {size / MIB / seconds:6.0f} MiB/s {ratio:5.2f} × cp, more: {again:.2f} s"
            )


def best(contestants: dict[str, Callable[[Path, Path], None]], base: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, act in contestants.items():
            target = base / name.replace(" ", "_")
            seconds = timed(act, base / "vault", target)
            shutil.rmtree(target)
            found[name] = min(seconds, found.get(name, seconds))
    return found


if __name__ == "__main__":
    main()
