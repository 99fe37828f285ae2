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
from collections.abc import Collection, Iterable
from pathlib import Path

from pydantic import ValidationError

from orchestrator.config_file import (
    ConfigFile,
    GuestSection,
    NotifySection,
    PathsSection,
    Policy,
    Protect,
    UpkeepSection,
    VaultSection,
)
from orchestrator.config_mistakes import Mistake, describe, mistakes, suggest, syntax_error
from orchestrator.config_place import find_config
from orchestrator.protection import covers
from orchestrator.toml_lines import key_lines
from workers.config import ExtensionConfig, GuestAccess, HypervisorConfig, S3Access, VaultConfig, WorkerConfig
from workers.contract.errors import ConfigError, NotFound, UsageError
from workers.contract.machines import Value
from workers.contract.points import Consistency


class ExtensionSettings(Value):
    """What the controller builds, signs and has put into guests. The private key stays with it."""

    install: bool
    signing_key: Path
    """Where the private key is, or will be made."""
    trusted_key: str | None = None
    """`public_key` as written in the file, 64 hex digits."""
    public_key: str | None
    """That, else the one of the key that was made; None: there is none yet."""
    packages: Path
    apps: list[Path] = []
    """Folders `NN-name` of the user's own applications."""
    options: dict[str, str] = {}
    """Application → word, for all machines."""


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
    consistency: Consistency = Consistency.APPLICATION
    """Goal of backups that name none."""
    consistency_explicit: bool = False
    """The file asked for it: falling short of it is then worth exit code 3."""
    block_sizes: dict[str, int] = {}
    """Glob on `machine/target` → bytes; the first match in the file's order counts."""
    policies: dict[str, Policy] = {}
    protect: dict[str, Protect] = {}
    extension: ExtensionSettings
    upkeep: UpkeepSection = UpkeepSection()
    notify: NotifySection = NotifySection()

    def vault_name(self, name: str | None = None) -> str:
        """`name` if it is configured, else the default vault: the only one that is no replica. Raises NotFound or
        UsageError."""
        vaults = self.worker.vaults
        wanted = name or self.vault
        if wanted is not None:
            if wanted not in vaults:
                raise NotFound(f"no vault is named {wanted!r} in {self.path}", hint=_choices(wanted, vaults))
            return wanted
        own = [one for one, vault in vaults.items() if vault.replica_of is None]
        if len(own) == 1:
            return own[0]
        if not vaults:
            raise UsageError(f"{self.path} names no vault", hint="add a [vaults.main] section, then `stillframe init`")
        raise UsageError(
            f"{self.path} names several vaults and no default",
            hint=f'--vault {next(iter(vaults))}, or vault = "{next(iter(vaults))}" in [backup]',
        )

    def protections(self, hypervisor: str, machine: str, tags: Collection[str]) -> list[str]:
        """Names of all `[protect.*]` sections that cover the machine, in the order of the file."""
        return [name for name, protect in self.protect.items() if covers(protect, hypervisor, machine, tags)]

    def protected_by(
        self, hypervisor: str, machine: str, tags: Collection[str], *, vault: str | None = None
    ) -> str | None:
        """Name of the section whose policy counts for the machine's backups: the first that covers it and goes into
        `vault`, if that is given and there is one, else the first that covers it at all."""
        found = (name for name, protect in self.protect.items() if covers(protect, hypervisor, machine, tags))
        first = next(found, None)
        if vault is None or first is None or self.vault_of(first) == vault:
            return first
        return next((name for name in found if self.vault_of(name) == vault), first)

    def vault_of(self, section: str) -> str | None:
        """The vault of a `[protect.*]` section; None if it names none and there is no default."""
        try:
            return self.vault_name(self.protect[section].vault)
        except UsageError:
            return None

    def policy_for(
        self, hypervisor: str, machine: str, tags: Collection[str], *, vault: str | None = None
    ) -> Policy | None:
        """The policy of the machine's backups: see `protected_by`."""
        name = self.protected_by(hypervisor, machine, tags, vault=vault)
        return self.policies[self.protect[name].policy] if name is not None else None

    def policies_into(self, vault: str, hypervisor: str, machine: str, tags: Collection[str]) -> dict[str, Policy]:
        """The policies, by name, of all sections that cover the machine and back it up into that vault. Raises
        UsageError if a section names no vault and there is no default."""
        sections = [self.protect[name] for name in self.protections(hypervisor, machine, tags)]
        used = [section.policy for section in sections if self.vault_name(section.vault) == vault]
        return {name: self.policies[name] for name in used}


def _choices(word: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]}?"
    return f"there are: {', '.join(names)}" if names else ""


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
        raise syntax_error(str(error), text, file) from None
    lines = key_lines(text)
    try:
        written = ConfigFile.model_validate(data)
    except ValidationError as error:
        raise mistakes(file, lines, [describe(detail) for detail in error.errors()]) from None
    if wrong := [*_dangling(written), *_shared_keys(written, file.parent)]:
        raise mistakes(file, lines, wrong)
    return _resolve(written, file)


# --- references between sections -----------------------------------------------------------------------------------


