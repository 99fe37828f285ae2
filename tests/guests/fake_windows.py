"""A stand-in for the QEMU guest agent of a Windows guest: a byte stream that behaves as `qemu-ga` does there.

No Windows can be had in these tests. What is behind this agent is in `fake_windows_system.py` and
`fake_windows_shell.py`; of Stillframe nothing is replaced. It is held to the contract suite of the real agent, and what
goes over the wire is compared with the real one's, byte for byte. Written after `qga/main.c`, `qga/commands.c`,
`qga/commands-win32.c` and `qga/vss-win32/requester.cpp`.

    with FakeWindowsAgent(path) as agent:   # listens on a unix socket
        agent.windows.vss.hold_seconds = 0.1
        agent.trouble.lost_replies.append("guest-fsfreeze-freeze")
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.guests.fake_windows_shell import Ended, Shell
from tests.guests.fake_windows_system import PROVIDER_KEY, Windows, WindowsError

MOST_OUTPUT = 16 << 20
"""Bytes of each stream that the agent keeps of a program."""
ALLOWED_WHILE_FROZEN = {
    "guest-ping",
    "guest-info",
    "guest-sync",
    "guest-sync-delimited",
    "guest-fsfreeze-status",
    "guest-fsfreeze-thaw",
}
OS_INFO = {
    "id": "mswindows",
    "name": "Microsoft Windows",
    "pretty-name": "Windows Server 2022 Standard",
    "version": "Microsoft Windows Server 2022",
    "version-id": "2022",
    "variant": "server",
    "variant-id": "server",
    "machine": "x86_64",
    "kernel-release": "20348",
    "kernel-version": "10.0",
}

Json = dict[str, Any]


class AgentError(Exception):
    """What the agent answers instead of a result."""

    def __init__(self, words: str, kind: str = "GenericError") -> None:
        super().__init__(words)
        self.kind = kind


@dataclass
class Trouble:
    """What goes wrong. Each entry happens once."""

    lost_commands: list[str] = field(default_factory=list)
    """Commands that never reach the agent."""
    lost_replies: list[str] = field(default_factory=list)
    """Commands that it carries out, and whose reply is lost."""
    changed: list[str] = field(default_factory=list)
    """Ends of paths: a file that arrives with one byte changed."""


@dataclass
class _Program:
    ended: Ended
    until: float
    captured: bool


class FakeWindowsAgent:
    """`blocked`: commands that the guest's administrator has switched off."""

    def __init__(self, path: Path, *, blocked: set[str] | None = None) -> None:
        self.windows = Windows()
        self.shell = Shell(self.windows)
        self.trouble = Trouble()
        self.blocked = blocked or set()
        self.frozen = False
        """The agent's own flag: it stays until a thaw, whatever Windows does meanwhile."""
        self.seen: list[str] = []
        """Commands that have arrived, in order."""
        self._programs: dict[int, _Program] = {}
        self._files: dict[int, tuple[bytearray, list[int]]] = {}
        self._numbers = itertools.count(1000)
        self._one_at_a_time = threading.Lock()
        self._restarted = threading.Event()
        self._links: list[socket.socket] = []
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        path.chmod(0o666)  # QEMU runs as another user
        self._server.listen()

    def __enter__(self) -> FakeWindowsAgent:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restarted.set()
        for link in [self._server, *self._links]:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def restart(self) -> None:
        """The machine is reset: whatever was under way is gone, and nothing is frozen. A reply that was due never
        comes. Files and the registry stay."""
        self._restarted.set()
        with self._one_at_a_time:
            self._restarted = threading.Event()
            self.windows.restart()
            self.frozen = False
            self._programs.clear()
            self._files.clear()

    # --- the wire ----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = self._server.accept()
                self._links.append(link)
                threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        held = ""
        with contextlib.suppress(OSError), link:
            while data := link.recv(1 << 16):
                # Byte 0xFF is no JSON: it clears the parser, and is itself complained of.
                for number, piece in enumerate(data.split(b"\xff")):
                    if number:
                        held = ""
                        self._send(link, _error("JSON parse error, stray '\ufffd'"))
                    held = self._parse(link, held + piece.decode("latin-1"))

    def _parse(self, link: socket.socket, held: str) -> str:
        """Carry out what is whole; the rest."""
        while text := held.lstrip():
            line, end, rest = text.partition("\n")
            try:
                request, used = json.JSONDecoder().raw_decode(text)
            except json.JSONDecodeError as error:
                if text[0] == "{" and (error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")):
                    return text
                if not end and text[0] != "{":
                    return text
                self._send(link, _error(f"JSON parse error, invalid keyword '{line.split()[0]}'"))
                held = rest
                continue
            self._answer(link, json.loads(text[:used].encode("latin-1")) if isinstance(request, dict) else None)
            held = text[used:]
        return ""

    def _answer(self, link: socket.socket, request: Json | None) -> None:
        if request is None:
            self._send(link, _error("QMP input must be a JSON object"))
            return
        name = str(request.get("execute"))
        if _taken(self.trouble.lost_commands, name):
            return
        with self._one_at_a_time:
            self.seen.append(name)
            restarted = self._restarted
            try:
                reply: Json = {"return": self._do(name, request.get("arguments") or {})}
            except (AgentError, WindowsError) as error:
                reply = _error(str(error), error.kind if isinstance(error, AgentError) else "GenericError")
        if restarted.is_set() or _taken(self.trouble.lost_replies, name):
            return
        self._send(link, reply, delimited=name == "guest-sync-delimited" and "return" in reply)

    def _send(self, link: socket.socket, reply: Json, *, delimited: bool = False) -> None:
        text = re.sub(r"\\u[0-9a-f]{4}", lambda found: f"\\u{found.group()[2:].upper()}", json.dumps(reply))
        link.sendall(b"\xff" * delimited + text.encode() + b"\n")

    # --- commands ----------------------------------------------------------------------------------------------

    def _do(self, name: str, arguments: Json) -> object:
        act = self._commands().get(name)
        if act is None:
            raise AgentError(f"The command {name} has not been found", "CommandNotFound")
        if self.frozen and name not in ALLOWED_WHILE_FROZEN:
            raise AgentError(f"Command {name} has been disabled: the agent is in frozen state", "CommandNotFound")
        if name in self.blocked:
            raise AgentError(f"Command {name} has been disabled: the command is not allowed", "CommandNotFound")
        try:
            return act(arguments)
        except KeyError as error:
            raise AgentError(f"Parameter '{error.args[0]}' is missing") from None

    def _commands(self) -> dict[str, Callable[[Json], object]]:
        return {
            "guest-ping": lambda _: {},
            "guest-sync": _id,
            "guest-sync-delimited": _id,
            "guest-info": self._info,
            "guest-get-osinfo": lambda _: OS_INFO,
            "guest-exec": self._exec,
            "guest-exec-status": self._exec_status,
            "guest-file-open": self._file_open,
            "guest-file-close": self._file_close,
            "guest-file-read": self._file_read,
            "guest-file-write": self._file_write,
            "guest-file-flush": self._file_flush,
            "guest-fsfreeze-status": lambda _: "frozen" if self.frozen else "thawed",
            "guest-fsfreeze-freeze": lambda _: self._freeze(None),
            "guest-fsfreeze-freeze-list": lambda said: self._freeze(said.get("mountpoints")),
            "guest-fsfreeze-thaw": self._thaw,
        }

    def _info(self, _: Json) -> Json:
        commands = [
            {
                "name": name,
                "enabled": name not in self.blocked and (not self.frozen or name in ALLOWED_WHILE_FROZEN),
                "success-response": True,
            }
            for name in self._commands()
        ]
        return {"version": "109.1.0", "supported_commands": commands}

    def _exec(self, said: Json) -> Json:
        stdin = base64.b64decode(said.get("input-data", ""))
        try:
            ended = self.shell.run([said["path"], *said.get("arg", [])], stdin)
        except WindowsError as error:
            raise AgentError(f"Guest agent command failed, error was '{error}'") from None
        number = next(self._numbers)
        # "merged" is no choice on Windows, and captures nothing.
        captured = said.get("capture-output") in (True, "separated")
        self._programs[number] = _Program(ended, time.monotonic() + ended.seconds, captured)
        return {"pid": number}

    def _exec_status(self, said: Json) -> Json:
        program = self._programs.get(said["pid"])
        if program is None:
            raise AgentError("Invalid parameter 'pid'")
        if time.monotonic() < program.until:
            return {"exited": False}
        del self._programs[said["pid"]]
        code = program.ended.code
        found: Json = {"exited": True, "signal" if code >= 0xC0000000 else "exitcode": code}
        for stream, data in (("out", program.ended.out), ("err", program.ended.err)):
            if program.captured and data:
                found[f"{stream}-data"] = base64.b64encode(data[:MOST_OUTPUT]).decode()
                found |= {f"{stream}-truncated": True} if len(data) > MOST_OUTPUT else {}
        return found

    def _file_open(self, said: Json) -> int:
        path, mode = str(said["path"]), str(said.get("mode", "r"))
        if mode not in ("r", "rb", "w", "wb"):
            raise AgentError("invalid file open mode")
        try:
            data = self.windows.disk.open(path, write=mode[0] == "w")
        except WindowsError as error:
            raise AgentError(f"failed to open file '{path}': {error}") from None
        if _taken_end(self.trouble.changed, path):
            data += b"#"
        number = next(self._numbers)
        self._files[number] = (data, [0])
        return number

    def _file(self, said: Json) -> tuple[bytearray, list[int]]:
        if said["handle"] not in self._files:
            raise AgentError(f"handle '{said['handle']}' has not been found")
        return self._files[said["handle"]]

    def _file_close(self, said: Json) -> Json:
        self._file(said)
        del self._files[said["handle"]]
        return {}

    def _file_flush(self, said: Json) -> Json:
        self._file(said)
        return {}

    def _file_read(self, said: Json) -> Json:
        data, at = self._file(said)
        piece = bytes(data[at[0] : at[0] + int(said.get("count", 4096))])
        at[0] += len(piece)
        # Unlike on Linux, the end is told only by a read that finds nothing.
        return {"count": len(piece), "buf-b64": base64.b64encode(piece).decode(), "eof": not piece}

    def _file_write(self, said: Json) -> Json:
        data, _ = self._file(said)
        piece = base64.b64decode(said["buf-b64"])
        data += piece
        return {"count": len(piece), "eof": False}

    # --- freeze ------------------------------------------------------------------------------------------------

    def _freeze(self, chosen: list[str] | None) -> int:
        self._need_provider()
        vss = self.windows.vss
        self.frozen = True
        self._restarted.wait(vss.freeze_seconds)
        try:
            vss.freeze(chosen)
        except WindowsError:
            self.frozen = False
            raise
        return vss.held

    def _thaw(self, _: Json) -> int:
        self._need_provider()
        self.frozen = False  # even if the thaw fails
        return self.windows.vss.thaw()

    def _need_provider(self) -> None:
        if PROVIDER_KEY not in self.windows.registry:
            raise AgentError("fsfreeze not possible as VSS failed to initialize")


def _id(said: Json) -> int:
    if not isinstance(said["id"], int):
        raise AgentError("Invalid parameter type for 'id', expected: integer")
    return said["id"]


def _error(words: str, kind: str = "GenericError") -> Json:
    return {"error": {"class": kind, "desc": words}}


def _taken(once: list[str], name: str) -> bool:
    if name in once:
        once.remove(name)
        return True
    return False


def _taken_end(once: list[str], path: str) -> bool:
    return any(_taken(once, end) for end in list(once) if path.endswith(end))
