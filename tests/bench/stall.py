"""How long a database under load waits because of a backup: ours with and without application scripts, virtnbdbackup.

    python -m tests.bench.stall [--backups N] [--database postgresql|mariadb] [--dir FOLDER]

Each contestant takes incrementals of the same guest: ours in turn, then virtnbdbackup, which refuses to work beside
checkpoints of others. The stall of a backup is the longest
time without an acknowledged transaction while it ran, by the guest's own clock; `none` is the same without any backup.
Printed: the 50th and 95th percentile over the rounds, ratios, and what the extension costs a job (emulated guest).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from orchestrator.demo.host import connect
from orchestrator.demo.tiny_guest import build_tiny_image, default_cache
from tests.bench.machine import STILLFRAME, folder, install
from tests.guests.database_guest import MARIADB, POSTGRESQL, database_guest_up
from tests.guests.load import Load, loaded

SCRIPTS, FREEZE, BARE, PEER, NONE = "with scripts", "without scripts", "no extension", "virtnbdbackup", "none"


def ours(config: Path, name: str, goal: str) -> float:
    """One backup; the job's seconds."""
    argv = [STILLFRAME, "backup", "run", name, "--consistency", goal, "--json", "--config", str(config)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    line = next(json.loads(line) for line in done.stdout.splitlines() if '"backup"' in line)
    if line["consistency"] != goal:
        raise RuntimeError(f"wanted {goal}: {line}\n{done.stderr}")
    return float(line["job_seconds"])


def peer(base: Path, name: str, level: str) -> float:
    domain = connect().lookupByName(name)
    while domain.jobInfo()[0]:  # its own last job may not be gone yet
        time.sleep(0.1)
    argv = ["virtnbdbackup", "-l", level, "-S", str(base), "-d", name, "-o", str(base / "out")]
    begun = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"virtnbdbackup: {done.stderr[-2000:]}")
    return time.monotonic() - begun


def wait(_seconds: float = 3.0) -> float:
    time.sleep(_seconds)
    return _seconds


def percentile(values: list[float], share: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backups", type=int, default=10)
    parser.add_argument("--database", choices=[POSTGRESQL, MARIADB], default=POSTGRESQL)
    parser.add_argument("--dir", default="/dev/shm")
    options = parser.parse_args()
    with folder(options.dir) as base:
        image = build_tiny_image(base)
        with database_guest_up(connect(), image, default_cache(), base, label="stall") as guest:
            measure(guest.name, base, options.database, options.backups, lambda: loaded(guest, options.database))


def measure(name: str, base: Path, database: str, rounds: int, load_of: Callable[[], object]) -> None:
    places = {}
    for label, extension in ((SCRIPTS, ""), (FREEZE, ""), (BARE, "install = false")):
        place = base / label.replace(" ", "-")
        place.mkdir()
        places[label] = install(place, extension=extension)
    vnb = base / "vnb"
    vnb.mkdir()
    contestants: dict[str, Callable[[], float]] = {
        SCRIPTS: lambda: ours(places[SCRIPTS], name, "application"),
        FREEZE: lambda: ours(places[FREEZE], name, "filesystem"),
        BARE: lambda: ours(places[BARE], name, "filesystem"),
        PEER: lambda: peer(vnb, name, "inc"),
        NONE: wait,
    }
    stalls: dict[str, list[float]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)

    def run(label: str, load: Load, *, count: bool) -> None:
        if label == PEER and not (vnb / "out").exists():
            peer(vnb, name, "full")
        since = load.up()
        took = contestants[label]()
        if count:
            stalls[label].append(load.stall(since))
            seconds[label].append(took)

    with load_of() as load:  # type: ignore[attr-defined]
        for number in range(rounds + 1):
            for label in (SCRIPTS, FREEZE, BARE, NONE):
                run(label, load, count=number > 0)
        report(database, stalls, seconds)
        for checkpoint in connect().lookupByName(name).listAllCheckpoints():
            checkpoint.delete()
        for _ in range(rounds):
            run(PEER, load, count=True)
    report(database, stalls, seconds)


def report(database: str, stalls: dict[str, list[float]], seconds: dict[str, list[float]]) -> None:
    print(f"{database}, {len(stalls[NONE])} incrementals each; milliseconds without an acknowledged transaction")
    print(f"{'':16} {'p50':>8} {'p95':>8} {'job s':>8}")
    for label, values in stalls.items():
        p50, p95 = (percentile(values, share) * 1000 for share in (50, 95))
        print(f"{label:16} {p50:8.0f} {p95:8.0f} {statistics.median(seconds[label]):8.2f}")
    for label in (FREEZE, SCRIPTS) if PEER in stalls else ():
        ratios = [percentile(stalls[label], share) / percentile(stalls[PEER], share) for share in (50, 95)]
        print(f"{label} / {PEER}: p50 {ratios[0]:.2f}, p95 {ratios[1]:.2f}; aim {'1.5' if label == SCRIPTS else '1.0'}")
    added = statistics.median(seconds[FREEZE]) - statistics.median(seconds[BARE])
    print(f"the extension adds {added:.2f} s to an incremental job; aim 1.0")


if __name__ == "__main__":
    main()
