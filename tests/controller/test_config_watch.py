"""A configuration that is read again while a process stays: the last good one is in force, and mistakes are told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.catalog.alerts import standing_alerts
from orchestrator.catalog.store import Catalog
from orchestrator.config import Config, load_config
from orchestrator.config_watch import ConfigWatch
from orchestrator.service import Service

TEXT = """
[paths]
state = "state"
runtime = "run"
[vaults.main]
url = "file://./vault"
key_file = "k"
[policies.gold]
schedule = "daily at 02:00"
[protect.web]
machines = ["web-*"]
policy = "gold"
"""


class Watched:
    """A file, its watch, and what became of it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "stillframe.toml"
        self.file.write_text(TEXT)
        config = load_config(self.file)
        self.catalog = Catalog.open(config.catalog_url)
        self.applied: list[Config] = []
        self.watch = ConfigWatch(config, self.catalog, self.applied.append)

    def write(self, text: str) -> None:
        """As an editor does: a new file in the place of the old one."""
        new = self.file.with_suffix(".new")
        new.write_text(text)
        new.replace(self.file)

    def alerts(self) -> list[str]:
        with self.catalog.read() as session:
            return [row.text for row in standing_alerts(session)]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    watched = Watched(tmp_path)
    with watched.catalog:
        yield watched


def test_an_unchanged_file_is_not_read(watched: Watched) -> None:
    assert [watched.watch.look() for _ in range(3)] == [False] * 3
    assert watched.applied == []


def test_a_changed_file_is_in_force_when_it_is_still_the_same_at_the_next_look(watched: Watched) -> None:
    watched.write(TEXT.replace("02:00", "03:00"))
    assert not watched.watch.look(), "somebody may still be writing"
    assert watched.watch.look()
    assert watched.watch.config.policies["gold"].schedule == "daily at 03:00"
    assert watched.applied == [watched.watch.config]
    assert not watched.watch.look()


def test_a_file_that_is_being_written_is_waited_for(watched: Watched) -> None:
    for length in (40, 80, 120):
        watched.file.write_text(TEXT[:length])
        assert not watched.watch.look()
    watched.file.write_text(TEXT.replace("02:00", "04:00"))
    assert [watched.watch.look() for _ in range(2)] == [False, True]
    assert watched.alerts() == []


def test_a_mistake_is_told_and_the_last_good_one_stays_until_it_is_mended(watched: Watched) -> None:
    before = watched.watch.config
    watched.write(TEXT.replace("schedule =", "shedule ="))
    assert [watched.watch.look() for _ in range(3)] == [False] * 3
    assert watched.watch.config is before
    [text] = watched.alerts()
    assert f"{watched.file}:9: unknown key 'shedule' in [policies.gold]; did you mean schedule" in text
    assert text.endswith("the last good one is in force")
    watched.write(TEXT)
    assert [watched.watch.look() for _ in range(2)] == [False, False], "it is as before: nothing is to be applied"
    assert watched.alerts() == []
    assert watched.applied == []


def test_a_file_that_is_gone_is_a_mistake(watched: Watched) -> None:
    watched.file.unlink()
    assert [watched.watch.look() for _ in range(2)] == [False, False]
    assert "no such configuration file" in watched.alerts()[0]


def test_the_same_size_and_time_are_not_enough_to_hide_a_change(watched: Watched) -> None:
    stat = watched.file.stat()
    watched.write(TEXT.replace("02:00", "05:00"))
    os.utime(watched.file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert [watched.watch.look() for _ in range(2)] == [False, True]


def test_what_cannot_change_at_run_time_is_said_and_stays(watched: Watched) -> None:
    changed = TEXT.replace('state = "state"', 'state = "elsewhere"').replace("02:00", "06:00")
    watched.write(changed + '[broker]\nurl = "redis://localhost"\n')
    assert [watched.watch.look() for _ in range(2)] == [False, True]
    config = watched.watch.config
    assert (config.broker_url, config.state_dir.name) == ("memory://", "state")
    assert config.policies["gold"].schedule == "daily at 06:00"
    [text] = watched.alerts()
    assert "[catalog] url, [broker] url, [paths] state, [paths] scratch, [paths] cache changed in the file" in text
    watched.write(TEXT)
    assert [watched.watch.look() for _ in range(2)] == [False, True]
    assert watched.alerts() == []


def test_somebody_may_ask_for_it(watched: Watched) -> None:
    watched.write(TEXT.replace("02:00", "07:00"))
    watched.watch.again()
    assert watched.watch.look()


def test_a_service_uses_what_is_in_force(tmp_path: Path) -> None:
    file = tmp_path / "stillframe.toml"
    file.write_text(TEXT)
    with Service.open(load_config(file)) as service, service.config_watch.followed():
        file.write_text(TEXT.replace("web-*", "db-*"))
        for _ in range(100):
            service.reload()
            if service.config.protect["web"].machines == ["db-*"]:
                break
            service.engine.wait_for_change(0, 0.05)
        assert service.config.protect["web"].machines == ["db-*"]
        assert service.point_desk._config is service.config
