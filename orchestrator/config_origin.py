"""Every setting in force, and where it was written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from orchestrator.config import Config
from orchestrator.config_file import ConfigFile
from orchestrator.toml_lines import key_lines, line_of

_SECRETS = re.compile(r"(?<=//)[^/@\s]*:[^/@\s]*@")


@dataclass(frozen=True, slots=True)
class Setting:
    key: str
    """`policies.gold.spread`."""
    value: object
    line: int
    """In the file; 0: it is not written there."""

    @property
    def text(self) -> str:
        """For people, as it would be written."""
        return json.dumps(self.value, ensure_ascii=False) if self.value is not None else "–"


def settings(config: Config) -> list[Setting]:
    """In the order of the file's sections. Passwords in URLs are left out, and so is the path of a webhook, which is
    one."""
    import tomllib

    text = config.path.read_bytes().decode()
    raw = tomllib.loads(text)
    written = ConfigFile.model_validate(raw)
    lines, resolved = key_lines(text), _resolved(config)
    found = []
    for path, value in _flat((), written.model_dump(mode="json")):
        shown = resolved.get(path, value)
        line = line_of(lines, path) if _is_written(raw, path) else 0
        found.append(Setting(_name(path), _public(path, shown), line))
    return found


def _resolved(config: Config) -> dict[tuple[str, ...], object]:
    """What stands for a key that is not written, or written in part."""
    worker = config.worker
    return {
        ("catalog", "url"): config.catalog_url,
        ("backup", "consistency"): config.consistency.value,
        ("backup", "block_size"): worker.block_size,
        ("backup", "threads"): worker.transfer_threads,
        ("backup", "scratch_floor"): worker.scratch_floor,
        ("extension", "signing_key"): str(config.extension.signing_key),
        ("extension", "public_key"): config.extension.public_key,
        ("paths", "state"): str(config.state_dir),
        ("paths", "scratch"): str(worker.scratch_dir),
        ("paths", "runtime"): str(worker.runtime_dir),
        ("paths", "cache"): str(worker.cache_dir),
    }


def _flat(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat((*path, key), inner)
    elif value != {}:
        yield path, value


def _is_written(raw: Any, path: tuple[str, ...]) -> bool:
    for part in path:
        if not isinstance(raw, dict) or part not in raw:
            return False
        raw = raw[part]
    return True


def _name(path: tuple[str, ...]) -> str:
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else json.dumps(part) for part in path)


def _public(path: tuple[str, ...], value: object) -> object:
    if isinstance(value, list):
        return [_public(path, one) for one in value]
    if not isinstance(value, str):
        return value
    if path[:2] == ("notify", "webhooks") and path[-1] == "url":
        parts = urlsplit(value)
        return f"{parts.scheme}://{parts.hostname}/…"
    return _SECRETS.sub("…@", value)
