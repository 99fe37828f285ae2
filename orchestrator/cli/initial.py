"""What `stillframe init` makes, and in which order.

Everything that can refuse is looked at before anything is made: a vault whose key is absent must not get a second key
beside it, nor a catalog that pretends all is well.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.cli.run import Session

if TYPE_CHECKING:
    from workers.config import VaultConfig, WorkerConfig

_TEMPLATE = """\
# Stillframe. What is not written here has a default; unknown keys are errors. `stillframe doctor` checks it all.
{paths}
[vaults.main]
# A folder, better on another disk than the machines. Without its key, or the recovery phrase, it is noise.
url = "file://{vault}"
key_file = "{key}"

[hypervisors.local]
uri = "{uri}"
# max_jobs = 2

# [backup]
# consistency = "application"               # a backup that falls short of it ends with exit code 3
# block_sizes = {{ "db-*/vdb" = "64KiB" }}   # machine/target: small blocks for small random writes

# [extension]                              # what is put into guests, for application-consistent points
# install = false                          # frozen through the guest agent only, then
# apps = ["./apps/50-ours"]                # your own application scripts, beside the shipped ones
# [guests."web-*"]                         # where the guest agent allows no commands
# channel = "ssh"
# address = "10.0.0.5"
# key_file = "web.key"

# When machines are backed up, and how long points are kept; `stillframe serve` does it.
# [policies.gold]
# consistency = "application"
# require = true                           # fail rather than make a point worth less
# schedule = "daily at 02:00"
# timezone = "Europe/Berlin"
# retention = {{ daily = 7, weekly = 4, monthly = 12 }}
# [protect.web]
# machines = ["web-*"]
# policy = "gold"
"""


def initialise(session: Session, *, vault: Path | None, hypervisor: str) -> None:
    """See `stillframe init`. Raises ConfigError, WrongKey, VaultError."""
    written = _write_configuration(session, vault, hypervisor)
    config = session.config
    out = session.out
    out.record("configuration", {"path": str(config.path), "created": written})
    out.say(f"configuration  {config.path}{' (new)' if written else ''}")
    vaults = {name: one for name, one in config.worker.vaults.items() if one.replica_of is None}
    present = {name: _vault_opens(config.worker, name, one) for name, one in vaults.items()}
    service = session.service
    shown_url = re.sub(r"://([^:/@]+):[^@]*@", r"://\1:…@", config.catalog_url)
    out.record("catalog", {"url": shown_url})
    out.say(f"catalog        {shown_url}")
    for name, one in vaults.items():
        phrase = None if present[name] else service.init_vault(name)
        out.record(
            "vault",
            {
                "vault": name,
                "url": one.url,
                "created": phrase is not None,
                "key_file": str(one.key_file) if one.key_file else None,
                "recovery_phrase": phrase,
            },
        )
        out.say(f"vault {name:<8} {one.url}{' (new)' if phrase else ' (kept)'}")
        if one.key_file:
            out.say(f"key            {one.key_file}")
        if phrase is not None:
            _show_phrase(session, name, phrase)
    for name, one in config.worker.vaults.items():
        if one.replica_of is not None:
            out.say(f"vault {name:<8} {one.url}: `stillframe vault replicate {one.replica_of} --to {name}` makes it")
    _extensions(session)
    if not config.worker.vaults:
        out.say(f"no vault: add a [vaults.main] section to {config.path}, and come back")
        return
    option = f" --config {config.path}" if session.settings.config else ""
    out.note(f"next: stillframe doctor{option}\n      stillframe vm list{option}")


def _extensions(session: Session) -> None:
    """The signing key, and packages made with it: unless nothing is to be installed, or they are signed elsewhere."""
    from orchestrator.extension_build import make_packages

    settings = session.config.extension
    if not settings.install or (settings.trusted_key is not None and not settings.signing_key.exists()):
        return
    new = not settings.signing_key.exists()
    made = make_packages(settings)
    session.out.record(
        "extension",
        {"signing_key": str(settings.signing_key), "created": new, "packages": [str(path) for path in made]},
    )
    session.out.say(f"extension key  {settings.signing_key}{' (new)' if new else ' (kept)'}")


def _show_phrase(session: Session, name: str, phrase: str) -> None:
    session.out.say(
        f"\nRecovery phrase of vault {name}. Write it down and keep it elsewhere: it opens the vault if the key\n"
        f"is lost, and it is shown only this once.\n\n    {phrase}\n"
    )


def _vault_opens(worker: WorkerConfig, name: str, vault: VaultConfig) -> bool:
    """Whether the vault is there, and its key opens it. Raises WrongKey if it is there and the key does not, or if
    the key of a vault yet to be made cannot be used."""
    from workers.context import Context
    from workers.contract.errors import VaultMissing
    from workers.key_sources import secrets_of
    from workers.vault.places import open_place

    try:
        open_place(vault)
    except VaultMissing:
        if vault.key_file is None or vault.key_file.exists():
            secrets_of(name, vault)
        return False
    context = Context(worker)
    try:
        context.vault(name)
    finally:
        context.close()
    return True


def _write_configuration(session: Session, vault: Path | None, hypervisor: str) -> bool:
    """Write a configuration where there is none. Raises ConfigError if it cannot be written, UsageError if options
    for a new one are given beside one that exists."""
    from orchestrator.config import parse_config
    from orchestrator.config_place import FILE_NAME, named_config, usual_places
    from workers.contract.errors import ConfigError, UsageError

    named = named_config(session.settings.config)
    existing = [place for place in ([named] if named else usual_places()) if place.is_file()]
    if existing:
        if vault is not None:
            raise UsageError(
                f"{existing[0]} exists and names its vaults itself", hint="change it there, or leave --vault out"
            )
        return False
    root = os.geteuid() == 0
    file = named or (Path("/etc/stillframe") if root else Path.home() / ".config/stillframe") / FILE_NAME
    file = file.absolute()
    home = Path("/var/lib/stillframe") if root else Path.home() / ".local/share/stillframe"
    home = file.parent if named else home
    text = _TEMPLATE.format(
        vault=vault.expanduser().absolute() if vault else home / "vault",
        key=file.parent / "main.key",
        uri=hypervisor,
        paths=f'\n[paths]\nstate = "{file.parent / "state"}"\n' if named else "",
    )
    parse_config(text, file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x") as new:
            new.write(text)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror}", hint="--config FILE somewhere else") from None
    return True
