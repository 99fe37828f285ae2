"""Vaults that earlier versions wrote stay readable, and can be gone on with: byte for byte, by this Stillframe and by
the second reader. An archive is made once, by the version that it is of, and never again."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from tests.vault.pictures import KEY, backup, image, read_disk, reopened
from tests.vault.second_reader import SecondReader

ARCHIVES = Path(__file__).with_name("archives")
CONTENT = {
    "first": {
        "p1": {"vda": "AA0Bab", "vdb": "0000"},
        "p2": {"vda": "AACAa0", "vdb": "0B00"},
        "p5": {"vda": "DEFGHIJKAB"},
    }
}


@pytest.fixture(params=CONTENT)
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    with tarfile.open(ARCHIVES / f"{request.param}.tar.xz") as tar:
        tar.extractall(tmp_path)
    return str(request.param)


def test_every_point_is_read(archive: str, tmp_path: Path) -> None:
    vault = reopened(tmp_path)
    assert {point.id for point in vault.points()} == set(CONTENT[archive])
    for point in vault.points():
        assert {disk.target: read_disk(vault, disk) for disk in point.disks} == {
            target: image(picture) for target, picture in CONTENT[archive][point.id].items()
        }
    second = SecondReader(tmp_path / "vault", key=KEY)
    second.load_segments()
    assert sorted(second.points()) == sorted(CONTENT[archive])


@pytest.mark.usefixtures("archive")
def test_a_backup_goes_on_from_it(tmp_path: Path) -> None:
    vault = reopened(tmp_path)
    base = vault.point("p2")
    before = {info.name for info in vault.store.list("packs/")}
    backup(vault, "p6", {"vda": "--L---", "vdb": "----"}, base)
    vault = reopened(tmp_path, cache="another")
    assert read_disk(vault, vault.point("p6").disks[0]) == image("AALAa0")
    assert len({info.name for info in vault.store.list("packs/")} - before) == 1
