"""Who runs what where several processes share the tests (`deploy/test`).

The file that begins last decides when all end, so those whose tests are given the most time begin first. Files that use
the same guest go to the same process: a distribution boots longer than most tests take, and each copy of its disks is a
gigabyte written.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import TYPE_CHECKING

import pytest
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from xdist.remote import Producer

SHARED = {
    "tests/extension/apps/": "the guest with databases",
    "tests/guests/test_full_guest.py": "the full guest",
    "tests/e2e/test_files_and_disks.py": "the full guest",
}


class ByGuest(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return next(
            (guest for files, guest in SHARED.items() if nodeid.startswith(files)), super()._split_scope(nodeid)
        )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByGuest | None:
    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # it would be by the number of tests
    return ByGuest(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In a process of several: longest time limits first, files as they are."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    longest: dict[str, float] = defaultdict(float)
    for item in items:
        mark = item.get_closest_marker("timeout")
        longest[item.location[0]] = max(longest[item.location[0]], float(mark.args[0]) if mark else 0.0)
    items.sort(key=lambda item: -longest[item.location[0]])
