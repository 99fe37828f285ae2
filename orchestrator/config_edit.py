"""Changes to stillframe.toml by a command: what people wrote stays as they wrote it.

A section is added as text at the end, lists are changed by tomlkit, which keeps comments and layout. Nothing is written
unless the result is read without a mistake and means what was asked for, and the file is replaced in one step.
"""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.config import Config, parse_config
from orchestrator.primary import require_primary
from orchestrator.protection import covers, literal
from workers.contract.errors import Busy, ConfigError, NotFound

if TYPE_CHECKING:
    from tomlkit import TOMLDocument


@dataclass(frozen=True, slots=True)
class Subject:
    """A machine, as sections see it. `alone`: no other one has its name."""

    hypervisor: str
    name: str
    tags: Collection[str]
    alone: bool = True

    @property
    def glob(self) -> str:
        """What means it, wherever it migrates to; with its hypervisor only if another one has the same name."""
        return literal(self.name) if self.alone else f"{literal(self.hypervisor)}/{literal(self.name)}"

    @property
    def globs(self) -> tuple[str, ...]:
        """How a list may name it, and no other: the bare name of several machines means all of them."""
        full = f"{literal(self.hypervisor)}/{literal(self.name)}"
        return (literal(self.name), full) if self.alone else (full,)


@dataclass(frozen=True, slots=True)
class Edit:
    """A change that is not written yet."""

    file: Path
    before: str
    after: str
    config: Config
    """As it would be."""

    @property
    def diff(self) -> str:
        """Unified; empty: nothing changes."""
        old, new = self.before.splitlines(keepends=True), self.after.splitlines(keepends=True)
        return "".join(difflib.unified_diff(old, new, str(self.file), str(self.file), n=2))

    def write(self) -> None:
        """Replace the file. Raises Busy if somebody has changed it meanwhile, ConfigError if it cannot be written."""
        if _read(self.file) != self.before:
            raise Busy(f"{self.file} was changed by somebody else just now", hint="look at it, and try again")
        if self.after != self.before:
            replace_file(self.file, self.after)


def protect(config: Config, subject: Subject, policy: str, vault: str | None) -> Edit:
    """Have the machine backed up by `policy`, into `vault` or the default one. Raises NotFound, UsageError."""
    if policy not in config.policies:
        near = difflib.get_close_matches(policy, config.policies, n=1, cutoff=0.5)
        known = ", ".join(config.policies)
        hint = (
            f"did you mean {near[0]}?" if near else f"there are: {known}" if known else "add a [policies.gold] section"
        )
        raise NotFound(f"no policy is named {policy!r} in {config.path}", hint=hint)
    into = require_primary(config, vault)
    text = _read(config.path)
    if _effective(config, subject, into) == policy:
        return Edit(config.path, text, text, config)
    document = _document(text)
    target = _target(config, subject, policy, into)
    for name in config.protections(subject.hypervisor, subject.name, subject.tags):
        if name != target and config.vault_of(name) == into:
            _take_out(document, config, name, subject)
    if target is not None:
        document["protect"][target]["machines"].append(subject.glob)
    after = document.as_string()
    if target is None:
        after = _with_section(after, config, subject, policy, vault)
    edit = Edit(config.path, text, after, parse_config(after, config.path))
    if _effective(edit.config, subject, into) != policy:
        raise ConfigError(f"{config.path} is written in a way that cannot be changed safely", hint="change it by hand")
    return edit


def unprotect(config: Config, subject: Subject) -> Edit:
    """Have nothing back the machine up."""
    text = _read(config.path)
    document = _document(text)
    for name in config.protections(subject.hypervisor, subject.name, subject.tags):
        _take_out(document, config, name, subject)
    after = document.as_string()
    edit = Edit(config.path, text, after, parse_config(after, config.path))
    if edit.config.protections(subject.hypervisor, subject.name, subject.tags):
        raise ConfigError(f"{config.path} is written in a way that cannot be changed safely", hint="change it by hand")
    return edit


def replacement(config: Config, text: str, shown: Path) -> Edit:
    """The whole file replaced by `text`, which was read from `shown`. Raises ConfigError."""
    try:
        new = parse_config(text, config.path)
    except ConfigError as error:  # its lines are those of the file that people have before them
        raise ConfigError(str(error).replace(f"{config.path}:", f"{shown}:"), hint=error.hint) from None
    return Edit(config.path, _read(config.path), text, new)


def _effective(config: Config, subject: Subject, vault: str) -> str | None:
    """The policy by which the machine is backed up into the vault."""
    for name in config.protections(subject.hypervisor, subject.name, subject.tags):
        if config.vault_of(name) == vault:
            return config.protect[name].policy
    return None


def _target(config: Config, subject: Subject, policy: str, vault: str) -> str | None:
    """A section to which the machine can be added by its name."""
    for name, section in config.protect.items():
        by_name = section.machines is not None and section.tags is None and section.hypervisors is None
        open_to = section.model_copy(update={"machines": [*(section.machines or []), subject.glob]})
        fits = covers(open_to, subject.hypervisor, subject.name, subject.tags)
        if by_name and fits and section.policy == policy and config.vault_of(name) == vault:
            return name
    return None


def _take_out(document: TOMLDocument, config: Config, name: str, subject: Subject) -> None:
    """Have a section cover the machine no more: its name is taken out of the list, or it is excluded."""
    section, written = config.protect[name], document["protect"][name]
    kept = [glob for glob in section.machines or [] if glob not in subject.globs]
    if section.machines is not None and not kept:
        del document["protect"][name]
        return
    if section.machines is not None and len(kept) < len(section.machines):
        for glob in subject.globs:
            with suppress(ValueError):
                written["machines"].remove(glob)
    left = section.model_copy(update={"machines": kept if section.machines is not None else None})
    if covers(left, subject.hypervisor, subject.name, subject.tags):
        if "exclude" in written:
            written["exclude"].append(subject.glob)
        else:
            written["exclude"] = [subject.glob]


def _with_section(text: str, config: Config, subject: Subject, policy: str, vault: str | None) -> str:
    import tomlkit

    free = (policy, *(f"{policy}-{number}" for number in range(2, 1000)))
    name = next(one for one in free if one not in config.protect)
    lines = [f"[protect.{tomlkit.key(name).as_string()}]", f"machines = [{tomlkit.item(subject.glob).as_string()}]"]
    lines.append(f"policy = {tomlkit.item(policy).as_string()}")
    if vault is not None:
        lines.append(f"vault = {tomlkit.item(vault).as_string()}")
    return text.rstrip("\n") + "\n\n" + "\n".join(lines) + "\n"


def read_document(file: Path) -> tuple[str, TOMLDocument]:
    """Its text, and what tomlkit makes of it. Raises ConfigError."""
    text = _read(file)
    return text, _document(text)


def _document(text: str) -> TOMLDocument:
    import tomlkit

    return tomlkit.parse(text)


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None


def replace_file(file: Path, text: str) -> None:
    """In one step, durably, with the mode and the owner that it has; a link stays a link. Raises ConfigError."""
    real = file.resolve()
    try:
        there = real.stat()
        handle, name = tempfile.mkstemp(prefix=f".{real.name}.", dir=real.parent)
        try:
            with os.fdopen(handle, "wb") as new:
                new.write(text.encode())
                new.flush()
                os.fchmod(new.fileno(), there.st_mode & 0o7777)
                if (there.st_uid, there.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(new.fileno(), there.st_uid, there.st_gid)
                os.fsync(new.fileno())
            Path(name).replace(real)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        folder = os.open(real.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be written: {error.strerror}", hint="write it by hand, or as its owner"
        ) from None
