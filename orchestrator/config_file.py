"""The shape of stillframe.toml: sections, keys, and what a value may be (DESIGN section 7).

Kept apart from `config.py`, which resolves what is written here (paths, defaults, references between sections): a key
that is not a field below is a mistake in the file, and no key is ever ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StrictInt, model_validator

from orchestrator.config_notify import EmailSection, WebhookSection
from workers.contract.machines import Value
from workers.contract.points import Consistency

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = re.compile(r"^\s*(\d+)\s*([A-Za-z]*)\s*$")
_TIME = r"([01]\d|2[0-3]):[0-5]\d"
_DAYS = "daily|weekdays|weekends|weekly|monthly|mondays|tuesdays|wednesdays|thursdays|fridays|saturdays|sundays"
_SCHEDULE = re.compile(rf"^(hourly|({_DAYS}) at {_TIME}|every \d+ (minutes|hours?)( from {_TIME} to {_TIME})?)$")
_BLACKOUT = re.compile(rf"^(({_DAYS.replace('|weekly|monthly', '')}) )?{_TIME} to {_TIME}$")
_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_DURATION = re.compile(r"^\s*(\d+)\s*(second|minute|hour|day)s?\s*$")
_CRON_FIELD = re.compile(r"^[0-9A-Za-z*/,#?L-]+$")

MIN_BLOCK = 64 << 10
MAX_BLOCK = 4 << 20


def parse_size(value: object) -> int:
    """Bytes of `"256KiB"`, `"1MiB"`, or a whole number of bytes. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'{value!r} is not a size; write it like "256KiB" or "1MiB"')
    if match[2] not in _UNITS:
        near = [unit for unit in _UNITS if unit and unit[0] == match[2][0].upper()]
        guess = f'; did you mean "{match[1]}{near[0]}"?' if near else ""
        raise ValueError(f'"{match[2]}" is no unit of size (B, KiB, MiB, GiB, TiB){guess}')
    return int(match[1]) * _UNITS[match[2]]


def _block_size(value: int) -> int:
    if not MIN_BLOCK <= value <= MAX_BLOCK or value & (value - 1):
        raise ValueError("a block size is a power of two from 64KiB to 4MiB")
    return value


def _scheme(what: str, *allowed: str) -> Callable[[str], str]:
    def check(url: str) -> str:
        if not url.startswith(allowed):
            raise ValueError(f'"{url}" is no {what} that this version knows ({", ".join(allowed)})')
        return url

    return check


def _store_url(url: str) -> str:
    if re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9._-]+)*/?", url):
        return url.rstrip("/")
    if url.startswith("s3:"):
        raise ValueError(f'"{url}" is no bucket; write it like "s3://bucket" or "s3://bucket/folder"')
    if not url.startswith("file://"):
        guess = f'; did you mean "file://{url}"?' if url.startswith(("/", "~", "./")) else ""
        raise ValueError(f'"{url}" is no vault that this version knows (file:///path, s3://bucket/prefix){guess}')
    path = url.removeprefix("file://")
    if not path.startswith(("/", "~", "./", "../")):
        raise ValueError(f'"{url}" names a host where a path should begin; did you mean "file:///{path}"?')
    return url


def _schedule(words: str) -> str:
    if not _SCHEDULE.match(words):
        raise ValueError(
            f'"{words}" is no schedule; write "hourly", "daily at 02:00", "weekdays at 22:30", '
            '"every 4 hours from 08:00 to 20:00", or use cron = "0 2 * * *"'
        )
    return words


