"""What the size of a disk costs: an 8 TiB sparse disk beside one of 8 GiB, both with the same data.

    python -m tests.bench.sparse [--rounds N] [--dir FOLDER]

Each disk gets 100 MiB of data, a full backup, and then `rounds` incrementals of 100 changed blocks all over the disk.
Printed: seconds, stored metadata, and the peak memory of the whole process.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.bench.machine import NAME, STILLFRAME, folder, install, paused_machine, write

MIB = 1 << 20
SIZES = {"8 GiB": 8 << 30, "8 TiB": 8 << 40}


def backup(config: Path) -> tuple[float, dict[str, Any], int]:
    """Seconds of the whole command, the new point's only disk, and the peak of resident memory in KiB."""
    started = time.monotonic()
    subprocess.run(
        [STILLFRAME, "backup", "run", NAME, "--json", "--config", str(config)], check=True, capture_output=True
    )
    seconds = time.monotonic() - started
    listed = subprocess.run(
        [STILLFRAME, "point", "list", NAME, "--json", "--config", str(config)],
        check=True,
        capture_output=True,
        text=True,
    )
    disk: dict[str, Any] = json.loads(listed.stdout.splitlines()[-1])["disks"][0]
    return seconds, disk, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def measure(label: str, size: int, base: Path, rounds: int) -> list[float]:
    base.mkdir()
    base.chmod(0o755)
    image = base / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(size)], check=True)
    image.chmod(0o666)
    config = install(base)
    rng = random.Random(2)
    with paused_machine({"vda": image}) as domain:
        for _ in range(100):
            write(domain, "vda", rng.randrange(size // MIB) * MIB, MIB, rng.randrange(1, 256))
        seconds, disk, peak = backup(config)
        print(f"{label}: full {seconds:.2f} s, metadata {disk['metadata_bytes'] / 1024:.1f} KiB, peak {peak >> 10} MiB")
        times, metadata = [], []
        for _ in range(rounds):
            for _ in range(100):
                write(domain, "vda", rng.randrange(size // MIB) * MIB, 4096, rng.randrange(1, 256))
            seconds, disk, peak = backup(config)
            times.append(seconds)
            metadata.append(disk["metadata_bytes"] / 1024)
        print(
            f"{label}: incremental of 100 blocks {statistics.median(times):.2f} s,"
            f" metadata {statistics.median(metadata):.1f} KiB, peak {peak >> 10} MiB"
        )
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", default="/dev/shm")
    options = parser.parse_args()
    medians = {}
    with folder(options.dir) as base:
        for label, size in SIZES.items():
            medians[label] = statistics.median(measure(label, size, base / label.split()[1], options.rounds))
    print(
        f"8 TiB / 8 GiB: {medians['8 TiB'] / medians['8 GiB']:.2f}   aim ≤ 1.5; metadata aim ≤ 300 KiB, peak ≤ 200 MiB"
    )


if __name__ == "__main__":
    main()
