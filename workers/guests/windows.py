"""The extension in a Windows guest, driven over a channel (`extensions/CONTRACT.md` sections 2, 3 and 7).

VSS freezes and lets go by itself, so this driver only puts the payload in place and asks it. PowerShell is started anew
for each step and takes about a second to start: before the freeze that is no harm, and nothing runs while frozen.

Four small scripts of our own are passed on the command line. Nothing of a guest's answer and nothing but checked words
gets into their text. What arrives is hashed in the guest and compared with the signed list, in a folder that was made
with an access list of SYSTEM and Administrators alone: the agent's files have the rights of the folder they are put in.
"""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import Field

from workers.contract.errors import Busy, ExtensionError, GuestError, PackageRefused
from workers.contract.guests import Answer, GuestOs, Quiesced, Resumed, Status
from workers.contract.seams import GuestChannel, Package, QuiesceRequest
from workers.guests.agent import WINDOWS_FREEZE_SECONDS
from workers.guests.answers import as_extension_error, read_answer, words
from workers.guests.package import refuse_downgrade

FREEZE_SECONDS = WINDOWS_FREEZE_SECONDS
HOLD_SECONDS = 8.0
"""From the freeze's reply to the point. VSS holds writes for 10 s, and tells only at the thaw that it has let go."""
ASK_SECONDS = 60.0
"""A busy Windows guest takes many seconds to start PowerShell."""
INSTALL_SECONDS = 120.0
RESUME_SECONDS = 180.0
"""`vssadmin` waits for writers that are slow to answer."""
MARGIN_SECONDS = 60.0

POWERSHELL = ("powershell.exe", "-NoProfile", "-NonInteractive", "-ExecutionPolicy", "Bypass")
ENTRY = "ext.ps1"
CLOSED = "O:BAG:BAD:P(A;OICI;FA;;;SY)(A;OICI;FA;;;BA)"
"""Owner Administrators; everything for SYSTEM and Administrators; nothing for others, nothing inherited."""
_FILES_AT_ONCE = 20
"""Of 264 bytes each at most, four thirds of twice that in base64: a command line holds 32,767 characters."""

_QUIET = "$ErrorActionPreference = 'Stop'\n$ProgressPreference = 'SilentlyContinue'\n"
SCRIPTS = {
    # Where everything is, and what is in force.
    "look": """$root = Join-Path $env:ProgramFiles 'Stillframe'
$file = Join-Path $root 'current.txt'
$current = ''
if ([IO.File]::Exists($file)) { $current = [IO.File]::ReadAllText($file).Trim() }
$answer = @{ verb = 'look'; ok = $true; root = $root; current = $current }
[Console]::Out.WriteLine((ConvertTo-Json -Compress -InputObject $answer))
exit 0
""",
    # A folder to put files into; closed from its first moment.
    "stage": f"""$rules = New-Object System.Security.AccessControl.DirectorySecurity
$rules.SetSecurityDescriptorSddlForm('{CLOSED}')
$root = Join-Path $env:ProgramFiles 'Stillframe'
[void][IO.Directory]::CreateDirectory($root, $rules)
[IO.Directory]::SetAccessControl($root, $rules)
$path = Join-Path $root $stage
[void][IO.Directory]::CreateDirectory($path, $rules)
foreach ($folder in $folders) {{ [void][IO.Directory]::CreateDirectory((Join-Path $path $folder)) }}
exit 0
""",
    # Is everything there as it was sent?
    "check": """$path = Join-Path (Join-Path $env:ProgramFiles 'Stillframe') $stage
foreach ($name in $files.Keys) {
    $found = (Get-FileHash -LiteralPath (Join-Path $path $name) -Algorithm SHA256).Hash
    if ($found -ne $files[$name]) {
        [Console]::Error.WriteLine("$name is not as it was sent")
        exit 20
    }
}
exit 0
""",
    "remove": """foreach ($name in $names) {
    $path = Join-Path (Join-Path $env:ProgramFiles 'Stillframe') $name
    if (Test-Path -LiteralPath $path) { Remove-Item -LiteralPath $path -Recurse -Force }
}
exit 0
""",
}
"""Name → text. Its variables that are not set here are set in front of it, see `script`."""

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+/=-]{0,200}", re.ASCII)

