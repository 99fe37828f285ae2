"""How long a guest stands still: freeze to thaw, both replies, over backups of an idle guest.

python -m tests.bench.freeze [--backups N] [--dir FOLDER]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess

from orchestrator.demo.disks import make_ext4_disk
from orchestrator.demo.host import connect, remove_machine
from orchestrator.demo.in_guest import wait_for_agent
from orchestrator.demo.tiny_guest import TinyDisk, build_tiny_image, define_tiny
from tests.bench.machine import STILLFRAME, folder, install

NAME = "sf-bench-guest"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backups", type=int, default=20)
    parser.add_argument("--dir", default="/dev/shm")
    options = parser.parse_args()
    with folder(options.dir) as base:
        disks = []
        for target in ("vda", "vdb"):
            make_ext4_disk(base / f"{target}.qcow2", 128 << 20)
            disks.append(TinyDisk(target, base / f"{target}.qcow2"))
        config = install(base)
        connection = connect()
        domain = define_tiny(connection, NAME, build_tiny_image(base), disks, base, start=True)
        try:
            wait_for_agent(domain)
            command = [STILLFRAME, "backup", "run", NAME, "-q", "--config", str(config)]
            for _ in range(options.backups):
                subprocess.run(command, check=True, capture_output=True)
            listed = subprocess.run(
                [STILLFRAME, "point", "list", NAME, "--json", "--config", str(config)],
                check=True,
                capture_output=True,
                text=True,
            )
        finally:
            remove_machine(domain)
    frozen = sorted(json.loads(line)["frozen_ms"] for line in listed.stdout.splitlines())
    median = statistics.median(frozen)
    print(
        f"freeze to thaw over {len(frozen)} backups: median {median:.0f} ms, {frozen[0]} to {frozen[-1]}; aim ≤ 300 ms"
    )


if __name__ == "__main__":
    main()
