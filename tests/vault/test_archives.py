"""Vaults that earlier versions wrote stay readable, and can be gone on with: byte for byte, by this Stillframe and by
the second reader. An archive is made once, by the version that it is of, and never again."""

from __future__ import annotations

import tarfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.vault.pictures import KEY, backup, image, read_disk, reopened
from tests.vault.second_reader import SecondReader
from workers.vault.sweep import sweep
from workers.vault.verify import Level, verify

NOW = datetime(2026, 11, 25, tzinfo=UTC)
ARCHIVES = Path(__file__).with_name("archives")
FIRST = {
    "p1": {"vda": "AA0Bab", "vdb": "0000"},
    "p2": {"vda": "AACAa0", "vdb": "0B00"},
    "p5": {"vda": "DEFGHIJKAB"},
}
CONTENT = {
    "first": FIRST,  # before there were sweeps
    "second": {**FIRST, "p4": {"vda": "PQRSTUVW"}},  # with every kind of object but locks
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


def test_it_can_be_swept(archive: str, tmp_path: Path) -> None:
    """Beside its sessions, of which the oldest know of no condemnation, and after them."""
    vault = reopened(tmp_path)
    sweep(vault, now=NOW)
    for session in vault.sessions():
        vault.settle(session.point)
        vault.withdraw(session.session)
    assert sweep(vault, now=NOW).waiting == []
    vault = reopened(tmp_path, cache="another")
    for point in vault.points():
        for disk in point.disks:
            assert read_disk(vault, disk) == image(CONTENT[archive][point.id][disk.target])
    assert verify(vault, Level.FULL).findings == []
