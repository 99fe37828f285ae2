"""Which block size by default? `python -m tests.bench.block_size [--mib 1024] [--rounds 3] [--dir /dev/shm]`

Three costs pull in different directions, and one table shows them side by side:
  - throughput of the write path (two threads, real system files laid end to end as a disk, new vault each time);
  - write amplification: 10,000 random 4 KiB writes on a 100 GiB disk make how many bytes of blocks to be read and
    stored (modelled: the expected number of different blocks hit, as random writes are the worst case);
  - index: bytes per TiB of different data, in segments, block map and look-up cache.
The sizes take turns within a round, and medians are shown, so that a slow minute of the machine hits all of them. MB
per CPU second is the figure to trust where others use the machine too.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from workers.vault import MapWriter, Vault, open_store

SIZES = [64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 4 << 20]
WRITES, DISK = 10_000, 100 << 30
ENTRY, PACK_ENTRY, ID, CACHE_ROW = 46, 46, 32, 60


def lay_out(root: Path, size: int, target: Path) -> None:
    """Files under `root`, sorted by path, each from a 4 KiB boundary, as a file system lays them out."""
    with target.open("wb") as out:
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if path.is_symlink() or not path.is_file():
                    continue
                data = path.read_bytes()
                out.write(data + bytes(-len(data) % 4096))
                if out.tell() >= size:
                    out.truncate(size)
                    return


def write_all(disk: memoryview, block_size: int, folder: Path, threads: int) -> tuple[float, float, int]:
    """Seconds, CPU seconds, and bytes in the store."""
    vault, _ = Vault.create(open_store(f"file://{folder}/vault", create=True), key=bytes(32), cache_dir=folder)
    started, cpu_started = time.perf_counter(), time.process_time()
    with vault.writer() as writer:
        block_map = MapWriter(writer, vault.reader(), len(disk), block_size, None)
        indexes = iter(range(block_map.count))
        lock = threading.Lock()

        def take() -> Iterator[int]:
            while True:
                with lock:
                    index = next(indexes, None)
                if index is None:
                    return
                yield index

        def work() -> None:
            for index in take():
                block_map.set(index, writer.put(disk[index * block_size : (index + 1) * block_size]))

        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        block_map.finish()
        writer.finish()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    stored = vault.stats().total_bytes
    vault.close()
    return seconds, cpu, stored


def amplification(block_size: int) -> float:
    """Bytes of the blocks that random 4 KiB writes touch, per byte written."""
    blocks = DISK // block_size
    touched = blocks * (1 - (1 - 1 / blocks) ** WRITES)
    return touched * block_size / (WRITES * 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--root", type=Path, default=Path("/usr"))
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"))
    options = parser.parse_args()
    seconds: dict[int, list[float]] = {size: [] for size in SIZES}
    cpu: dict[int, list[float]] = {size: [] for size in SIZES}
    stored: dict[int, int] = {}
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        image = Path(name, "disk")
        lay_out(options.root, options.mib << 20, image)
        with image.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            view = memoryview(mapped)
            for _ in range(options.rounds):
                for size in SIZES:
                    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
                        took, used, stored[size] = write_all(view, size, Path(folder), options.threads)
                    seconds[size].append(took)
                    cpu[size].append(used)
            total = len(view)
            view.release()
    print(f"{total >> 20} MiB of {options.root}, {options.threads} threads, {options.rounds} rounds\n")
    print("| block | MB/s | MB/CPU s | stored | amplification | 10,000 writes cost | index/TiB | map/TiB | cache/TiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in SIZES:
        rate, per_cpu = (total / statistics.median(times[size]) / 1e6 for times in (seconds, cpu))
        blocks = (1 << 40) // size
        print(
            f"| {size >> 10} KiB | {rate:.0f} | {per_cpu:.0f} | {stored[size] / total:.3f} | {amplification(size):.0f} "
            f"| {amplification(size) * WRITES * 4096 / (1 << 30):.1f} GiB "
            f"| {blocks * (ENTRY + PACK_ENTRY) / (1 << 20):.0f} MiB | {blocks * ID / (1 << 20):.0f} MiB "
            f"| {blocks * CACHE_ROW / (1 << 20):.0f} MiB |"
        )


if __name__ == "__main__":
    main()
