"""A host of the tests, as Stillframe reaches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.hosts.host import Host as Lab
from workers.config import HypervisorConfig
from workers.contract.hosts import Host
from workers.hosts import open_host


def config_of(lab: Lab, port: int | None = None) -> HypervisorConfig:
    """How to reach it; `port`: of a relay in between."""
    return HypervisorConfig(
        uri=f"qemu+ssh://root@127.0.0.1:{port or lab.port}/system", key_file=lab.client_key, host_key=lab.host_key
    )


@contextmanager
def ssh_host(lab: Lab, runtime: Path, port: int | None = None) -> Iterator[Host]:
    host = open_host(config_of(lab, port), name="lab1", runtime_dir=runtime)
    try:
        yield host
    finally:
        host.close()