def parse_duration(value: object) -> int:
    """Seconds of `"30 minutes"`, `"4 hours"`, `"1 day"`, or a whole number of seconds. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _DURATION.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'{value!r} is no length of time; write it like "30 minutes" or "4 hours"')
    return int(match[1]) * _SECONDS[match[2]]


def _blackout(words: str) -> str:
    if not _BLACKOUT.match(words):
        raise ValueError(f'"{words}" is no window; write it like "08:00 to 18:00" or "weekdays 08:00 to 18:00"')
    return words


def _cron(expression: str) -> str:
    fields = expression.split()
    if len(fields) != 5 or not all(_CRON_FIELD.match(field) for field in fields):
        raise ValueError(f'"{expression}" is no cron expression of five fields, like "0 2 * * *"')
    return expression


def _upkeep(words: str) -> str:
    return words if words == "never" else _schedule(words)


def _timezone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(f'"{name}" is no time zone; write it like "Europe/Berlin"') from None
    return name


def _public_key(digits: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise ValueError("a public key has 64 hex digits, as `stillframe extension list` shows it")
    return digits


def _host_key(line: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9@.-]+ [A-Za-z0-9+/]{16,}={0,3}( .*)?", line):
        raise ValueError('a host key is written like "ssh-ed25519 AAAA…", as `ssh-keyscan HOST` prints it')
    return line


def _application(name: str) -> str:
    if re.match(r"\d\d-", name):
        raise ValueError(f'"{name}" is a folder; an option is for the application: did you mean {name[3:]}?')
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", name):
        raise ValueError(f'"{name}" is no application: write its folder\'s name without the number, like postgresql')
    return name


def _word(word: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}", word):
        raise ValueError(f'"{word}" is not one word of letters, digits, dot, colon, dash and underscore')
    return word


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Size = Annotated[int, BeforeValidator(parse_size)]
Duration = Annotated[int, BeforeValidator(parse_duration)]
BlockSize = Annotated[Size, AfterValidator(_block_size)]
Path_ = Annotated[str, Field(min_length=1)]
Options = dict[Annotated[str, AfterValidator(_application)], Annotated[str, AfterValidator(_word)]]


class CatalogSection(Value):
    url: Annotated[str, AfterValidator(_scheme("catalog", "sqlite:///", "postgresql"))] | None = None


class BrokerSection(Value):
    url: Annotated[str, AfterValidator(_scheme("broker", "memory://", "redis://", "rediss://"))] = "memory://"


class S3Section(Value):
    """See `workers.config.S3Access`."""

    endpoint: Annotated[str, AfterValidator(_scheme("endpoint", "https://", "http://"))] | None = None
    region: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+$")] | None = None
    path_style: StrictBool = False
    ca_file: Path_ | None = None
    credentials_file: Path_ | None = None


Days = Annotated[StrictInt, Field(ge=0, le=36500)]


class VaultSection(Value):
    """See `workers.config.VaultConfig`."""

    url: Annotated[str, AfterValidator(_store_url)]
    s3: S3Section = S3Section()
    mirrors: list[Annotated[str, AfterValidator(_store_url)]] = []
    key_file: Path_ | None = None
    passphrase_file: Path_ | None = None
    key_command: Annotated[list[str], Field(min_length=1)] | None = None
    replica_of: str | None = None
    bandwidth: Annotated[Size, Field(ge=1)] | None = None
    delete_delay_days: Days = 7
    soft_delete_days: Days = 14
    max_jobs: Annotated[StrictInt, Field(ge=1, le=1024)] | None = None

    @model_validator(mode="after")
    def _one_key(self) -> VaultSection:
        keys = ("key_file", "passphrase_file", "key_command")
        given = [key for key in keys if getattr(self, key) is not None]
        if not given:
            raise ValueError('a vault needs its key: add key_file = "/etc/stillframe/main.key"')
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} exclude each other: keep one")
        return self

    @model_validator(mode="after")
    def _s3_is_used(self) -> VaultSection:
        if self.s3 != S3Section() and not any(url.startswith("s3://") for url in (self.url, *self.mirrors)):
            raise ValueError("s3 is for a vault whose url begins with s3://")
        return self


class HypervisorSection(Value):
    """See `workers.config.HypervisorConfig`."""

    uri: Annotated[str, AfterValidator(_scheme("hypervisor", "qemu:///", "qemu+", "qemu://", "qmp+unix://"))]
    max_jobs: Annotated[StrictInt, Field(ge=1, le=64)] = 2
    max_transfers: Annotated[StrictInt, Field(ge=1, le=256)] | None = None
    bandwidth: Annotated[Size, Field(ge=1)] | None = None
    key_file: Path_ | None = None
    host_key: Annotated[str, AfterValidator(_host_key)] | None = None
    scratch_dir: Path_ | None = None


class Retention(Value):
    """How many points to keep of each kind; 0 keeps none of that kind."""

    last: Annotated[StrictInt, Field(ge=0)] = 0
    hourly: Annotated[StrictInt, Field(ge=0)] = 0
    daily: Annotated[StrictInt, Field(ge=0)] = 0
    weekly: Annotated[StrictInt, Field(ge=0)] = 0
    monthly: Annotated[StrictInt, Field(ge=0)] = 0
    yearly: Annotated[StrictInt, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _keeps_something(self) -> Retention:
        if not any((self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly)):
            raise ValueError("this retention keeps nothing; write for example { daily = 7, weekly = 4 }")
        return self


class Policy(Value):
    """When to back up, what consistency to ask for, how long to keep."""

    schedule: Annotated[str, AfterValidator(_schedule)] | None = None
    cron: Annotated[str, AfterValidator(_cron)] | None = None
    timezone: Annotated[str, AfterValidator(_timezone)] | None = None
    spread: Annotated[Duration, Field(le=86400)] = 0
    """Seconds. Each machine begins at a moment of its own, always the same one, within so long after the moment that
    is due."""
    blackout: list[Annotated[str, AfterValidator(_blackout)]] = []
    """No backup begins in these windows; one that is due in one begins at its end."""
    priority: Annotated[StrictInt, Field(ge=-4, le=4)] = 0
    """Of the backups that wait, those with the higher number begin first."""
    deadline: Annotated[Duration, Field(ge=60)] = 86400
    """Seconds after which a backup that has not ended is reported as overdue."""
    consistency: Consistency | None = None
    """None: what `[backup]` says."""
    require: StrictBool = False
    """Fail rather than fall back below `consistency`."""
    options: Options = {}
    """Application → word for its script in the guest; added to those of `[extension]`."""
    retention: Retention | None = None

    @model_validator(mode="after")
    def _one_schedule(self) -> Policy:
        if self.schedule is not None and self.cron is not None:
            raise ValueError("schedule and cron exclude each other: keep one")
        return self


class Protect(Value):
    """Which machines a policy is for: those that fit `machines`, `tags` and `hypervisors`, each where it is given."""

    machines: Annotated[list[str], Field(min_length=1)] | None = None
    """Globs on names, or on `hypervisor/name`."""
    tags: Annotated[list[str], Field(min_length=1)] | None = None
    """Globs on tags: words of libvirt's metadata and of `[stillframe: word word]` in a machine's description."""
    hypervisors: Annotated[list[str], Field(min_length=1)] | None = None
    """Globs on names of hypervisors."""
    exclude: list[str] = []
    """Globs on names or on `hypervisor/name`, and on tags as `tag:WORD`: these are left out whatever fits."""
    policy: str
    vault: str | None = None

    @model_validator(mode="after")
    def _fits_something(self) -> Protect:
        if self.machines is None and self.tags is None and self.hypervisors is None:
            raise ValueError('this protects nothing: add machines = ["web-*"], tags = ["gold"] or hypervisors = ["*"]')
        return self


class BackupSection(Value):
    vault: str | None = None
    consistency: Consistency | None = None
    block_size: BlockSize | None = None
    block_sizes: dict[Annotated[str, Field(pattern=r"^[^/]+/[^/]+$")], BlockSize] = {}
    threads: Annotated[StrictInt, Field(ge=1, le=64)] | None = None
    scratch_floor: Size | None = None


class ExtensionSection(Value):
    """What is put into guests, and whose signature a guest's packages must have."""

    install: StrictBool = True
    signing_key: Path_ | None = None
    public_key: Annotated[str, AfterValidator(_public_key)] | None = None
    apps: list[Path_] = []
    options: Options = {}


