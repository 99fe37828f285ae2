"""What a sweep costs, and how that grows; and how long it takes beside `prune` and `compact` of others.

    python -m tests.bench.sweep grow  [--blocks 1000000] [--points 10,100] [--dir FOLDER]
    python -m tests.bench.sweep peers [--size GIB] [--dir FOLDER]

`grow` makes a vault of so many different blocks (small ones: what counts is their number), points of one disk that each
change one block in a hundred, in runs; a tenth of the points is deleted. Each figure is a process of its own.
`peers` keeps ten generations of one disk image, deletes the first five, and lets each tool give the space back: sweep
with compaction, `restic forget --prune`, `borg delete` and `borg compact`. The folder is on tmpfs unless told
otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from tests.bench.machine import folder, system_files
from tests.vault.pictures import KEY, point_of
from workers.contract.points import DiskPoint, Mode
from workers.vault import BlockMap, MapWriter, Vault, open_store
from workers.vault.sweep import Settings, sweep
from workers.vault.writer import BlockWriter

BLOCK = 64 << 10
RUNS = 64
"""Places where an increment changes blocks."""
MIB = 1 << 20


def opened(base: Path) -> Vault:
    return Vault.open(open_store(f"file://{base}/vault"), key=KEY, cache_dir=base / "cache")


def created(base: Path) -> Vault:
    return Vault.create(open_store(f"file://{base}/vault", create=True), key=KEY, cache_dir=base / "cache")[0]


def disk(root: bytes, size: int) -> DiskPoint:
    fields = {"source": "/v", "format": "raw", "identity": "i", "reason": "a bench"}
    return DiskPoint(
        target="vda", capacity=size, block_size=BLOCK, root=root.hex(), mode=Mode.FULL, checkpoint=None, **fields
    )


# --- growth --------------------------------------------------------------------------------------------------------


def build(base: Path, blocks: int, points: int) -> None:
    vault, rng, size = created(base), random.Random(1), blocks * BLOCK
    with vault.writer() as writer:
        new = MapWriter(writer, vault.reader(), size, BLOCK, None)
        for index in range(blocks):
            new.set(index, writer.put(rng.randbytes(64)))
        root = new.finish()
        writer.finish()
    vault.commit(point_of("p000", [disk(root, size)]))
    for number in range(1, points):
        with vault.writer() as writer:
            root = increment(vault, writer, root, blocks, rng)
            writer.finish()
        vault.commit(point_of(f"p{number:03}", [disk(root, size)]))
    for number in range(points // 10):
        vault.store.delete(f"points/p{number * 10:03}")


def increment(vault: Vault, writer: BlockWriter, root: bytes, blocks: int, rng: random.Random) -> bytes:
    size, length = blocks * BLOCK, blocks // 100 // RUNS
    new = MapWriter(writer, vault.reader(), size, BLOCK, BlockMap(vault.reader(), root, size, BLOCK))
    at = 0
    for start in sorted(rng.sample(range(0, blocks - length, length), RUNS)):
        if start > at:
            new.inherit(at, start - at)
        for index in range(start, start + length):
            new.set(index, writer.put(rng.randbytes(64)))
        at = start + length
    if at < blocks:
        new.inherit(at, blocks - at)
    return new.finish()


def grow(base: Path, blocks: int, counts: list[int]) -> None:
    print(f"{blocks:,} blocks in the first point, {blocks // 100:,} new ones in each other\n")
    print(f"{'points':>6} {'blocks':>10} {'seconds':>8} {'peak MiB':>9} {'removed':>8}")
    seen = []
    for count in counts:
        place = base / str(count)
        place.mkdir()
        build(place, blocks, count)
        opened(place).reader()  # the look-up cache is warm on a host that makes backups
        argv = ["/usr/bin/time", "-f", "%e %M", sys.executable, "-m", "tests.bench.sweep", "once", "--dir", str(place)]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        seconds, kib = done.stderr.split()[-2:]
        stored, removed = done.stdout.split()
        seen.append((float(seconds), int(kib)))
        print(f"{count:6} {int(stored):10,} {float(seconds):8.1f} {int(kib) / 1024:9.0f} {removed:>8}", flush=True)
        shutil.rmtree(place)
    if len(seen) > 1:
        (first, small), (last, large) = seen[0], seen[-1]
        print(f"\n{counts[-1]} points / {counts[0]} points: time {last / first:.2f}, memory {large / small:.2f}")


def once(base: Path) -> None:
    vault = opened(base)
    report = sweep(vault, now=datetime.now(UTC), settings=Settings())
    print(vault.index.count()[0], report.removed)


# --- peers ---------------------------------------------------------------------------------------------------------


def generations(base: Path, size: float) -> list[Path]:
    """Ten images, each with a tenth of its MiBs changed."""
    rng, first = random.Random(2), base / "0.raw"
    system_files(first, int(size * (1 << 30)))
    made = [first]
    for number in range(1, 10):
        image = base / f"{number}.raw"
        shutil.copyfile(made[-1], image)
        with image.open("r+b") as file:
            total = image.stat().st_size // MIB
            for at in rng.sample(range(total), total // 10):
                file.seek(at * MIB)
                file.write(rng.randbytes(MIB))
        made.append(image)
    return made


def clock(what: str, argv: list[str], env: dict[str, str]) -> float:
    started = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **env}, check=False)
    if done.returncode:
        raise RuntimeError(f"{what}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return time.monotonic() - started


def used(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def ours(base: Path, images: list[Path]) -> tuple[float, int]:
    vault = created(base)
    for number, image in enumerate(images):
        size = image.stat().st_size
        with vault.writer() as writer, image.open("rb") as file:
            new = MapWriter(writer, vault.reader(), size, BLOCK, None)
            for index in range(-(-size // BLOCK)):
                new.set(index, writer.put(file.read(BLOCK)))
            root = new.finish()
            writer.finish()
        vault.commit(point_of(f"p{number}", [disk(root, size)]))
    for number in range(5):
        vault.store.delete(f"points/p{number}")
    vault.close()
    before = used(base / "vault")
    seconds = clock("sweep", [sys.executable, "-m", "tests.bench.sweep", "once", "--dir", str(base)], {})
    return seconds, before - used(base / "vault")


def restic(base: Path, images: list[Path]) -> tuple[float, int]:
    env = {"RESTIC_PASSWORD": "x", "RESTIC_REPOSITORY": str(base / "repo"), "RESTIC_CACHE_DIR": str(base / "cache")}
    clock("init", ["restic", "init", "--repository-version", "2"], env)
    for image in images:
        clock("backup", ["sh", "-c", 'restic backup --stdin --stdin-filename disk <"$0"', str(image)], env)
    before = used(base / "repo")
    seconds = clock("prune", ["restic", "forget", "--keep-last", "5", "--prune", "--group-by", ""], env)
    return seconds, before - used(base / "repo")


def borg(base: Path, images: list[Path]) -> tuple[float, int]:
    env = {"BORG_BASE_DIR": str(base), "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes"}
    repo = str(base / "repo")
    clock("init", ["borg", "init", "-e", "none", repo], env)
    for number, image in enumerate(images):
        argv = ["borg", "create", "--chunker-params", f"fixed,{BLOCK}", "--compression", "zstd,1"]
        clock("create", [*argv, f"{repo}::g{number}", str(image)], env)
    before = used(base / "repo")
    seconds = clock("delete", ["borg", "delete", "--glob-archives", "g[0-4]", repo], env)
    seconds += clock("compact", ["borg", "compact", "--threshold", "25", repo], env)
    return seconds, before - used(base / "repo")


def peers(base: Path, size: float) -> None:
    images = generations(base, size)
    times: dict[str, float] = {}
    for contestant in (ours, restic, borg):
        if contestant is not ours and shutil.which(contestant.__name__) is None:
            continue
        place = base / contestant.__name__
        place.mkdir()
        seconds, freed = contestant(place, images)
        times[contestant.__name__] = seconds
        print(f"{contestant.__name__:8} {seconds:7.2f} s, {freed / MIB:.0f} MiB given back", flush=True)
        shutil.rmtree(place)
    for name in ("restic", "borg"):
        if name in times:
            print(f"ours / {name}: {times['ours'] / times[name]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["grow", "peers", "once"])
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--points", default="10,100")
    parser.add_argument("--size", type=float, default=1.0)
    parser.add_argument("--dir", default="/dev/shm")
    options = parser.parse_args()
    if options.what == "once":
        once(Path(options.dir))
        return
    with folder(options.dir) as base:
        if options.what == "grow":
            grow(base, options.blocks, [int(count) for count in options.points.split(",")])
        else:
            peers(base, options.size)


if __name__ == "__main__":
    main()
