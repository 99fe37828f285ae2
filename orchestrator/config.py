"""The configuration, resolved: what the controller decides by, and the part of it that workers need.

One file, read once, turned into one frozen value that is handed down: nothing in the data path looks anything up.
A mistake is a ConfigError that names file, line, and what was probably meant; all mistakes are told at once, and
nothing is done with a file that has one.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from pydantic import BaseModel, ValidationError

from orchestrator.config_file import ConfigFile, PathsSection, Policy, Protect
from orchestrator.toml_lines import key_lines, line_of
from workers.config import HypervisorConfig, VaultConfig, WorkerConfig
from workers.contract.errors import ConfigError, NotFound, UsageError
from workers.contract.machines import Value
from workers.contract.points import Consistency

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

FILE_NAME = "stillframe.toml"
ENVIRONMENT = "STILLFRAME_CONFIG"


class Config(Value):
    """All settings, with paths absolute and names checked against each other."""

    path: Path
    """The file it was read from."""
    catalog_url: str
    """SQLAlchemy URL."""
    broker_url: str
    """`memory://`: the embedded worker; else where workers listen."""
    worker: WorkerConfig
    state_dir: Path
    """The controller's own folder: default catalog, logs of crashes."""
    vault: str | None = None
    """Vault of backups that name none; None: the only one there is."""
    consistency: Consistency = Consistency.FILESYSTEM
    """Goal of backups that name none."""
    consistency_explicit: bool = False
    """The file asked for it: falling short of it is then worth exit code 3."""
    block_sizes: dict[str, int] = {}
    """Glob on `machine/target` → bytes; the first match in the file's order counts."""
    policies: dict[str, Policy] = {}
    protect: dict[str, Protect] = {}

    def vault_name(self, name: str | None = None) -> str:
        """`name` if it is configured, else the default vault. Raises NotFound or UsageError."""
        vaults = self.worker.vaults
        wanted = name or self.vault
        if wanted is not None:
            if wanted not in vaults:
                raise NotFound(f"no vault is named {wanted!r} in {self.path}", hint=_choices(wanted, vaults))
            return wanted
        if len(vaults) == 1:
            return next(iter(vaults))
        if not vaults:
            raise UsageError(f"{self.path} names no vault", hint="add a [vaults.main] section, then `stillframe init`")
        raise UsageError(
            f"{self.path} names several vaults and no default",
            hint=f'--vault {next(iter(vaults))}, or vault = "{next(iter(vaults))}" in [backup]',
        )

    def protected_by(self, hypervisor: str, machine: str) -> str | None:
        """Name of the first `[protect.*]` section that covers the machine, if any."""
        for name, protect in self.protect.items():
            if _covers(protect.machines, hypervisor, machine) and not _covers(protect.exclude, hypervisor, machine):
                return name
        return None


def _covers(globs: Iterable[str], hypervisor: str, machine: str) -> bool:
    return any(fnmatchcase(f"{hypervisor}/{machine}" if "/" in glob else machine, glob) for glob in globs)


def _choices(word: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]}?"
    return f"there are: {', '.join(names)}" if names else ""


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


def load_config(path: Path | None) -> Config:
    """Read and check the configuration at `path`, or in the usual places. Raises ConfigError."""
    file = find_config(path).absolute()
    try:
        text = file.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{file}:{line}: is not UTF-8 text") from None
    return parse_config(text, file)


def parse_config(text: str, file: Path) -> Config:
    """The configuration in `text`; `file` is where it stands, for messages and relative paths. Raises ConfigError."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(str(error), text, file) from None
    lines = key_lines(text)
    try:
        written = ConfigFile.model_validate(data)
    except ValidationError as error:
        raise _mistakes(file, lines, [_describe(detail) for detail in error.errors()]) from None
    if dangling := list(_dangling(written)):
        raise _mistakes(file, lines, dangling)
    return _resolve(written, file)


# --- mistakes --------------------------------------------------------------------------------------------------

Mistake = tuple[Sequence[str | int], str]


def _mistakes(file: Path, lines: dict[tuple[str, ...], int], mistakes: Sequence[Mistake]) -> ConfigError:
    placed = sorted((line_of(lines, where), what) for where, what in mistakes)
    return ConfigError("\n".join(f"{file}:{line}: {what}" for line, what in placed))


def _syntax_error(message: str, text: str, file: Path) -> ConfigError:
    place = re.search(r" \(at line (\d+), column \d+\)$| \(at end of document\)$", message)
    line = int(place[1]) if place and place[1] else max(1, len(text.splitlines()))
    return ConfigError(f"{file}:{line}: not valid TOML: {message[: place.start()] if place else message}")


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


def _suggest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _table(path: Sequence[str | int]) -> str:
    return f"[{'.'.join(str(part) for part in path)}]" if path else "the file"


def _describe(detail: ErrorDetails) -> Mistake:
    """One of pydantic's findings in words for people."""
    where = [part for part in detail["loc"] if part != "[key]"]
    key = str(where[-1]) if where else ""
    value = detail["input"]
    match detail["type"]:
        case "extra_forbidden":
            what = f"unknown {'section' if len(where) == 1 and isinstance(value, dict) else 'key'} {key!r}"
            what += f" in {_table(where[:-1])}" if len(where) > 1 else ""
            what += _suggest(key, _fields_at(where[:-1]))
        case "missing":
            what = f"{_table(where[:-1])} needs {key}"
        case "model_type" | "dict_type":
            what = f"{key} must be a table, not {value!r}"
        case "string_type":
            what = f"{key} must be text in quotes, not {value!r}"
        case "int_type":
            what = f"{key} must be a whole number, not {value!r}"
        case "bool_type":
            what = f"{key} must be true or false, not {value!r}"
        case "list_type":
            what = f'{key} must be a list like ["web-*"], not {value!r}'
        case "enum":
            what = f"{key} must be {detail['ctx']['expected']}, not {value!r}"
            what += _suggest(str(value), [consistency.value for consistency in Consistency])
        case "string_pattern_mismatch" if where[:2] == ["backup", "block_sizes"]:
            what = f'{value!r} does not name disks: write "machine/target", like "web-*/vdb"'
        case "string_pattern_mismatch":
            what = f"{value!r} cannot be a name: letters, digits, dot, dash and underscore, at most 64"
        case "value_error":
            what = f"{_name_of(where)}{detail['ctx']['error']}"
        case _:
            what = f"{key}: {detail['msg'][:1].lower()}{detail['msg'][1:]}, not {value!r}"
    return where, what


