"""What a restore writes is judged by QEMU's own tools."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.contract.errors import DiskError, NoSpace
from workers.disks.targets import Qcow2Target, RawTarget

KIB = 1 << 10


def ranges_of(pieces: dict[int, bytes]) -> list[tuple[int, int]]:
    return [(offset, len(data)) for offset, data in sorted(pieces.items())]


def written(path: Path, size: int, pieces: dict[int, bytes], cluster: int) -> bytes:
    """The disk as QEMU reads it, after `qemu-img check` has found nothing wrong."""
    target = Qcow2Target(path, size, lambda: ranges_of(pieces), cluster)
    mixed = list(pieces.items())
    random.Random(3).shuffle(mixed)
    target.write(mixed)
    target.close()
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], check=True)
    raw = path.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw)], check=True)
    return raw.read_bytes()


def expected(size: int, pieces: dict[int, bytes]) -> bytes:
    content = bytearray(size)
    for offset, data in pieces.items():
        content[offset : offset + len(data)] = data
    return bytes(content)


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 700).map(lambda sectors: sectors * 512),
    block=st.sampled_from([4 * KIB, 64 * KIB]),
    cluster=st.sampled_from([512, 4 * KIB, 64 * KIB, 256 * KIB]),
    chosen=st.sets(st.integers(0, 90)),
)
def test_any_layout_is_whole_and_reads_back(size: int, block: int, cluster: int, chosen: set[int]) -> None:
    rng = random.Random(1)
    starts = [index * block for index in chosen if index * block < size]
    pieces = {start: rng.randbytes(min(block, size - start)) for start in starts}
    folder = Path("/dev/shm") / f"sf-targets-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    try:
        assert written(folder / "disk.qcow2", size, pieces, cluster) == expected(size, pieces)
    finally:
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()


def test_a_huge_sparse_disk_costs_what_its_data_costs(tmp_path: Path) -> None:
    size, path = 8 << 40, tmp_path / "disk.qcow2"
    starts = [0, (3 << 40) + 512 * KIB, size - 64 * KIB]
    target = Qcow2Target(path, size, lambda: [(start, 64 * KIB) for start in starts])
    target.write([(start, b"x" * 64 * KIB) for start in starts])
    target.close()
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], check=True)
    shown = subprocess.run(["qemu-img", "map", "--output=json", str(path)], check=True, capture_output=True)
    assert [extent["start"] for extent in json.loads(shown.stdout) if extent["data"]] == starts
    assert path.stat().st_size < 2 << 20


def test_a_write_without_room_is_refused(tmp_path: Path) -> None:
    target = Qcow2Target(tmp_path / "disk", 1 << 20, lambda: [(0, 64 * KIB)])
    with pytest.raises(DiskError, match="no room was laid out for byte 65536"):
        target.write([(64 * KIB, b"x")])
    target.close()


def test_a_full_file_system_is_told(tmp_path: Path) -> None:
    target = RawTarget(tmp_path / "disk", 1 << 20)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, target._file)
    os.close(full)
    with pytest.raises(NoSpace, match="No space left"):
        target.write([(0, b"x" * 512)])
    os.close(target._file)
