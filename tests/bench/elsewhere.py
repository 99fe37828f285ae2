"""How fast disks are read from and written to another host over SSH, against the same on this one; and what that puts
on the wire.

    python -m tests.bench.elsewhere [--size MIB]

The other host is this machine, so both ends of the encryption run on its processors: a real one has the other end's
for itself. Half of the disk is data that does not compress, half is empty.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.contracts.sshd import Wire
from tests.hosts.host import start_host
from tests.hosts.remote import ssh_host
from workers.contract.extents import Kind
from workers.contract.hosts import Host
from workers.disks.far_target import FarTarget
from workers.disks.images import export_readonly, stop_exports
from workers.disks.nbd_source import NbdSource
from workers.disks.targets import Qcow2Target
from workers.hosts.local import LOCAL
from workers.parallel import share_out

MIB = 1 << 20
THREADS = 2
ROUNDS = 5


def data_of(source: NbdSource) -> Iterator[tuple[int, int]]:
    for extent in source.extents():
        if extent.kind is Kind.DATA:
            for offset in range(extent.start, extent.end, MIB):
                yield offset, min(MIB, extent.end - offset)


def read(host: Host, image: Path, runtime: Path) -> float:
    """Bytes per second of data."""
    host.make_folder(runtime, 0o700)
    export_readonly(host, image, "qcow2", runtime / "disk.sock", bitmap=None)
    got: list[int] = []

    def some(ranges: Iterator[tuple[int, int]]) -> None:
        got.append(sum(len(data) for _, data in source.read(ranges)))

    try:
        with host.socket(runtime / "disk.sock") as socket:
            source = NbdSource(socket, "")
            begun = time.monotonic()
            share_out(data_of(source), some, THREADS)
            return sum(got) / (time.monotonic() - begun)
    finally:
        stop_exports(host, runtime)
        host.remove([runtime])


def write(make: Callable[[], Qcow2Target | FarTarget], piece: bytes, offsets: list[int]) -> float:
    begun = time.monotonic()
    target = make()
    share_out(((offset, piece) for offset in offsets), target.write, THREADS)
    target.close()
    return len(piece) * len(offsets) / (time.monotonic() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="MiB of the disk")
    size = parser.parse_args().size * MIB
    piece, offsets = os.urandom(MIB), [*range(0, size, 2 * MIB)]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        base = Path(name)
        base.chmod(0o755)
        lab = start_host(base / "lab", "lab1", ssh=True)
        wire = Wire(lab.port)
        ranges = [(offset, MIB) for offset in offsets]
        image, new = base / "disk.qcow2", base / "new.qcow2"
        write(lambda: Qcow2Target(image, size, lambda: ranges), piece, offsets)
        try:
            with ssh_host(lab, base / "run") as far, ssh_host(lab, base / "run2", wire.port) as counted:
                rates: dict[str, list[float]] = {"read here": [], "read there": [], "write here": [], "write there": []}
                for _ in range(ROUNDS):
                    rates["read here"].append(read(LOCAL, image, base / "r"))
                    rates["read there"].append(read(far, image, base / "r"))
                    rates["write here"].append(write(lambda: Qcow2Target(new, size, lambda: ranges), piece, offsets))
                    new.unlink()
                    there = write(lambda: FarTarget(far, base / "w", new, "qcow2", size, {}), piece, offsets)
                    rates["write there"].append(there)
                    new.unlink()
                counted.run(["true"])
                before = wire.passed
                read(counted, image, base / "r")
                after_read = wire.passed
                write(lambda: FarTarget(counted, base / "w", new, "qcow2", size, {}), piece, offsets)
                after_write = wire.passed
        finally:
            wire.close()
            lab.close()
    data = MIB * len(offsets)
    for label, values in rates.items():
        print(f"{label:12} {statistics.median(values) / MIB:6.0f} MiB/s")
    for what in ("read", "write"):
        ratio = statistics.median(rates[f"{what} there"]) / statistics.median(rates[f"{what} here"])
        print(f"{what}: {ratio:.2f} of the speed here")
    crossed = [(after_read - before) / data, (after_write - after_read) / data]
    print(f"on the wire: read {crossed[0]:.3f}, write {crossed[1]:.3f} of the data")


if __name__ == "__main__":
    main()