def _name_of(where: Sequence[str | int]) -> str:
    return f"{where[-1]}: " if where else ""


def _dangling(written: ConfigFile) -> Iterable[Mistake]:
    """Names that one section uses and no other defines."""
    uses: list[tuple[list[str], str | None, Iterable[str], str]] = [
        (["backup", "vault"], written.backup.vault, written.vaults, "vault")
    ]
    for name, protect in written.protect.items():
        uses.append((["protect", name, "vault"], protect.vault, written.vaults, "vault"))
        uses.append((["protect", name, "policy"], protect.policy, written.policies, "policy"))
    for where, used, known, noun in uses:
        if used is not None and used not in known:
            yield where, f"no {noun} is named {used!r}{_suggest(used, known)}"


# --- resolution ------------------------------------------------------------------------------------------------


def _default_paths(paths: PathsSection, base: Path) -> tuple[Path, Path, Path, Path]:
    """State, scratch, runtime and cache folders. A chosen state folder keeps scratch and cache with it; sockets stay
    in the short runtime folder, since a unix socket's path may have 107 bytes at most."""
    root = os.geteuid() == 0
    state = _path(paths.state, base)
    home = Path("/var/lib/stillframe") if root else Path.home() / ".local/share/stillframe"
    session = os.environ.get("XDG_RUNTIME_DIR")
    runtime = Path("/run/stillframe") if root else Path(session, "stillframe") if session else home / "run"
    cache = Path("/var/cache/stillframe") if root else Path.home() / ".cache/stillframe"
    return (
        state or home,
        _path(paths.scratch, base) or (state or home) / "scratch",
        _path(paths.runtime, base) or runtime,
        _path(paths.cache, base) or (state / "cache" if state else cache),
    )


def _path(written: str | None, base: Path) -> Path | None:
    """`~` expanded, and relative to the configuration file's folder; None stays None."""
    return None if written is None else Path(os.path.normpath(base / Path(written).expanduser()))


def _catalog_url(written: str | None, base: Path, state: Path) -> str:
    if written is None:
        return f"sqlite:///{state / 'catalog.sqlite'}"
    if written.startswith("sqlite:///"):
        return f"sqlite:///{_path(written.removeprefix('sqlite:///'), base)}"
    return written


def _resolve(written: ConfigFile, file: Path) -> Config:
    base = file.parent
    state, scratch, runtime, cache = _default_paths(written.paths, base)
    backup = written.backup
    tuning = {
        "block_size": backup.block_size,
        "transfer_threads": backup.threads,
        "scratch_floor": backup.scratch_floor,
    }
    worker = WorkerConfig(
        vaults={
            name: VaultConfig(
                url=f"file://{_path(vault.url.removeprefix('file://'), base)}",
                key_file=_path(vault.key_file, base),
                passphrase_file=_path(vault.passphrase_file, base),
            )
            for name, vault in written.vaults.items()
        },
        hypervisors={
            name: HypervisorConfig(uri=one.uri, max_jobs=one.max_jobs, scratch_dir=_path(one.scratch_dir, base))
            for name, one in written.hypervisors.items()
        },
        scratch_dir=scratch,
        runtime_dir=runtime,
        cache_dir=cache,
        **{key: value for key, value in tuning.items() if value is not None},
    )
    return Config(
        path=file,
        catalog_url=_catalog_url(written.catalog.url, base, state),
        broker_url=written.broker.url,
        worker=worker,
        state_dir=state,
        vault=backup.vault,
        consistency=backup.consistency or Consistency.FILESYSTEM,
        consistency_explicit=backup.consistency is not None,
        block_sizes=backup.block_sizes,
        policies=written.policies,
        protect=written.protect,
    )