def _dangling(written: ConfigFile) -> Iterable[Mistake]:
    """Names that one section uses and no other defines."""
    uses: list[tuple[list[str], str | None, Iterable[str], str]] = [
        (["backup", "vault"], written.backup.vault, written.vaults, "vault")
    ]
    for name, protect in written.protect.items():
        uses.append((["protect", name, "vault"], protect.vault, written.vaults, "vault"))
        uses.append((["protect", name, "policy"], protect.policy, written.policies, "policy"))
    for name, vault in written.vaults.items():
        uses.append((["vaults", name, "replica_of"], vault.replica_of, set(written.vaults) - {name}, "other vault"))
    for where, used, known, noun in uses:
        if used is not None and used not in known:
            yield where, f"no {noun} is named {used!r}{suggest(used, known)}"


def _shared_keys(written: ConfigFile, base: Path) -> Iterable[Mistake]:
    """A vault's key as signing key: every worker that can open the vault could then sign what guests run as root."""
    signing = _signing_key(written, base)
    for name, vault in written.vaults.items():
        if vault.key_file is not None and _path(vault.key_file, base) == signing:
            yield ["extension", "signing_key"], f"signing_key is the key of vault {name}: it needs a file of its own"


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


def _signing_key(written: ConfigFile, base: Path) -> Path:
    return _path(written.extension.signing_key, base) or base / "extension.key"


def public_key_file(signing_key: Path) -> Path:
    """The public half lies beside the private one: whoever only verifies need not be able to read that."""
    return signing_key.with_name(f"{signing_key.name}.pub")


def _extension(written: ConfigFile, base: Path, state: Path) -> ExtensionSettings:
    section = written.extension
    signing_key = _signing_key(written, base)
    return ExtensionSettings(
        install=section.install,
        signing_key=signing_key,
        trusted_key=section.public_key,
        public_key=section.public_key or _made_public_key(public_key_file(signing_key)),
        packages=state / "extensions",
        apps=[path for app in section.apps if (path := _path(app, base))],
        options=section.options,
    )


def _made_public_key(path: Path) -> str | None:
    try:
        digits = path.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the public key {path} cannot be read: {error}", hint=f"chmod 644 {path}") from None
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise ConfigError(f"{path} is no public key", hint=f"rm {path}; stillframe extension build")
    return digits


def _guest(machines: str, section: GuestSection, base: Path) -> GuestAccess:
    fields = section.model_dump() | {"machines": machines, "key_file": _path(section.key_file, base)}
    return GuestAccess.model_validate(fields)


def _vault(section: VaultSection, base: Path) -> VaultConfig:
    def located(url: str) -> str:
        return f"file://{_path(url.removeprefix('file://'), base)}" if url.startswith("file://") else url

    s3 = section.s3
    return VaultConfig(
        url=located(section.url),
        s3=S3Access(
            endpoint=s3.endpoint,
            region=s3.region,
            path_style=s3.path_style,
            ca_file=_path(s3.ca_file, base),
            credentials_file=_path(s3.credentials_file, base),
        ),
        mirrors=[located(url) for url in section.mirrors],
        key_file=_path(section.key_file, base),
        passphrase_file=_path(section.passphrase_file, base),
        key_command=section.key_command or [],
        replica_of=section.replica_of,
        bandwidth=section.bandwidth,
        delete_delay_days=section.delete_delay_days,
        soft_delete_days=section.soft_delete_days,
        max_jobs=section.max_jobs,
    )


def _worker(written: ConfigFile, base: Path, extension: ExtensionSettings) -> WorkerConfig:
    state, scratch, runtime, cache = _default_paths(written.paths, base)
    backup = written.backup
    tuning = {
        "block_size": backup.block_size,
        "transfer_threads": backup.threads,
        "scratch_floor": backup.scratch_floor,
    }
    trusted = ExtensionConfig(
        packages=extension.packages, public_key=extension.public_key, host_keys=state / "guest_host_keys"
    )
    return WorkerConfig(
        vaults={name: _vault(vault, base) for name, vault in written.vaults.items()},
        hypervisors={
            name: HypervisorConfig(
                **one.model_dump(exclude={"scratch_dir", "key_file"}),
                scratch_dir=_path(one.scratch_dir, base),
                key_file=_path(one.key_file, base),
            )
            for name, one in written.hypervisors.items()
        },
        extension=trusted if extension.install else None,
        guests=[_guest(machines, section, base) for machines, section in written.guests.items()],
        scratch_dir=scratch,
        runtime_dir=runtime,
        cache_dir=cache,
        **{key: value for key, value in tuning.items() if value is not None},
    )


def _notify(section: NotifySection, base: Path) -> NotifySection:
    """With absolute paths."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else str(_path(path, base))

    email, webhooks = section.email, section.webhooks
    if email is not None:
        files = {"ca_file": absolute(email.ca_file), "password_file": absolute(email.password_file)}
        email = email.model_copy(update=files)
    return NotifySection(
        email=email,
        webhooks={
            name: hook.model_copy(update={"secret_file": absolute(hook.secret_file), "ca_file": absolute(hook.ca_file)})
            for name, hook in webhooks.items()
        },
    )


def _resolve(written: ConfigFile, file: Path) -> Config:
    base = file.parent
    state, *_ = _default_paths(written.paths, base)
    extension = _extension(written, base, state)
    return Config(
        path=file,
        catalog_url=_catalog_url(written.catalog.url, base, state),
        broker_url=written.broker.url,
        worker=_worker(written, base, extension),
        state_dir=state,
        vault=written.backup.vault,
        consistency=written.backup.consistency or Consistency.APPLICATION,
        consistency_explicit=written.backup.consistency is not None,
        block_sizes=written.backup.block_sizes,
        policies=written.policies,
        protect=written.protect,
        extension=extension,
        upkeep=written.upkeep,
        notify=_notify(written.notify, base),
    )
