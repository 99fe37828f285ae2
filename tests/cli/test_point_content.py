"""`point diff` and `point export`, on points that were put into the vault without a machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, write_configuration
from tests.vault.pictures import BLOCK, backup, image
from workers.vault import Vault, open_store, read_key_file

FIRST = {"vda": "AB0CD", "vdb": "AA"}
SECOND = {"vda": "AX0C0EE", "vdc": "B"}


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """The command, with the points `first` and `second` in its vault."""
    cli = write_configuration(Cli(tmp_path_factory.mktemp("stocked")))
    assert cli.run("init").code == 0
    store = open_store(f"file://{cli.folder}/vault")
    vault = Vault.open(store, key=read_key_file(cli.folder / "main.key"), cache_dir=cli.folder / "other-cache")
    backup(vault, "first", FIRST)
    backup(vault, "second", SECOND)
    vault.close()
    assert cli.run("vault", "rebuild-catalog").code == 0
    return cli


def test_a_diff_for_people(stocked: Cli) -> None:
    ran = stocked.run("point", "diff", "first", "second", "--ranges")
    assert ran.code == 0, ran.err
    assert "20.0 KiB → 28.0 KiB" in ran.out
    assert "57.14 %" in ran.out
    assert "vdb: only in the first point" in ran.out
    assert "vdc: only in the second point" in ran.out
    listed = [line.split() for line in ran.out.splitlines() if "+" in line]
    assert listed == [
        ["vda", "4096", "+4096", "rewritten"],
        ["vda", "16384", "+4096", "zeroed"],
        ["vda", "20480", "+8192", "filled"],
    ]
    assert "+4096" not in stocked.run("point", "diff", "first", "second").out


def test_a_diff_for_programs(stocked: Cli) -> None:
    lines = stocked.run("point", "diff", "first", "second", "--json").lines
    assert [(line["type"], line["target"]) for line in lines] == [("diff", "vda"), ("diff", "vdb"), ("diff", "vdc")]
    vda, vdb, _ = lines
    assert vda["before"] == "first"
    assert (vda["capacity_before"], vda["capacity_after"]) == (5 * BLOCK, 7 * BLOCK)
    assert vda["changed_bytes"] == 4 * BLOCK
    assert vda["bytes"] == {"rewritten": BLOCK, "zeroed": BLOCK, "filled": 2 * BLOCK}
    assert vda["ranges"][0] == {"start": BLOCK, "length": BLOCK, "change": "rewritten"}
    assert vdb["capacity_after"] is None
    same = stocked.run("point", "diff", "first", "first", "--json").lines
    assert [line["changed_bytes"] for line in same] == [0, 0]


def test_a_diff_with_a_point_that_is_not_there(stocked: Cli) -> None:
    ran = stocked.run("point", "diff", "first", "third")
    assert ran.code == 2
    assert "no point 'third'" in ran.err


@pytest.mark.parametrize(("suffix", "driver"), [("vhd", "vpc"), ("vhdx", "vhdx"), ("vmdk", "vmdk"), ("qcow2", "qcow2")])
def test_an_export_is_the_disk(stocked: Cli, tmp_path: Path, suffix: str, driver: str) -> None:
    path, raw = tmp_path / f"disk.{suffix}", tmp_path / "raw"
    ran = stocked.run("point", "export", "second", "vda", "--to", path)
    assert ran.code == 0, ran.err
    raw.write_bytes(image(SECOND["vda"]))
    subprocess.run(["qemu-img", "compare", "-f", driver, "-F", "raw", str(path), str(raw)], check=True)
    again = stocked.run("point", "export", "first", "vda", "--to", path)
    assert again.code == 2
    assert "exists already" in again.err
    subprocess.run(["qemu-img", "compare", "-f", driver, "-F", "raw", str(path), str(raw)], check=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name, "raw"]


def test_an_unknown_format_and_an_unknown_disk(stocked: Cli, tmp_path: Path) -> None:
    ran = stocked.run("point", "export", "first", "vda", "--to", tmp_path / "out", "--format", "vdi")
    assert ran.code == 2
    assert "the format of a disk cannot be 'vdi'" in ran.err
    assert "qcow2, raw, vhd, vhdx, vmdk" in ran.err
    assert "it has: vda, vdb" in stocked.run("point", "export", "first", "vdz", "--to", tmp_path / "out").err
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_killed_leaves_nothing_once_settled(tmp_path: Path) -> None:
    """Killed as soon as the unfinished file is there: the next command removes it."""
    cli = write_configuration(Cli(tmp_path))
    assert cli.run("init").code == 0
    store = open_store(f"file://{cli.folder}/vault")
    vault = Vault.open(store, key=read_key_file(cli.folder / "main.key"), cache_dir=cli.folder / "other-cache")
    backup(vault, "large", {"vda": "".join("ABCDEFGHIJKLMNOP"[index % 16] for index in range(2000))})
    vault.close()
    assert cli.run("vault", "rebuild-catalog").code == 0
    target = tmp_path / "out" / "disk.vhdx"
    target.parent.mkdir()
    program = [sys.executable, "-m", "orchestrator.cli.main", "point", "export", "large", "vda", "--to", str(target)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(program, cwd=cli.folder, env=env) as process:
        while not any(target.parent.iterdir()) and process.poll() is None:
            pass
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    [unfinished] = target.parent.iterdir()
    assert unfinished.name.startswith("disk.vhdx.sf-")
    assert cli.run("job", "list").code == 0
    assert list(target.parent.iterdir()) == []
