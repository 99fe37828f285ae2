"""How fast a vault is verified, beside `sha256sum` on the same packs.

    python -m tests.bench.verify [--size MIB] [--rounds N] [--dir FOLDER]

A vault is filled with data that does not compress; then rounds of `sha256sum`, of the check of all packs and segments,
and of the full verification (hash, decrypt, hash again), one after the other. Printed: the median of each, the ratios,
and the peak memory of the process. FOLDER defaults to /dev/shm: the figures are of the processor, not of a disk.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.vault.pictures import point_of
from workers.contract.points import DiskPoint, Mode
from workers.vault import DirectoryStore, MapWriter, Vault
from workers.vault.verify import Level, verify, verify_packs

BLOCK = 256 << 10


def fill(vault: Vault, size: int) -> None:
    """One point with one disk of `size` bytes."""
    rng = random.Random(1)
    with vault.writer() as writer:
        blocks = MapWriter(writer, vault.reader(), size, BLOCK, None)
        for index in range(size // BLOCK):
            blocks.set(index, writer.put(memoryview(rng.randbytes(BLOCK))))
        root = blocks.finish()
        writer.finish()
    disk = DiskPoint(
        target="vda",
        source="/images/vda",
        format="raw",
        identity="i",
        capacity=size,
        block_size=BLOCK,
        root=root.hex(),
        mode=Mode.FULL,
        reason="a bench",
        checkpoint=None,
    )
    vault.commit(point_of("p1", [disk]))


def seconds(act: Callable[[], object]) -> float:
    started = time.monotonic()
    act()
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, metavar="MIB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.dir) as name:
        folder = Path(name)
        store = DirectoryStore(folder / "vault", create=True)
        vault = Vault.create(store, key=bytes(32), cache_dir=folder / "cache")[0]
        fill(vault, asked.size << 20)
        packs = sorted((folder / "vault/packs").iterdir())
        argv = ["sha256sum", *map(str, packs)]
        ways: dict[str, Callable[[], object]] = {
            "sha256sum": lambda: subprocess.run(argv, check=True, capture_output=True),
            "verify --packs": lambda: verify_packs(store),
            "verify --full": lambda: verify(vault, Level.FULL),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(asked.rounds):
            for way, act in ways.items():
                times[way].append(seconds(act))
        total = sum(path.stat().st_size for path in packs)
        reference = statistics.median(times["sha256sum"])
        print(f"{len(packs)} packs, {total >> 20} MiB, median of {asked.rounds} rounds")
        for way, measured in times.items():
            median = statistics.median(measured)
            print(f"{way:<15} {total / median / 1e6:7.0f} MB/s   {reference / median:.2f} × sha256sum")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"peak memory     {peak >> 10} MiB")


if __name__ == "__main__":
    main()
