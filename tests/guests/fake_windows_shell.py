"""What `powershell.exe` does in the stand-in for a Windows guest.

There is no PowerShell here. What the driver starts is understood by what it must mean: its four scripts on the command
line, which must be its very text behind a few checked values, and `-File`, whose verb is acted out as the contract has
it. For that the file must be one of known content (`Payload`), whole and unchanged; of any other, PowerShell would
say that it cannot be parsed. A few plain sentences are there for the tests of the channel.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.guests.fake_windows_system import (
    DISABLED,
    PROVIDER_ID_KEY,
    PROVIDER_KEY,
    VSS_KEY,
    Windows,
    WindowsError,
)
from workers.guests.windows import CLOSED, SCRIPTS

EXT = Path(__file__).parents[2] / "extensions/windows/ext.ps1"
ROOT, DATA = "C:\\Program Files\\Stillframe", "C:\\ProgramData\\Stillframe"
ASSIGNED = re.compile(r"\$(\w+) = (.*)\n")
WORD = re.compile(r"'([^']*)'(?: = '([^']*)')?")
QUIET = "$ErrorActionPreference = 'Stop'\n$ProgressPreference = 'SilentlyContinue'\n"


@dataclass(frozen=True)
class Ended:
    """How a program ended, and how long it took."""

    code: int = 0
    out: bytes = b""
    err: bytes = b""
    seconds: float = 0.0


@dataclass
class Payload:
    """A version of ext.ps1, and how it behaves: verb → how it ends instead of doing its work."""

    content: bytes
    instead: dict[str, Ended] = field(default_factory=dict)


@dataclass
class Shell:
    windows: Windows
    payloads: list[Payload] = field(default_factory=lambda: [Payload(EXT.read_bytes())])
    asked: list[str] = field(default_factory=list)
    """Scripts and verbs that were run, in order."""
    instead: dict[str, Ended] = field(default_factory=dict)
    """Script of the driver → how it ends instead of doing its work."""
    seconds: float = 0.0
    """How long PowerShell takes for anything."""

    def run(self, argv: list[str], stdin: bytes) -> Ended:
        """Raises WindowsError if there is no such program."""
        if argv[0].lower().removesuffix(".exe").rpartition("\\")[2] != "powershell":
            raise WindowsError("Failed to execute child process (No such file or directory)")
        words = argv[1:]
        while words and words[0] in ("-NoProfile", "-NonInteractive", "-ExecutionPolicy"):
            words = words[2:] if words[0] == "-ExecutionPolicy" else words[1:]
        ended = self._command(words, stdin)
        return Ended(ended.code, ended.out, ended.err, ended.seconds + self.seconds)

    def _command(self, words: list[str], stdin: bytes) -> Ended:
        if len(" ".join(words)) > 32_000:
            raise WindowsError("Failed to execute child process (Arg list too long)")
        match words:
            case ["-EncodedCommand", code]:
                try:
                    text = base64.b64decode(code, validate=True).decode("utf-16-le")
                except (binascii.Error, UnicodeDecodeError):
                    return Ended(-196608 & 0xFFFFFFFF, err=b"Cannot process the command\r\n")
                return self._text(text, stdin)
            case ["-File", path, *arguments]:
                return self._file(path, arguments)
            case _:
                return Ended(64, err=b"PowerShell does not know what to do\r\n")

    # --- scripts on the command line ---------------------------------------------------------------------------

    def _text(self, text: str, stdin: bytes) -> Ended:
        for pattern, act in _SENTENCES:
            found = pattern.fullmatch(text)
            if found:
                return act(found, stdin)
        body = text.removeprefix(QUIET)
        values: dict[str, dict[str, str]] = {}
        while not any(body == known for known in SCRIPTS.values()):
            found = ASSIGNED.match(body)
            if body == text or found is None:
                return Ended(1, err=b"At line:1 char:1\r\n+ This is not understood here.\r\n")
            values[found.group(1)] = dict(WORD.findall(found.group(2)))
            body = body[found.end() :]
        name = next(name for name, known in SCRIPTS.items() if body == known)
        self.asked.append(name)
        if name in self.instead:
            return self.instead[name]
        scripts = {"look": self._look, "stage": self._stage, "check": self._check, "remove": self._remove}
        try:
            return scripts[name](values)
        except WindowsError as error:
            return Ended(1, err=f"{error}\r\n".encode())

    def _look(self, _values: dict[str, dict[str, str]]) -> Ended:
        current = self.windows.disk.text(f"{ROOT}\\current.txt").strip()
        return _line({"verb": "look", "ok": True, "root": ROOT, "current": current})

    def _stage(self, values: dict[str, dict[str, str]]) -> Ended:
        disk = self.windows.disk
        [stage] = values["stage"]
        disk.make_folder(ROOT, CLOSED)
        disk.set_rules(ROOT, CLOSED)
        disk.make_folder(f"{ROOT}\\{stage}", CLOSED)
        for folder in values["folders"]:
            disk.make_folder(f"{ROOT}\\{stage}\\{folder}")
        return Ended()

    def _check(self, values: dict[str, dict[str, str]]) -> Ended:
        [stage] = values["stage"]
        for name, wanted in values["files"].items():
            data = self.windows.disk.open(f"{ROOT}\\{stage}\\{name}", write=False)
            if hashlib.sha256(data).hexdigest() != wanted:
                return Ended(20, err=f"{name} is not as it was sent\r\n".encode())
        return Ended()

    def _remove(self, values: dict[str, dict[str, str]]) -> Ended:
        for name in values["names"]:
            self.windows.disk.remove(f"{ROOT}\\{name}")
        return Ended()

    # --- ext.ps1 -----------------------------------------------------------------------------------------------

    def _file(self, path: str, arguments: list[str]) -> Ended:
        disk = self.windows.disk
        try:
            content = bytes(disk.open(path, write=False))
        except WindowsError:
            return Ended(-196608 & 0xFFFFFFFF, err=f"The argument '{path}' to -File does not exist\r\n".encode())
        folder = path.rpartition("\\")[0]
        if content == ARGUMENTS:
            return Ended(out=b"".join(word.encode() + b"\0" for word in arguments))
        payload = next((known for known in self.payloads if known.content == content), None)
        if payload is None or disk.rules(folder) != CLOSED:
            return Ended(1, err=b"ParserError: the file is not what was signed, or anybody could change it\r\n")
        verb = arguments[0] if arguments else ""
        self.asked.append(verb)
        if verb in payload.instead:
            return payload.instead[verb]
        options = dict(zip(arguments[1::2], arguments[2::2], strict=False))
        return Extension(self.windows, folder, {name.lstrip("-"): word for name, word in options.items()}).act(verb)


def _line(answer: dict[str, object], code: int = 0) -> Ended:
    return Ended(code, json.dumps(answer).encode() + b"\r\n")


def _stopped(verb: str, code: int, why: str) -> Ended:
    return _line({"verb": verb, "ok": False, "error": why}, code)


@dataclass
class Extension:
    """The contract, acted out for one call of ext.ps1 in `folder`."""

    windows: Windows
    folder: str
    options: dict[str, str]

    def act(self, verb: str) -> Ended:
        acts: dict[str, Callable[[], Ended]] = {
            "probe": self._probe,
            "install": self._install,
            "enable": self._enable,
            "uninstall": self._uninstall,
            "status": self._status,
            "quiesce": self._quiesce,
            "resume": self._resume,
        }
        if verb not in acts:
            return _stopped(verb, 30, f"there is no verb '{verb}'")
        try:
            return acts[verb]()
        except WindowsError as error:
            return _stopped(verb, 20, f"{verb} failed: {error}")
        except KeyError as error:
            return _stopped(verb, 30, f"option {error.args[0]} is missing or wrong")

    @property
    def mine(self) -> str:
        return self.folder.rpartition("\\")[2]

    def _probe(self) -> Ended:
        why = self._obstacle()
        answer = {"verb": "probe", "ok": not why, "watchdog": not why, "detail": why or "VSS", "apps": [], "error": why}
        return _line(answer, 10 if why else 0)

    def _install(self) -> Ended:
        disk, target = self.windows.disk, f"{ROOT}\\{self.options['Version']}"
        disk.write(f"{self.folder}\\serial", self.options["Serial"])
        disk.remove(target)
        disk.move_folder(self.folder, target)
        return _line({"verb": "install", "ok": True})

    def _enable(self) -> Ended:
        disk = self.windows.disk
        self._reset_if_another(self.options["Uuid"])
        current = disk.text(f"{ROOT}\\current.txt")
        if current and current != self.mine:
            disk.write(f"{ROOT}\\previous.txt", current)
        disk.write(f"{ROOT}\\current.txt", self.mine)
        kept = {self.mine.lower(), disk.text(f"{ROOT}\\previous.txt").lower()}
        for name in disk.folders_in(ROOT):
            if name not in kept:
                disk.remove(f"{ROOT}\\{name}")
        return _line({"verb": "enable", "ok": True})

    def _uninstall(self) -> Ended:
        lease = self._lease()
        if lease:
            return _stopped("uninstall", 11, f"job {lease[0]} holds the guest")
        self.windows.disk.remove(ROOT)
        self.windows.disk.remove(DATA)
        return _line({"verb": "uninstall", "ok": True})

    def _status(self) -> Ended:
        disk = self.windows.disk
        self._reset_if_another(self.options["Uuid"])
        answer: dict[str, object] = {"verb": "status", "ok": True, "contract": 1, "version": self.mine, "root": ROOT}
        answer |= {"serial": int(disk.text(f"{self.folder}\\serial") or 0), "transient": False}
        answer |= {"machine": disk.text(f"{DATA}\\machine"), "previous": disk.text(f"{ROOT}\\previous.txt")}
        lease = self._lease()
        if lease:
            answer["lease"] = {"job": lease[0], "left_s": lease[1]}
        return _line(answer)

    def _quiesce(self) -> Ended:
        job, seconds = self.options["Job"], int(self.options["FreezeS"]) + int(self.options["LimitS"])
        self._reset_if_another(self.options["Uuid"])
        lease = self._lease()
        if lease and lease[0] != job:
            return _stopped("quiesce", 11, f"job {lease[0]} holds the guest")
        why = self._obstacle()
        answer: dict[str, object] = {"verb": "quiesce", "ok": True, "watchdog": not why, "watchdog_detail": why}
        if why:
            return _line(answer)
        now = self.windows.uptime()
        self.windows.disk.write(f"{DATA}\\lease", f"{job} {now} {now + seconds}")
        key, wanted = self.windows.registry[PROVIDER_KEY], 1 if self.options.get("Vss") == "primary" else 5
        found = key.get("VssOption", 1)
        key["VssOption"] = wanted
        return _line(answer | {"notes": [f"VssOption was {found}, and was set to {wanted}"] if found != wanted else []})

    def _resume(self) -> Ended:
        lease = self._lease()
        held = lease is not None and lease[0] == self.options["Job"]
        if held:
            self.windows.disk.remove(f"{DATA}\\lease")
        writers = base64.b64encode(self.windows.vss.list_writers().encode()).decode()
        return _line({"verb": "resume", "ok": True, "watchdog": "silent" if held else "absent", "writers": writers})

    def _lease(self) -> tuple[str, float] | None:
        words = self.windows.disk.text(f"{DATA}\\lease").split()
        now = self.windows.uptime()
        if len(words) != 3 or not float(words[1]) <= now < float(words[2]):
            return None
        return words[0], float(words[2]) - now

    def _reset_if_another(self, uuid: str) -> None:
        disk = self.windows.disk
        disk.make_folder(DATA, CLOSED)
        if disk.text(f"{DATA}\\machine") != uuid:
            disk.remove(f"{DATA}\\lease")
            disk.write(f"{DATA}\\machine", uuid)

    def _obstacle(self) -> str:
        registry = self.windows.registry
        if registry[VSS_KEY].get("Start") == DISABLED:
            return "the service Volume Shadow Copy (VSS) is disabled"
        if PROVIDER_ID_KEY not in registry or PROVIDER_KEY not in registry:
            return "the VSS provider of the QEMU guest agent is not registered: install the guest agent again"
        if registry[PROVIDER_KEY].get("Start") == DISABLED:
            return "the service QEMU Guest Agent VSS Provider is disabled"
        return ""


# --- sentences for the tests of the channel ------------------------------------------------------------------------

ARGUMENTS = b'foreach ($word in $args) { [Console]::Out.Write("$word`0") }\r\n'
"""A file that prints its arguments."""


def _said(found: re.Match[str], _stdin: bytes) -> Ended:
    out, err, code = found.groups()
    return Ended(int(code), out.replace("''", "'").encode(), err.replace("''", "'").encode())


_SENTENCES: list[tuple[re.Pattern[str], Callable[[re.Match[str], bytes], Ended]]] = [
    (re.compile(r"\[Console\]::Out\.Write\('(.*)'\); \[Console\]::Error\.Write\('(.*)'\); exit (\d+)"), _said),
    (
        re.compile(re.escape("[Console]::OpenStandardInput().CopyTo([Console]::OpenStandardOutput())")),
        lambda _found, stdin: Ended(out=stdin),
    ),
    (
        re.compile(r"\[Console\]::OpenStandardOutput\(\)\.Write\(\(New-Object byte\[\] (\d+)\), 0, \d+\)"),
        lambda found, _stdin: Ended(out=bytes(int(found.group(1)))),
    ),
    (
        re.compile(r"Start-Sleep -Seconds (\d+)"),
        lambda found, _stdin: Ended(seconds=float(found.group(1))),
    ),
    (
        # What a crash looks like: an unhandled exception of Windows.
        re.compile(r"\[Environment\]::FailFast\('crash'\)"),
        lambda _found, _stdin: Ended(0xC0000602),
    ),
]
