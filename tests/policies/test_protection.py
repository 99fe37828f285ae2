"""Which machines a section is for: names, hypervisors, tags, and what is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config import parse_config
from orchestrator.config_file import Protect
from orchestrator.protection import covers, literal

VAULTS = """
[vaults.main]
url = "file:///v"
key_file = "k"
[vaults.far]
url = "file:///f"
key_file = "k2"
[backup]
vault = "main"
[policies.gold]
[policies.plain]
"""


def section(**keys: list[str]) -> Protect:
    return Protect(policy="gold", **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"machines": ["web-*"]}, True),
        ({"machines": ["WEB-*"]}, False),
        ({"machines": ["db", "lab1/*"]}, True),
        ({"machines": ["lab2/*"]}, False),
        ({"tags": ["gold"]}, True),
        ({"tags": ["gol?"]}, True),
        ({"tags": ["silver"]}, False),
        ({"hypervisors": ["lab*"]}, True),
        ({"hypervisors": ["host*"]}, False),
        ({"machines": ["web-*"], "tags": ["silver"]}, False),
        ({"machines": ["web-*"], "tags": ["gold"], "hypervisors": ["lab1"]}, True),
        ({"machines": ["*"], "exclude": ["web-1"]}, False),
        ({"machines": ["*"], "exclude": ["lab1/web-*"]}, False),
        ({"machines": ["*"], "exclude": ["tag:scratch*"]}, False),
        ({"machines": ["*"], "exclude": ["tag:silver", "db-*"]}, True),
        ({"machines": ["*"], "exclude": ["scratch-disks"]}, True),
    ],
)
def test_what_covers_a_machine(keys: dict[str, list[str]], expected: bool) -> None:
    assert covers(section(**keys), "lab1", "web-1", ["gold", "scratch-disks"]) is expected


def test_a_machine_without_tags_fits_no_tag() -> None:
    assert not covers(section(tags=["*"]), "lab1", "web-1", [])
    assert covers(section(machines=["*"], exclude=["tag:*"]), "lab1", "web-1", [])


@pytest.mark.parametrize("name", ["web-1", "a[b]", "what?", "*", "[!x]*", "ünï", "a]b", "new\nline"])
def test_the_literal_of_a_name_means_it_alone(name: str) -> None:
    assert covers(section(machines=[literal(name)]), "h", name, [])
    assert not covers(section(machines=[literal(name)]), "h", f"{name}x", [])
    assert not covers(section(machines=[literal(name)]), "h", "b", [])


def test_the_section_that_counts_is_the_first_into_the_vault() -> None:
    config = parse_config(
        VAULTS + '[protect.near]\nmachines = ["*"]\npolicy = "gold"\n'
        '[protect.away]\ntags = ["far"]\npolicy = "plain"\nvault = "far"\n',
        Path("/c.toml"),
    )
    assert config.protections("h", "m", ["far"]) == ["near", "away"]
    assert config.protected_by("h", "m", ["far"]) == "near"
    assert config.protected_by("h", "m", ["far"], vault="far") == "away"
    assert config.protected_by("h", "m", [], vault="far") == "near"
    assert list(config.policies_into("far", "h", "m", ["far"])) == ["plain"]
