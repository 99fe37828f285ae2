"""What a bucket costs against a folder. `python -m tests.bench.s3 [--mib 512] [--rounds 3] [--latency 30]`

  - write: a disk of system files through the whole write path, against what the place itself takes of the packs that
    come of it: plain files with fsync, plain `put_object`; and the packs alone through the store's `put_file`, which
    is what our guarding of creates costs; two threads everywhere;
  - restore: the same vault from a folder, from a bucket on the loopback, and from that bucket over a wire with latency.

The server is another process (localbucket) and has the same processors as we: the CPU that it and the wire take is
missing for the restore, so `CPU s` of this process is shown beside. All take turns in a round; medians are shown.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.bench.block_size import lay_out
from tests.vault.buckets import Server, free_port, running, serving
from tests.vault.pictures import point_of
from workers.contract.messages import RestoreDisk
from workers.contract.points import DiskPoint, Mode
from workers.contract.seams import Store
from workers.parallel import share_out
from workers.restore import restore_disk
from workers.vault import MapWriter, Vault, open_store

BLOCK, THREADS, KEY = 256 << 10, 2, bytes(32)


@dataclass
class Took:
    """One measurement of a piece of work on `size` bytes."""

    seconds: float
    cpu: float
    size: int


class Table:
    def __init__(self) -> None:
        self._rows: dict[str, list[Took]] = {}

    def measure(self, name: str, size: int, work: Callable[[], object]) -> None:
        started, cpu = time.perf_counter(), time.process_time()
        work()
        took = Took(time.perf_counter() - started, time.process_time() - cpu, size)
        self._rows.setdefault(name, []).append(took)

    def rate(self, name: str) -> float:
        return statistics.median(took.size / took.seconds / 1e6 for took in self._rows[name])

    def show(self, name: str, against: str) -> None:
        cpu = statistics.median(took.cpu for took in self._rows[name])
        ratio = self.rate(name) / self.rate(against)
        print(f"{name:<34} {self.rate(name):>8.0f} MB/s {cpu:>7.2f} CPU s   {ratio:>5.2f} × {against}")


def write_disk(store: Store, cache: Path, disk: memoryview) -> tuple[Vault, DiskPoint]:
    """What a transfer does, from memory."""
    vault = Vault.create(store, key=KEY, cache_dir=cache)[0]
    with vault.writer() as writer:
        blocks = MapWriter(writer, vault.reader(), len(disk), BLOCK, None)

        def work(indexes: Iterator[int]) -> None:
            for index in indexes:
                blocks.set(index, writer.put(disk[index * BLOCK : (index + 1) * BLOCK]))

        share_out(iter(range(blocks.count)), work, THREADS)
        root = blocks.finish()
        writer.finish()
    described = DiskPoint(
        target="vda",
        source="/images/vda",
        format="raw",
        identity="i",
        capacity=len(disk),
        block_size=BLOCK,
        root=root.hex(),
        mode=Mode.FULL,
        reason="a bench",
        checkpoint=None,
    )
    vault.commit(point_of("p1", [described]))
    return vault, described


class Bench:
    def __init__(self, folder: Path, server: Server, latency: int, stack: ExitStack) -> None:
        self.folder = folder
        self.server = server
        self.table = Table()
        self._names = iter(range(1_000_000))
        port = free_port()
        wire = [sys.executable, "-m", "tests.bench.delay", str(port), str(server.port), str(latency)]
        stack.enter_context(running(wire, port, folder / "wire.log"))
        self.far = server.through(port)
        stack.callback(self.far.close)

    def fresh(self) -> Path:
        path = self.folder / f"d{next(self._names)}"
        path.mkdir()
        return path

    def write(self, disk: memoryview) -> None:
        """Rows of the writes: `directory …` and `bucket …`."""
        place, url = self.fresh(), self.server.url()
        vaults: list[Vault] = []
        directory, bucket = open_store(f"file://{place}/v", create=True), self.server.store(url, create=True)
        for name, store in (("directory", directory), ("bucket", bucket)):
            cache = self.fresh()
            self.table.measure(
                f"{name}: disk", len(disk), lambda s=store, c=cache: vaults.append(write_disk(s, c, disk)[0])
            )
        packs = sorted((place / "v/packs").iterdir())
        size = sum(pack.stat().st_size for pack in packs)
        elsewhere = self.server.store(self.server.url(), create=True)
        self.table.measure("bucket: packs", size, lambda: self._each(packs, lambda pack: self._put(elsewhere, pack)))
        plain, client = self.fresh(), self.server.client()
        self.table.measure("files, plain", size, lambda: self._each(packs, lambda pack: self._file(plain, pack)))
        self.table.measure("objects, plain", size, lambda: self._each(packs, lambda pack: self._object(client, pack)))
        for vault in vaults:
            vault.close()

    def _each(self, packs: list[Path], work: Callable[[Path], None]) -> None:
        def run(some: Iterator[Path]) -> None:
            for pack in some:
                work(pack)

        share_out(iter(packs), run, THREADS)

    def _put(self, store: Store, pack: Path) -> None:
        path = store.staging() / f"{pack.name}-{threading.get_ident()}"
        os.link(pack, path)
        store.put_file(f"packs/{pack.name}", path)

    def _file(self, folder: Path, pack: Path) -> None:
        with (folder / pack.name).open("wb") as file:
            file.write(pack.read_bytes())
            file.flush()
            os.fsync(file.fileno())

    def _object(self, client: object, pack: Path) -> None:
        client.put_object(Bucket="plain", Key=f"{self.folder.name}/{pack.name}", Body=pack.read_bytes())  # type: ignore[attr-defined]

    def prepare(self, disk: memoryview) -> None:
        """One vault, in a folder and in a bucket."""
        self.place, self.url = self.fresh(), self.server.url()
        write_disk(open_store(f"file://{self.place}/v", create=True), self.fresh(), disk)[0].close()
        store = self.server.store(self.url, create=True)
        for path in sorted((self.place / "v").rglob("*")):
            name = str(path.relative_to(self.place / "v"))
            if path.is_file() and not name.startswith("."):
                store.put(name, path.read_bytes())

    def restore(self, size: int) -> None:
        stores = {
            "restore: directory": lambda: open_store(f"file://{self.place}/v"),
            "restore: bucket": lambda: self.server.store(self.url),
            "restore: bucket, far": lambda: self.far.store(self.url),
        }
        for name, make in stores.items():
            vault = Vault.open(make(), key=KEY, cache_dir=self.folder / "cache")
            vault.reader()  # the look-up cache is there, as on every host that has backed up
            path = self.fresh() / "disk"
            command = RestoreDisk(
                job="a" * 32, vault="v", point="p1", target="vda", path=str(path), format="raw", standalone=True
            )
            self.table.measure(name, size, lambda v=vault, c=command: restore_disk(v, c, THREADS, lambda _: None))
            path.unlink()
            vault.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=int, default=30, help="milliseconds of a round trip")
    parser.add_argument("--root", type=Path, default=Path("/usr"))
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name, ExitStack() as stack:
        folder = Path(name)
        os.environ["TMPDIR"] = name  # where packs for a bucket are built
        image = folder / "disk"
        lay_out(options.root, options.mib << 20, image)
        server = stack.enter_context(serving(folder / "server", "localbucket"))
        bench = Bench(folder, server, options.latency, stack)
        file = stack.enter_context(image.open("rb"))
        mapped = stack.enter_context(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        disk = stack.enter_context(memoryview(mapped))
        bench.prepare(disk)
        for _ in range(options.rounds):
            bench.write(disk)
            bench.restore(len(disk))
    bench.table.show("directory: disk", "files, plain")
    for row in ("bucket: disk", "bucket: packs"):
        bench.table.show(row, "objects, plain")
    bench.table.show("bucket: disk", "directory: disk")
    for row in ("restore: directory", "restore: bucket", "restore: bucket, far"):
        bench.table.show(row, "restore: directory")


if __name__ == "__main__":
    main()
