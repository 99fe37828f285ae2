"""Stillframe beside virtnbdbackup, borg and restic, and beside what this machine can do at all.

    python -m tests.bench.compare [--size GIB] [--rounds N] [--dir FOLDER] [--only NAMES]

One disk of real system files behind a running machine. In each round the contestants run one after the other on the
same bytes; medians over the rounds are printed as one table with ratios. The peers get it easier: borg and restic read
a raw file instead of an export, and borg neither encrypts nor authenticates. The folder is on tmpfs unless told
otherwise: the disk of a small cloud machine is throttled after bursts, for a minute and more.

`limit` is the processor time that cannot be avoided: moving the bytes out of an NBD server (nbdcopy to null, both
sides), BLAKE3, zstd 1 and AES-GCM over them in memory, and writing the result, divided by the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.machine import NAME, STILLFRAME, folder, install, paused_machine, system_files, write

MIB = 1 << 20
DIRTY = 64 * MIB


@dataclass
class Bench:
    base: Path
    domain: Any
    raw: Path
    size: int
    rounds: int
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    rng: random.Random = field(default_factory=lambda: random.Random(1))

    def clock(self, what: str, argv: list[str], env: dict[str, str] | None = None) -> str:
        """Run a whole process and note its seconds; its output."""
        if not what.startswith(("incremental", "no change")):
            self.warm()
        started = time.monotonic()
        done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **(env or {})}, check=False)
        self.times[what].append(time.monotonic() - started)
        if done.returncode not in (0, 3):
            raise RuntimeError(f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout

    def warm(self) -> None:
        """Touch as much memory as the disk has, and let go of it: what a virtual machine has given back to its host
        comes back at 0.4 GB/s (measured), and would be the only thing that is timed."""
        ballast = self.base / "ballast"
        with ballast.open("wb", buffering=0) as out:
            for _ in range(self.size // MIB):
                out.write(bytes(MIB))
        ballast.unlink()

    def dirty(self) -> None:
        """Change 64 MiB in pieces of 1 MiB all over the disk."""
        for _ in range(DIRTY // MIB):
            offset = self.rng.randrange(0, self.size // MIB - 1) * MIB
            write(self.domain, "vda", offset, MIB, self.rng.randrange(1, 256))


def stillframe(bench: Bench) -> None:
    base = bench.base / "sf"
    base.mkdir()
    config = install(base)
    backup = [STILLFRAME, "backup", "run", NAME, "--json", "--config", str(config)]

    def run(what: str) -> None:
        text = bench.clock(f"{what} stillframe", backup)
        for line in text.splitlines():
            found = json.loads(line)
            if found["type"] == "backup":
                bench.times[f"{what} stillframe, the job itself"].append(found["job_seconds"])

    run("full")
    restore = [STILLFRAME, "restore", "disk", f"{NAME}@latest", "vda", "--to", str(base / "out.qcow2")]
    bench.clock("restore stillframe", [*restore, "--config", str(config)])
    (base / "out.qcow2").unlink()
    bench.dirty()
    run("incremental")
    run("no change")
    shutil.rmtree(base)


def virtnbdbackup(bench: Bench) -> None:
    base = bench.base / "vnb"
    base.mkdir()
    scratch = ["-S", str(base), "-n", "-z", "-d", NAME, "-o", str(base / "out")]
    bench.clock("full virtnbdbackup", ["virtnbdbackup", "-l", "full", *scratch])
    bench.clock("restore virtnbdbackup", ["virtnbdrestore", "-n", "-i", str(base / "out"), "-o", str(base / "back")])
    shutil.rmtree(base / "back")
    bench.dirty()
    bench.clock("incremental virtnbdbackup", ["virtnbdbackup", "-l", "inc", *scratch])
    bench.clock("no change virtnbdbackup", ["virtnbdbackup", "-l", "inc", *scratch])
    shutil.rmtree(base)


def borg(bench: Bench) -> None:
    base = bench.base / "borg"
    base.mkdir()
    env = {"BORG_BASE_DIR": str(base), "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes"}
    repo = str(base / "repo")
    subprocess.run(["borg", "init", "-e", "none", repo], check=True, capture_output=True, env={**os.environ, **env})
    create = ["borg", "create", "--chunker-params", f"fixed,{MIB}", "--compression", "zstd,1"]
    bench.clock("full borg", [*create, f"{repo}::a", str(bench.raw)], env)
    bench.clock("no change borg", [*create, "--files-cache", "disabled", f"{repo}::b", str(bench.raw)], env)
    shutil.rmtree(base)


def restic(bench: Bench) -> None:
    base = bench.base / "restic"
    base.mkdir()
    env = {"RESTIC_PASSWORD": "x", "RESTIC_REPOSITORY": str(base / "repo"), "RESTIC_CACHE_DIR": str(base / "cache")}
    subprocess.run(
        ["restic", "init", "--repository-version", "2"], check=True, capture_output=True, env={**os.environ, **env}
    )
    bench.clock("full restic", ["restic", "backup", str(bench.raw)], env)
    bench.clock("restore restic", ["restic", "restore", "latest", "--target", str(base / "out")], env)
    shutil.rmtree(base)


def limit(bench: Bench) -> None:
    """Processor seconds that cannot be avoided, per core."""
    before = _children()
    image = f"driver=qcow2,file.driver=file,file.filename={bench.base / 'disk.qcow2'},file.locking=off"
    socket = str(bench.base / "l.sock")
    server = subprocess.Popen(["qemu-nbd", "-r", "-e", "4", "--image-opts", image, "-k", socket])
    while not Path(socket).exists():
        time.sleep(0.01)
    subprocess.run(["nbdcopy", f"nbd+unix:///?socket={socket}", "null:"], check=True)
    server.wait(60)
    moved = _children() - before
    coded, stored = _coded(bench.raw)
    started = time.process_time()
    with (bench.base / "l.out").open("wb", buffering=0) as out:
        chunk = os.urandom(MIB)
        for _ in range(stored // MIB):
            out.write(chunk)
    written = time.process_time() - started
    (bench.base / "l.out").unlink()
    bench.times["full limit"].append((moved + coded + written) / (os.cpu_count() or 1))


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _coded(raw: Path) -> tuple[float, int]:
    """Processor seconds of hashing, compressing and sealing the whole disk in memory, and the bytes that are left."""
    import zstandard
    from blake3 import blake3
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    key, cipher, compressor = bytes(32), AESGCM(bytes(32)), zstandard.ZstdCompressor(level=1)
    spent, stored, count = 0.0, 0, 0
    with raw.open("rb") as source:
        while block := source.read(MIB):
            started = time.process_time()
            blake3(block, key=key).digest()
            packed = compressor.compress(block)
            stored += len(cipher.encrypt(count.to_bytes(12, "big"), packed, None))
            spent += time.process_time() - started
            count += 1
    return spent, stored


RATIOS = [
    ("full stillframe", "full virtnbdbackup", 0.45),
    ("full stillframe", "full borg", 0.65),
    ("full stillframe", "full restic", None),
    ("full limit", "full stillframe", -0.8),
    ("incremental stillframe, the job itself", "incremental virtnbdbackup", 0.5),
    ("incremental stillframe", "incremental virtnbdbackup", 0.8),
    ("no change stillframe", "no change virtnbdbackup", None),
    ("no change stillframe", "no change borg", None),
    ("restore stillframe", "restore virtnbdbackup", None),
    ("restore stillframe", "restore restic", 0.4),
]


def report(bench: Bench) -> None:
    print(f"\n{bench.size / 1e9:.2f} GB of system files, {bench.rounds} rounds, {os.cpu_count()} cores, medians\n")
    medians = {what: statistics.median(times) for what, times in bench.times.items()}
    for what, seconds in medians.items():
        spread = f"{min(bench.times[what]):.2f} to {max(bench.times[what]):.2f}"
        print(f"  {what:45} {seconds:8.2f} s   {spread}")
    print()
    for a, b, aim in RATIOS:
        if a in medians and b in medians:
            ratio = medians[a] / medians[b]
            wanted = "" if aim is None else f"aim ≤ {aim}" if aim > 0 else f"aim ≥ {-aim}"
            print(f"  {a} / {b}: {ratio:.2f}   {wanted}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, default=4.0, help="GiB of system files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", default="/dev/shm", help="where images, vaults and outputs live")
    parser.add_argument("--only", default="", help="contestants, with commas between")
    options = parser.parse_args()
    contestants: list[Callable[[Bench], None]] = [stillframe, virtnbdbackup, borg, restic, limit]
    present = [it for it in contestants if it in (stillframe, limit) or shutil.which(it.__name__)]
    present = [it for it in present if not options.only or it.__name__ in options.only.split(",")]
    with folder(options.dir) as base:
        raw = base / "disk.raw"
        size = system_files(raw, int(options.size * (1 << 30)))
        image = base / "disk.qcow2"
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(image)], check=True)
        image.chmod(0o666)
        with paused_machine({"vda": image}) as domain:
            bench = Bench(base, domain, raw, size, options.rounds)
            for number in range(options.rounds):
                for contestant in present:
                    print(f"round {number + 1}: {contestant.__name__}", file=sys.stderr, flush=True)
                    contestant(bench)
                    _forget_checkpoints(domain)
            report(bench)


def _forget_checkpoints(domain: Any) -> None:
    for checkpoint in domain.listAllCheckpoints():
        checkpoint.delete()


if __name__ == "__main__":
    main()
