"""What `stillframe doctor` looks at of the extension: key, packages, pinned host keys. It goes into no guest: with
many machines that would take minutes, and each backup does it anyway."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from orchestrator.cli.checks import Check
from workers.contract.errors import StillframeError

if TYPE_CHECKING:
    from pathlib import Path

    from orchestrator.config import Config

_BUILD = "stillframe extension build"


def check_extension(config: Config) -> Iterator[Check]:
    """Nothing where no extension is to be installed."""
    settings = config.extension
    if not settings.install:
        yield Check("OK", "extension", "install = false: guests are frozen through their agent only")
        return
    public = settings.public_key
    if public is None:
        yield Check("WARN", "extension key", "there is none: nothing is put into guests", _BUILD)
        return
    yield from _signing_key(config, public)
    yield from _packages(config)
    assert config.worker.extension is not None
    yield from _pins(config.worker.extension.host_keys)


def _signing_key(config: Config, public: str) -> Iterator[Check]:
    from orchestrator.extension_key import public_key, read_signing_key

    subject, file = "extension key", config.extension.signing_key
    if not file.exists():
        if config.extension.trusted_key is None:
            mend = f"put it back, or rm {file}.pub; {_BUILD} for a new one"
            yield Check("WARN", subject, f"{file} is gone: packages cannot be brought up to date", mend)
        else:
            yield Check("OK", subject, "packages are signed elsewhere (public_key under [extension])")
        return
    try:
        same = public_key(read_signing_key(file)) == public
    except StillframeError as error:
        yield Check("FAIL", subject, str(error), error.hint)
        return
    if same:
        yield Check("OK", subject, str(file))
    else:
        yield Check("FAIL", subject, f"{file} is not the key that is trusted", _BUILD)


def _packages(config: Config) -> Iterator[Check]:
    from orchestrator.extension_build import current_name
    from orchestrator.extension_content import SYSTEMS, is_shipped
    from orchestrator.guest_desk import view_package
    from workers.guests.package import packages

    settings = config.extension
    found = list(packages(settings.packages))
    for path in found:
        view = view_package(config, path)
        if view.refused:
            yield Check("FAIL", "extension package", view.refused, _BUILD)
    for system in SYSTEMS:
        if not is_shipped(system):
            continue
        subject = f"extension for {system}"
        try:
            wanted = current_name(system, settings.apps)
        except StillframeError as error:
            yield Check("FAIL", subject, str(error), error.hint)
            continue
        if wanted in [path.name for path in found]:
            yield Check("OK", subject, wanted)
        else:
            yield Check("WARN", subject, "its package is not built from the present files", _BUILD)


def _pins(file: Path) -> Iterator[Check]:
    subject = "pinned host keys"
    if not file.exists():
        return
    if not os.access(file, os.R_OK | os.W_OK):
        mend = f"chown {os.geteuid()} {file}, or run as its owner"
        yield Check("FAIL", subject, f"{file} cannot be read and written: no guest is reached over SSH", mend)
    elif file.stat().st_mode & 0o022:
        yield Check("FAIL", subject, f"others may write to {file}, and so choose who is believed", f"chmod 600 {file}")
    else:
        yield Check("OK", subject, str(file))
