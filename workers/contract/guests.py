"""Guests and the extension in them, as plain data: what a channel tells, what the extension's verbs answer.

The answers' fields are those of `extensions/CONTRACT.md`: one JSON line per verb. They come from inside a guest, which
may be hostile or broken, so lengths and kinds are bounded here, and nothing in them is believed beyond its type.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from workers.contract.machines import Value

CONTRACT_VERSION = 1
"""Of `extensions/CONTRACT.md`; an installed extension of another one is replaced before it is used."""


class GuestOs(StrEnum):
    LINUX = "linux"
    WINDOWS = "windows"
    OTHER = "other"


class GuestInfo(Value):
    """What a channel can do in its guest, as it says itself; asked for anew with each job, since a guest's
    administrator may change it at any time."""

    os: GuestOs
    release: str = ""
    """`Debian GNU/Linux 12 (bookworm)`; for people."""
    agent: str = ""
    """Version of the guest agent, or the software of an SSH server; for people."""
    can_run: bool = False
    """Commands can be run and their status read."""
    can_copy: bool = False
    """Files can be written and read."""
    can_freeze: bool = False
    can_freeze_some: bool = False
    """Single file systems can be frozen by their mount points."""
    can_plant_keys: bool = False
    """Authorised SSH keys can be added and removed."""


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command in a guest ended."""

    code: int
    """Exit code; 128 + n for signal n, as shells say it."""
    out: bytes
    err: bytes
    truncated: bool = False
    """The channel has lost output: what is here is only its beginning."""


# --- what the extension answers --------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Without what could command somebody's terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


Word = Annotated[str, Field(max_length=255), AfterValidator(printable)]
Text = Annotated[str, Field(max_length=4096), AfterValidator(printable)]


class Answer(BaseModel):
    """One JSON line of the extension. Unknown fields are ignored: a newer extension may say more."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ScriptOutcome(StrEnum):
    OK = "ok"
    FAILED = "failed"
    """It exited with another code than 0 or 3, after its retries."""
    TIMEOUT = "timeout"
    """It was killed with its process group."""
    NOT_APPLICABLE = "not_applicable"
    """Its application is not there (exit code 3)."""
    REFUSED = "refused"
    """It was not run: somebody else than root could have changed it."""
    SKIPPED = "skipped"
    """It was not run: another one before it had failed, or no time was left."""


class ScriptRun(Value):
    """One run of one application script."""

    name: Word
    """Folder name, `50-postgresql`."""
    phase: Word
    """`pre` or `post`."""
    outcome: ScriptOutcome
    code: int = 0
    seconds: float = 0.0
    tries: int = 1
    detail: Text = ""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Lease(Answer):
    """A job for which the guest is held quiesced."""

    job: Word
    left_s: float
    """Seconds until the watchdog ends it by itself."""


class Status(Answer):
    """Verb `status`."""

    contract: int
    version: Word
    """Version and build of the enabled package: `0.1.0+1a2b3c4d`."""
    serial: int = 0
    machine: Word = ""
    """UUID of the machine that it was installed in."""
    root: Text = ""
    transient: bool = False
    """Installed in memory, since the guest's root is read-only: gone at the next boot."""
    lease: Lease | None = None
    previous: Word = ""
    """The version kept for a roll-back."""


class Quiesced(Answer):
    """Verb `quiesce`: the guest is ready to be frozen, and its watchdog is armed."""

    watchdog: bool
    """False: no thaw is guaranteed from inside, and the guest must not be frozen because of us."""
    watchdog_detail: Text = ""
    mounts: Annotated[list[Annotated[str, Field(max_length=4096)]], Field(max_length=4096)] = []
    """Mount points to freeze, inner ones first: those of the selected disks, and loop devices upon them."""
    partial: bool = False
    """Some file systems are left out, because their disks are."""
    scripts: Annotated[list[ScriptRun], Field(max_length=512)] = []
    notes: Annotated[list[Text], Field(max_length=64)] = []
    """Worth a warning: a wrong VssOption was set right, an old lease was taken over."""


class Resumed(Answer):
    """Verb `resume`: post scripts have run, nothing is held any more."""

    watchdog: Word
    """`silent`, `fired`, or `absent` (nobody had armed one for this job, or it was killed)."""
    holders_lost: list[Word] = []
    """Scripts whose holder had ended before the resume: their application was not held at the point in time."""
    scripts: Annotated[list[ScriptRun], Field(max_length=512)] = []
    records: dict[Word, Annotated[str, Field(max_length=128 << 10)]] = {}
    """`50-postgresql/backup_label` → base64: to be stored with the point."""
    log: Annotated[str, Field(max_length=1 << 20)] = ""
    """Base64: output of the scripts, capped in the guest."""
    writers: Annotated[str, Field(max_length=1 << 20)] = ""
    """Base64, Windows: what `vssadmin list writers` printed after the thaw."""
    notes: Annotated[list[Text], Field(max_length=64)] = []


# --- what a job knows of it ------------------------------------------------------------------------------------


class ExtensionUse(StrEnum):
    ENABLED = "enabled"
    ABSENT = "absent"
    """Not installed, and why is in the detail."""
    OFF = "off"
    """Configured not to be used, or the machine does not run."""


class ExtensionState(Value):
    """The extension of one machine as the last job found it; shown by `vm show`."""

    use: ExtensionUse
    detail: str = ""
    """Why it is not enabled, or what was done: `installed`, `upgraded from …`."""
    version: str = ""
    channel: str = ""
    """`guest agent` or `ssh root@10.0.0.5`."""
    os: GuestOs = GuestOs.OTHER
    release: str = ""
    transient: bool = False


class GuestReport(Value):
    """What preparing and releasing a guest for one point in time came to."""

    scripts: list[ScriptRun] = []
    records: dict[str, str] = {}
    """`50-postgresql/backup_label` → text, stored in the point."""
    log: str = ""
    warnings: list[str] = []
