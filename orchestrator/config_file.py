"""The shape of stillframe.toml: sections, keys, and what a value may be (DESIGN section 7).

Kept apart from `config.py`, which resolves what is written here (paths, defaults, references between sections): a key
that is not a field below is a mistake in the file, and no key is ever ignored.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StrictBool, StrictInt, model_validator

from orchestrator.config_notify import EmailSection, WebhookSection
from orchestrator.config_values import (
    BlockSize,
    Duration,
    Name,
    Options,
    Path_,
    Size,
    is_blackout,
    is_cron,
    is_host_key,
    is_hypervisor,
    is_public_key,
    is_schedule,
    is_scheme,
    is_store_url,
    is_timezone,
    is_upkeep,
    leaves_time,
)
from workers.contract.machines import Value
from workers.contract.points import Consistency


class CatalogSection(Value):
    url: Annotated[str, AfterValidator(is_scheme("catalog", "sqlite:///", "postgresql"))] | None = None


class BrokerSection(Value):
    url: Annotated[str, AfterValidator(is_scheme("broker", "memory://", "redis://", "rediss://"))] = "memory://"


class S3Section(Value):
    """See `workers.config.S3Access`."""

    endpoint: Annotated[str, AfterValidator(is_scheme("endpoint", "https://", "http://"))] | None = None
    region: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+$")] | None = None
    path_style: StrictBool = False
    ca_file: Path_ | None = None
    credentials_file: Path_ | None = None


Days = Annotated[StrictInt, Field(ge=0, le=36500)]


class VaultSection(Value):
    """See `workers.config.VaultConfig`."""

    url: Annotated[str, AfterValidator(is_store_url)]
    s3: S3Section = S3Section()
    mirrors: list[Annotated[str, AfterValidator(is_store_url)]] = []
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

    uri: Annotated[str, AfterValidator(is_hypervisor)]
    max_jobs: Annotated[StrictInt, Field(ge=1, le=64)] = 2
    max_transfers: Annotated[StrictInt, Field(ge=1, le=256)] | None = None
    bandwidth: Annotated[Size, Field(ge=1)] | None = None
    key_file: Path_ | None = None
    host_key: Annotated[str, AfterValidator(is_host_key)] | None = None
    scratch_dir: Path_ | None = None

    @model_validator(mode="after")
    def _fits_its_kind(self) -> HypervisorSection:
        if self.uri.startswith("qemu+ssh://"):
            if self.scratch_dir is not None and not self.scratch_dir.startswith("/"):
                raise ValueError("scratch_dir is a folder of that host: write its whole path, from the / on")
            return self
        unused = sorted(self.model_fields_set & {"key_file", "host_key"})
        if unused:
            raise ValueError(f"{unused[0]} is for qemu+ssh://: leave it out, or write such a uri")
        return self


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

    schedule: Annotated[str, AfterValidator(is_schedule)] | None = None
    cron: Annotated[str, AfterValidator(is_cron)] | None = None
    timezone: Annotated[str, AfterValidator(is_timezone)] | None = None
    spread: Annotated[Duration, Field(le=86400)] = 0
    """Seconds. Each machine begins at a moment of its own, always the same one, within so long after the moment that
    is due."""
    blackout: Annotated[list[Annotated[str, AfterValidator(is_blackout)]], AfterValidator(leaves_time)] = []
    """No backup begins in these windows; one that is due in one begins at its end."""
    priority: Annotated[StrictInt, Field(ge=-4, le=4)] = 0
    """Of the backups that wait, those with the higher number begin first."""
    deadline: Annotated[Duration, Field(ge=60, le=366 * 86400)] = 86400
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
    public_key: Annotated[str, AfterValidator(is_public_key)] | None = None
    apps: list[Path_] = []
    options: Options = {}


class GuestSection(Value):
    """How to get into some guests; see `workers.config.GuestAccess`."""

    channel: Literal["auto", "agent", "ssh"] = "auto"
    address: Annotated[str, Field(pattern=r"^[A-Za-z0-9:][A-Za-z0-9.:%_-]*$")] | None = None
    port: Annotated[StrictInt, Field(ge=1, le=65535)] = 22
    user: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")] = "root"
    key_file: Path_ | None = None
    host_key: Annotated[str, AfterValidator(is_host_key)] | None = None
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

    sweep: Annotated[str, AfterValidator(is_upkeep)] = "sundays at 04:00"
    """Expires what no policy keeps, and gives back the space."""
    verify: Annotated[str, AfterValidator(is_upkeep)] = "daily at 06:00"
    """Reads a share of the packs."""
    replicate: Annotated[str, AfterValidator(is_upkeep)] = "every 4 hours"
    """Copies what is missing to the replicas of each vault."""
    lock: Annotated[str, AfterValidator(is_upkeep)] = "daily at 05:00"
    """Keeps what locked points share retained."""
    timezone: Annotated[str, AfterValidator(is_timezone)] | None = None


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
