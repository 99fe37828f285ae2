"""Images for other systems, judged by qemu-img; and nothing left of the server that wrote them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from workers.contract.errors import DiskError, NoSpace, UsageError
from workers.contract.messages import ImageFormat
from workers.disks.foreign import LARGEST, ForeignTarget, require_room_for
from workers.disks.images import driver

MIB = 1 << 20
FORMATS: tuple[ImageFormat, ...] = ("vhd", "vhdx", "vmdk")
SIZE = 48 * MIB + 512 * 3
PIECES = {0: 4096, 5 * MIB: MIB, 33 * MIB + 512: 70_144, SIZE - 512: 512}


def data_at(offset: int, length: int) -> bytes:
    return random.Random(offset).randbytes(length)


@pytest.mark.parametrize("format", FORMATS)
def test_it_holds_what_was_written_and_little_more(tmp_path: Path, format: ImageFormat) -> None:
    path, raw = tmp_path / "a, strange name", tmp_path / "raw"
    target = ForeignTarget(path, format, SIZE)
    target.write((offset, data_at(offset, length)) for offset, length in reversed(PIECES.items()))
    target.close()
    with raw.open("wb") as file:
        file.truncate(SIZE)
        for offset, length in PIECES.items():
            file.seek(offset)
            file.write(data_at(offset, length))
    compared = ["qemu-img", "compare", "-f", driver(format), "-F", "raw", str(path), str(raw)]
    assert "identical" in subprocess.run(compared, capture_output=True, text=True, check=True).stdout
    info = subprocess.run(["qemu-img", "info", "--output=json", str(path)], capture_output=True, check=True).stdout
    assert json.loads(info)["format"] == driver(format)
    assert json.loads(info)["virtual-size"] == SIZE
    assert path.stat().st_blocks * 512 < 24 * MIB
    assert path.stat().st_mode & 0o077 == 0


def servers_of(path: Path) -> list[str]:
    found = subprocess.run(["pgrep", "-f", f"qemu-nbd.*{path}"], capture_output=True, text=True, check=False)
    return found.stdout.split()


def test_the_server_ends_with_the_process_that_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    program = f"""
import os, sys
from pathlib import Path
from workers.disks.foreign import ForeignTarget
target = ForeignTarget(Path({str(path)!r}), "vhdx", 1 << 20)
target.write([(0, b"x" * 512)])
print("ready", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        [server] = servers_of(path)
        watched = os.pidfd_open(int(server))
        process.kill()
    import select

    assert select.select([watched], [], [], 30)[0], "qemu-nbd outlived its only client"
    os.close(watched)


def test_a_taken_name_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        ForeignTarget(path, "vmdk", MIB)
    assert path.read_text() == "mine"


def test_past_the_end_is_refused(tmp_path: Path) -> None:
    target = ForeignTarget(tmp_path / "disk.vhd", "vhd", MIB)
    with pytest.raises((DiskError, NoSpace)):
        target.write([(MIB, b"x" * 512)])
    target.close()
    assert servers_of(tmp_path / "disk.vhd") == []


def test_what_does_not_fit_is_refused_beforehand() -> None:
    for format in FORMATS:
        with pytest.raises(UsageError, match="holds whole sectors"):
            require_room_for(format, MIB + 1)
        with pytest.raises(UsageError, match="holds at most"):
            require_room_for(format, LARGEST[format] + 512)
        require_room_for(format, LARGEST[format])
    require_room_for("raw", 1)
    require_room_for("qcow2", 1 << 60)
