"""The demo, told in full with real parts; and that it touches nothing that is not its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import libvirt
import pytest

from orchestrator.demo.host import machines
from orchestrator.demo.place import Place
from orchestrator.demo.stage import Stage
from orchestrator.demo.story import Story
from tests.guests.machines import MACHINE_PREFIX
from workers.contract.errors import TargetExists, UsageError

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]


def lines(text: str, kind: str) -> list[dict[str, object]]:
    return [record for record in map(json.loads, text.splitlines()) if record["type"] == kind]


def test_the_story_is_told_twice_and_leaves_nothing_after_clean(
    libvirt_host: libvirt.virConnect, guest_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(guest_folder / "demo", prefix=f"{MACHINE_PREFIX}{os.getpid()}-demo-")
    try:
        for round_ in ("first", "second"):
            assert Story(place, Stage(as_json=True)).tell() == 0
            told = capsys.readouterr().out
            full, incremental = lines(told, "point")
            assert {disk["mode"] for disk in full["disks"]} == {"full"}, round_  # type: ignore[attr-defined]
            assert {disk["mode"] for disk in incremental["disks"]} == {"incremental"}, round_  # type: ignore[attr-defined]
            assert incremental["consistency"] == "filesystem"
            assert lines(told, "demo")[0]["ok"] is True
        names = {domain.name() for domain in machines(libvirt_host, place.prefix) if domain.isActive()}
        assert names == {place.machine, place.copy}
        assert place.phrase.stat().st_mode & 0o777 == 0o600
    finally:
        removed = place.clean()
    assert len(removed) == 3
    assert machines(libvirt_host, place.prefix) == []
    assert not place.root.exists()


def test_a_demo_in_another_folder_is_not_taken_over(libvirt_host: libvirt.virConnect, guest_folder: Path) -> None:
    prefix = f"{MACHINE_PREFIX}{os.getpid()}-taken-"
    first, second = Place(guest_folder / "one", prefix), Place(guest_folder / "two", prefix)
    try:
        first.make()
        first.web(libvirt_host)
        second.make()
        with pytest.raises(TargetExists, match="whose disks are not in"):
            second.web(libvirt_host)
        assert second.clean() == [str(second.root)]
        assert [domain.name() for domain in machines(libvirt_host, prefix)] == [first.machine]
    finally:
        first.clean()


def test_a_folder_that_is_not_the_demos_is_neither_used_nor_removed(guest_folder: Path) -> None:
    folder = guest_folder / "papers"
    folder.mkdir()
    (folder / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="not the demo's"):
        Place(folder).make()
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli.main", "demo", "--clean", "--dir", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "was not made by the demo" in done.stderr
    assert (folder / "letter.txt").read_text() == "dear"
