"""What a configuration may say, and probably does not mean: told by `config check`, never a reason to refuse it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator.config import Config
from orchestrator.primary import require_primary
from orchestrator.protection import TAG
from orchestrator.toml_lines import key_lines, line_of
from workers.contract.errors import NotFound, UsageError


@dataclass(frozen=True, slots=True)
class Doubt:
    line: int
    text: str


def doubts(config: Config) -> list[Doubt]:
    """In the order of the file."""
    lines = key_lines(_text(config.path))
    found: list[tuple[list[str], str]] = []
    for name, section in config.protect.items():
        where = ["protect", name]
        try:
            require_primary(config, section.vault)
        except (UsageError, NotFound) as error:
            found.append(([*where, "vault"], f"[protect.{name}] backs nothing up: {error}"))
        for key in ("machines", "exclude"):
            found += [([*where, key], text) for glob in getattr(section, key) or [] if (text := _unknown(config, glob))]
        policy = config.policies[section.policy]
        if not (policy.schedule or policy.cron):
            why = f"policy {section.policy} has no schedule: nothing of [protect.{name}] begins by itself"
            found.append(([*where, "policy"], why))
        found += [(where, text) for text in _shadow(config, name)]
    used = {section.policy for section in config.protect.values()}
    for name in config.policies:
        if name not in used:
            found.append((["policies", name], f"no [protect.*] section uses policy {name}"))
    if config.protect and not config.worker.hypervisors:
        found.append((["protect"], "no hypervisor is configured: there are no machines"))
    return sorted((Doubt(line_of(lines, where), text) for where, text in found), key=lambda one: (one.line, one.text))


def _unknown(config: Config, glob: str) -> str:
    """A glob on a hypervisor that is not configured."""
    from fnmatch import fnmatchcase

    host, slash, _ = glob.partition("/")
    if not slash or glob.startswith(TAG) or any(fnmatchcase(name, host) for name in config.worker.hypervisors):
        return ""
    known = ", ".join(config.worker.hypervisors) or "none"
    return f'"{glob}" is on no hypervisor that is configured ({known})'


def _shadow(config: Config, name: str) -> list[str]:
    """Sections before it that cover everything and go into the same vault."""
    vault = config.vault_of(name)
    for other, section in config.protect.items():
        if other == name:
            return []
        takes_all = section.machines in (None, ["*"]) and section.tags in (None, ["*"]) and not section.exclude
        everywhere = section.hypervisors in (None, ["*"]) and section.tags is None
        if takes_all and everywhere and config.vault_of(other) == vault:
            return [f"[protect.{name}] never counts: [protect.{other}] before it has all machines in vault {vault}"]
    return []


def _text(path: Path) -> str:
    return path.read_bytes().decode()
