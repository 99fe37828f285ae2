"""What is in `deploy/` to be copied: sample configurations that load, units that systemd reads, a compose file."""

from __future__ import annotations

import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from orchestrator.cli.main import run
from orchestrator.config import load_config
from orchestrator.notify_targets import targets
from orchestrator.schedules import moments

DEPLOY = Path(__file__).parents[2] / "deploy"
SAMPLES = sorted((DEPLOY / "samples").glob("*.toml"))
UNITS = sorted(DEPLOY.glob("*.service"))


def test_they_are_there() -> None:
    assert [file.name for file in SAMPLES] == ["many-hosts.toml", "one-host.toml"]
    assert [file.name for file in UNITS] == [
        "stillframe-controller.service",
        "stillframe-worker@.service",
        "stillframe.service",
    ]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda file: file.stem)
def test_a_sample_is_a_good_configuration(sample: Path) -> None:
    config = load_config(sample)
    now = datetime(2026, 11, 24, 12, tzinfo=UTC)
    for name, policy in config.policies.items():
        assert next(moments(policy, now, now + timedelta(days=2)), None), f"{name} is never due"
        assert policy.retention is not None, f"{name} keeps everything for ever"
    assert config.protections("lab1", "web-1", ["gold"])
    assert config.protections("lab1", "web-1", ["no-backup"]) == []
    assert targets(config.notify)
    assert config.vault_name() == "main"
    assert config.broker_url.startswith("redis" if sample.stem == "many-hosts" else "memory")


@pytest.mark.parametrize("unit", UNITS, ids=lambda file: file.name)
def test_a_unit_runs_a_command_that_there_is(unit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = re.search(r"^ExecStart=\S+/stillframe (.*)$", unit.read_text(), re.MULTILINE)
    assert started is not None
    command, *options = started[1].split()
    assert run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in options if option.startswith("--"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="a check by systemd, where that is installed")
def test_systemd_reads_the_units(tmp_path: Path) -> None:
    copies = []
    for unit in UNITS:
        text = re.sub(r"^ExecStart=\S+", f"ExecStart={shutil.which('true')}", unit.read_text(), flags=re.MULTILINE)
        copies.append(tmp_path / unit.name.replace("@.", "@lab1."))
        copies[-1].write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *map(str, copies)],
        capture_output=True,
        text=True,
        check=False,
    )
    about_ours = [line for line in done.stderr.splitlines() if "stillframe" in line]
    assert (about_ours, done.returncode) == ([], 0)


def test_the_compose_file() -> None:
    made = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services = made["services"]
    assert set(services) == {"redis", "postgres", "controller"}
    images = [service["image"] for service in services.values() if "image" in service]
    assert all(re.fullmatch(r"[a-z]+:\d+", image) for image in images), "plain names"
    for service in services.values():
        assert set(service.get("secrets", [])) <= set(made["secrets"])
        named = [volume.partition(":")[0] for volume in service.get("volumes", [])]
        assert {name for name in named if not name.startswith(".")} <= set(made["volumes"])
    build = services["controller"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    assert services["controller"]["command"] == ["controller"]
