"""Where the configuration file is: named by option or environment, else in the usual places."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from workers.contract.errors import ConfigError

FILE_NAME = "stillframe.toml"
ENVIRONMENT = "STILLFRAME_CONFIG"


def usual_places() -> list[Path]:
    """Where a configuration is looked for when none is named, in this order."""
    return [Path(FILE_NAME), Path.home() / ".config/stillframe" / FILE_NAME, Path("/etc/stillframe") / FILE_NAME]


def named_config(explicit: Path | None, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The file that was asked for by option or environment, whether it exists or not."""
    if explicit is not None:
        return explicit.expanduser()
    named = environment.get(ENVIRONMENT)
    return Path(named).expanduser() if named else None


def find_config(explicit: Path | None) -> Path:
    """The configuration file to use. Raises ConfigError if there is none."""
    named = named_config(explicit)
    if named is not None:
        if not named.is_file():
            raise ConfigError(
                f"{named}: no such configuration file", hint=f"`stillframe init --config {named}` writes one"
            )
        return named
    for place in usual_places():
        if place.is_file():
            return place.absolute()
    looked = ", ".join(str(place) for place in usual_places())
    raise ConfigError(f"no configuration found (looked for {looked})", hint="`stillframe init` writes one")
