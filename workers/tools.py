"""Run the few outside programs we need (qemu-img, qemu-nbd), with an error that says what was run and why it failed."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from workers.contract.errors import DiskError


def run(argv: Sequence[str], *, timeout: float = 120.0) -> str:
    """Standard output of `argv`. Raises DiskError if the program is missing, fails, or exceeds `timeout` seconds."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False)
    except FileNotFoundError:
        raise DiskError(f"{argv[0]} is not installed", hint="on Debian: apt-get install qemu-utils") from None
    except subprocess.TimeoutExpired:
        raise DiskError(f"{argv[0]} did not end within {timeout:.0f} s: {' '.join(argv)}") from None
    if done.returncode != 0:
        why = done.stderr.strip().splitlines()
        raise DiskError(f"{' '.join(argv[:2])} failed: {why[-1] if why else f'exit {done.returncode}'}")
    return done.stdout