A = TypeVar("A", bound=Answer)
Values = Mapping[str, str | Sequence[str] | Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class _Place:
    root: str
    """`C:\\Program Files\\Stillframe`."""
    current: str
    """The version in force; empty: none."""

    def entry(self, version: str) -> str:
        return f"{self.root}\\{version}\\{ENTRY}"


class _Look(Answer):
    """Both become parts of the commands that follow."""

    root: Annotated[str, Field(pattern=r'^[A-Za-z]:\\[^"<>|?*\x00-\x1f]{1,200}$')]
    current: Annotated[str, Field(pattern=r"^([0-9A-Za-z][0-9A-Za-z.+]{0,60})?$")]


class WindowsExtension:
    """See `seams.Extension`."""

    def __init__(self, channel: GuestChannel) -> None:
        self._channel = channel

    def status(self, uuid: str) -> Status | None:
        return self._verb("status", Status, {"Uuid": uuid}, ASK_SECONDS)

    def quiesce(self, request: QuiesceRequest) -> Quiesced:
        """All fixed volumes are frozen, whatever disks are skipped: VSS takes what its writers need."""
        options = {"Job": request.job, "Uuid": request.uuid, "Goal": request.goal.value}
        options |= {"FreezeS": str(request.freeze_s), "LimitS": str(request.limit_s)}
        if "vss" in request.options:
            options["Vss"] = request.options["vss"]
        found = self._verb("quiesce", Quiesced, options, request.limit_s + MARGIN_SECONDS)
        if found is None:
            raise ExtensionError("the extension is no longer in the guest", hint="the next backup installs it again")
        return found

    def resume(self, job: str) -> Resumed:
        return self._verb("resume", Resumed, {"Job": job}, RESUME_SECONDS) or Resumed(watchdog="absent")

    def uninstall(self) -> bool:
        return self._verb("uninstall", Answer, {}, INSTALL_SECONDS) is not None

    # --- putting it in place -----------------------------------------------------------------------------------

    def install(self, package: Package, uuid: str) -> Status:
        if package.os is not GuestOs.WINDOWS:
            raise PackageRefused(f"package {package.version} is for {package.os}, the guest runs Windows")
        before = self.status(uuid)
        refuse_downgrade(package, before)
        if before is not None and before.lease is not None:
            raise Busy(f"job {before.lease.job} holds the guest, its extension cannot be replaced now")
        place = self._look()
        try:
            self._put(place, package, uuid)
            return self._in_force(place, package, uuid)
        except GuestError as error:
            self._roll_back(place, package, uuid)
            raise as_extension_error(error) from None

    def _put(self, place: _Place, package: Package, uuid: str) -> None:
        """Stage, check, move in place; not yet in force. The stage is gone afterwards."""
        stage = f".stage-{secrets.token_hex(4)}"
        folders = sorted({path.rpartition("/")[0] for path in package.files} - {""})
        try:
            self._script("stage", {"stage": stage, "folders": folders}, "no folder for it can be made in the guest")
            for path, file in package.files.items():
                self._channel.put_file("\\".join([place.root, stage, *path.split("/")]), file.data)
            for some in _pieces(sorted(package.files)):
                sums = {path: package.files[path].sha256 for path in some}
                self._script("check", {"stage": stage, "files": sums}, "it did not arrive in the guest as it was sent")
            options = {"Version": package.version, "Uuid": uuid, "Serial": str(package.serial)}
            self._call(place.entry(stage), "install", Answer, options, INSTALL_SECONDS)
        finally:
            with suppress(GuestError):
                self._script("remove", {"names": [stage]}, "")

    def _in_force(self, place: _Place, package: Package, uuid: str) -> Status:
        """Put the new version in force, and see that it answers."""
        self._call(place.entry(package.version), "enable", Answer, {"Uuid": uuid}, INSTALL_SECONDS)
        status = self.status(uuid)
        if status is None or status.version != package.version or status.contract != package.contract:
            raise ExtensionError(f"the new extension says that it is {status.version if status else 'absent'}")
        return status

    def _roll_back(self, place: _Place, package: Package, uuid: str) -> None:
        """To what was in force before; without one, nothing is left."""
        with suppress(GuestError):
            if not place.current:
                self._script("remove", {"names": ["current.txt", "previous.txt", package.version]}, "")
            elif self._look().current != place.current:
                self._call(place.entry(place.current), "enable", Answer, {"Uuid": uuid}, INSTALL_SECONDS)

    # --- one command -------------------------------------------------------------------------------------------

    def _look(self) -> _Place:
        ran = self._channel.run(encoded(script("look", {})), timeout=ASK_SECONDS)
        if ran.code != 0:
            raise ExtensionError(f"PowerShell in the guest failed: {words(ran) or f'exit code {ran.code}'}")
        found = read_answer(ran, "look", _Look)
        if found is None:
            raise ExtensionError("PowerShell in the guest does not say where programs are")
        return _Place(found.root, found.current)

    def _script(self, name: str, values: Values, what: str) -> None:
        ran = self._channel.run(encoded(script(name, values)), timeout=INSTALL_SECONDS)
        if ran.code != 0:
            raise ExtensionError(f"{what}: {words(ran) or f'exit code {ran.code}'}")

    def _verb(self, verb: str, kind: type[A], options: Mapping[str, str], seconds: float) -> A | None:
        """The answer of the version in force; None: there is none, or (exit code 3) nothing to do."""
        place = self._look()
        return self._call(place.entry(place.current), verb, kind, options, seconds) if place.current else None

    def _call(self, entry: str, verb: str, kind: type[A], options: Mapping[str, str], seconds: float) -> A | None:
        argv = [*POWERSHELL, "-File", entry, verb]
        for name, value in options.items():
            argv += [f"-{name}", _safe(value)]
        return read_answer(self._channel.run(argv, timeout=seconds), verb, kind)


def _safe(word: str) -> str:
    """PowerShell reads arguments that begin with a dash, or hold quotes, in ways of its own."""
    if not _SAFE.fullmatch(word):
        raise ExtensionError(f"{word!r} cannot be passed to the extension")
    return word


def _pieces(paths: list[str]) -> Iterable[list[str]]:
    for at in range(0, len(paths), _FILES_AT_ONCE):
        yield paths[at : at + _FILES_AT_ONCE]


def script(name: str, values: Values) -> str:
    """The text of one of SCRIPTS, with the values of its variables in front."""
    return "".join([_QUIET, *(f"${key} = {_literal(value)}\n" for key, value in values.items()), SCRIPTS[name]])


def _literal(value: str | Sequence[str] | Mapping[str, str]) -> str:
    if isinstance(value, str):
        return f"'{_safe(value.removeprefix('.')) and value}'"
    if isinstance(value, Mapping):
        return "@{" + "; ".join(f"{_literal(key)} = {_literal(found)}" for key, found in value.items()) + "}"
    return "@(" + ", ".join(_literal(found) for found in value) + ")"


def encoded(text: str) -> list[str]:
    """The command that runs a script without a file."""
    return [*POWERSHELL, "-EncodedCommand", base64.b64encode(text.encode("utf-16-le")).decode()]
