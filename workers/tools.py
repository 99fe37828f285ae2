"""Run the few outside programs we need (qemu-img, qemu-nbd), with an error that says what was run and why it failed."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from workers.contract.errors import DiskError, NoSpace


def run(argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 120.0) -> str:
    """Standard output of `argv`. Raises DiskError if the program is missing, fails, or exceeds `timeout` seconds."""
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, timeout=timeout, check=False)
    except FileNotFoundError:
        raise missing(argv) from None
    except subprocess.TimeoutExpired:
        raise too_slow(argv, timeout) from None
    if done.returncode != 0:
        raise failed(argv, done.returncode, done.stderr)
    return done.stdout.decode(errors="replace")


def missing(argv: Sequence[str], where: str = "") -> DiskError:
    """`where`: ` on lab1`."""
    return DiskError(f"{argv[0]} is not installed{where}", hint="on Debian: apt-get install qemu-utils")


def too_slow(argv: Sequence[str], timeout: float, where: str = "") -> DiskError:
    return DiskError(f"{argv[0]} did not end within {timeout:.0f} s{where}: {' '.join(argv)}")


def failed(argv: Sequence[str], code: int, stderr: bytes, where: str = "") -> DiskError | NoSpace:
    why = stderr.decode(errors="replace").strip().splitlines()
    words = f"{' '.join(argv[:2])} failed{where}: {why[-1] if why else f'exit {code}'}"
    return NoSpace(words) if "No space left" in words else DiskError(words)
