"""Mistakes in a configuration file in words for people: the line, what is wrong, what was probably meant.

What pydantic says of a value is right and unreadable for whoever only wanted to name a vault; here each of its
findings gets the words of the file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from pydantic import BaseModel

from orchestrator.config_file import ConfigFile
from orchestrator.toml_lines import line_of
from workers.contract.errors import ConfigError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Mistake = tuple[Sequence[str | int], str]
"""Where (path of keys), and what."""

_KINDS = {
    "model_type": "a table",
    "dict_type": "a table",
    "string_type": "text in quotes",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "list_type": 'a list like ["web-*"]',
}


def mistakes(file: Path, lines: dict[tuple[str, ...], int], found: Sequence[Mistake]) -> ConfigError:
    """All of them, in the order of the file."""
    placed = sorted((line_of(lines, where), what) for where, what in found)
    return ConfigError("\n".join(f"{file}:{line}: {what}" for line, what in placed))


def syntax_error(message: str, text: str, file: Path) -> ConfigError:
    """`message` is what tomllib says."""
    place = re.search(r" \(at line (\d+), column \d+\)$| \(at end of document\)$", message)
    line = int(place[1]) if place and place[1] else max(1, len(text.splitlines()))
    return ConfigError(f"{file}:{line}: not valid TOML: {message[: place.start()] if place else message}")


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def describe(detail: ErrorDetails) -> Mistake:
    """One of pydantic's findings."""
    where = [part for part in detail["loc"] if part != "[key]"]
    named = [part for part in where if not isinstance(part, int)]  # of an item of a list: the list's own name
    key = str(named[-1]) if named else ""
    value = detail["input"]
    match detail["type"]:
        case "extra_forbidden":
            what = f"unknown {'section' if len(where) == 1 and isinstance(value, dict) else 'key'} {key!r}"
            what += f" in {_table(where[:-1])}" if len(where) > 1 else ""
            what += suggest(key, _fields_at(where[:-1]))
        case "missing":
            what = f"{_table(where[:-1])} needs {key}"
        case "enum" | "literal_error":
            expected = detail["ctx"]["expected"]
            what = f"{key} must be {expected}, not {value!r}"
            what += suggest(str(value), re.findall(r"'(\w+)'", expected))
        case "string_pattern_mismatch":
            what = _misnamed(where, key, value)
        case "value_error":
            what = f"{key}: {detail['ctx']['error']}" if where else str(detail["ctx"]["error"])
        case kind if kind in _KINDS:
            what = f"{key} must be {_KINDS[kind]}, not {value!r}"
        case _:
            what = f"{key}: {detail['msg'][:1].lower()}{detail['msg'][1:]}, not {value!r}"
    return where, what


def _misnamed(where: Sequence[str | int], key: str, value: object) -> str:
    if where[:2] == ["backup", "block_sizes"]:
        return f'{value!r} does not name disks: write "machine/target", like "web-*/vdb"'
    if where[0] == "guests":
        return f"{value!r} cannot be the {key} of a guest"
    return f"{value!r} cannot be a name: letters, digits, dot, dash and underscore, at most 64"


def _fields_at(path: Sequence[str | int]) -> list[str]:
    """Keys that the file's shape allows in the table at `path`."""
    section: type[BaseModel] = ConfigFile
    for part in path:
        field = section.model_fields.get(str(part))
        if field is None:
            continue  # the name of a vault, policy …: its fields are those of the table around it
        kinds = (field.annotation, *get_args(field.annotation))
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), section)
    return list(section.model_fields)


def _table(path: Sequence[str | int]) -> str:
    return f"[{'.'.join(str(part) for part in path)}]" if path else "the file"