class GuestSection(Value):
    """How to get into some guests; see `workers.config.GuestAccess`."""

    channel: Literal["auto", "agent", "ssh"] = "auto"
    address: Annotated[str, Field(pattern=r"^[A-Za-z0-9:][A-Za-z0-9.:%_-]*$")] | None = None
    port: Annotated[StrictInt, Field(ge=1, le=65535)] = 22
    user: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")] = "root"
    key_file: Path_ | None = None
    host_key: Annotated[str, AfterValidator(_host_key)] | None = None
    extension: StrictBool = True

    @model_validator(mode="after")
    def _ssh_only(self) -> GuestSection:
        unused = sorted(self.model_fields_set & {"address", "port", "user", "key_file", "host_key"})
        if self.channel == "agent" and unused:
            raise ValueError(f'channel = "agent" uses no {unused[0]}: that is for SSH; leave one of the two out')
        return self


class PathsSection(Value):
    state: Path_ | None = None
    scratch: Path_ | None = None
    runtime: Path_ | None = None
    cache: Path_ | None = None


class UpkeepSection(Value):
    """When vaults are looked after, in the words of schedules; `"never"`: only by hand."""

    sweep: Annotated[str, AfterValidator(_upkeep)] = "sundays at 04:00"
    """Expires what no policy keeps, and gives back the space."""
    verify: Annotated[str, AfterValidator(_upkeep)] = "daily at 06:00"
    """Reads a share of the packs."""
    replicate: Annotated[str, AfterValidator(_upkeep)] = "every 4 hours"
    """Copies what is missing to the replicas of each vault."""
    lock: Annotated[str, AfterValidator(_upkeep)] = "daily at 05:00"
    """Keeps what locked points share retained."""
    timezone: Annotated[str, AfterValidator(_timezone)] | None = None


class NotifySection(Value):
    email: EmailSection | None = None
    webhooks: dict[Name, WebhookSection] = {}


class ConfigFile(Value):
    """The whole file."""

    catalog: CatalogSection = CatalogSection()
    broker: BrokerSection = BrokerSection()
    vaults: dict[Name, VaultSection] = {}
    hypervisors: dict[Name, HypervisorSection] = {}
    policies: dict[Name, Policy] = {}
    protect: dict[Name, Protect] = {}
    backup: BackupSection = BackupSection()
    extension: ExtensionSection = ExtensionSection()
    guests: dict[Annotated[str, Field(min_length=1, max_length=255)], GuestSection] = {}
    """By glob on the machine's name, or on `hypervisor/name`; the first that fits counts."""
    upkeep: UpkeepSection = UpkeepSection()
    notify: NotifySection = NotifySection()
    paths: PathsSection = PathsSection()
