"""`[hypervisors.*]` of the configuration file, changed by commands; nothing is written here (`config_edit.Edit`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.config import Config, parse_config
from orchestrator.config_edit import Edit, read_document
from workers.contract.errors import ConfigError

if TYPE_CHECKING:
    from workers.config import HypervisorConfig


def with_hypervisor(config: Config, name: str, wanted: HypervisorConfig) -> Edit:
    """A new section, or another place and key in one that is there. Raises ConfigError."""
    import tomlkit

    text, document = read_document(config.path)
    keys = {"uri": wanted.uri, "key_file": str(wanted.key_file) if wanted.key_file else None}
    keys["host_key"] = wanted.host_key
    given = {key: value for key, value in keys.items() if value is not None}
    if name in config.worker.hypervisors:
        document["hypervisors"][name].update(given)
        after = document.as_string()
    else:
        lines = [f"[hypervisors.{tomlkit.key(name).as_string()}]"]
        lines += [f"{key} = {tomlkit.item(value).as_string()}" for key, value in given.items()]
        after = text.rstrip("\n") + "\n\n" + "\n".join(lines) + "\n"
    edit = Edit(config.path, text, after, parse_config(after, config.path))
    found = edit.config.worker.hypervisors.get(name)
    if found is None or any(str(getattr(found, key)) != value for key, value in given.items()):
        raise ConfigError(f"{config.path} is written in a way that cannot be changed safely", hint="change it by hand")
    return edit


def without_hypervisor(config: Config, name: str) -> Edit:
    """Raises ConfigError."""
    text, document = read_document(config.path)
    del document["hypervisors"][name]
    after = document.as_string()
    return Edit(config.path, text, after, parse_config(after, config.path))
