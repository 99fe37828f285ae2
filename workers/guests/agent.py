"""The way into a guest by the QEMU guest agent, over whatever carries its JSON.

Every call has a time limit of its own: a freeze waits for writes of the whole guest and may hang, and without a limit
it would hold the caller, and with it the thaw, for ever. A freeze that timed out may succeed later, so every failed
freeze must be followed by a thaw. While frozen the agent answers only ping, sync, info, status and thaw.

What it allows is read from its own list (`guest-info`) each time: distributions switch commands off, EL 9 all that run
programs or touch files. A command's status can be read once only, and it cannot be killed from outside.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from workers.contract.errors import GuestError, GuestTimeout
from workers.contract.guests import GuestInfo, GuestOs, Ran

FREEZE_SECONDS = 30.0
WINDOWS_FREEZE_SECONDS = 75.0
"""VSS asks every writer first: up to 60 s, and qemu-ga waits as long."""
THAW_SECONDS = 10.0
ASK_SECONDS = 5.0
PIECE = 64 << 10
"""Bytes of a file per message. libvirt carries strings of 4 MiB, but the agent reads its port in small steps: 1 MiB
took more than 5 s in an emulated guest, 64 KiB some 50 ms."""
FILE_SECONDS = 30.0
_POLL_FIRST, _POLL_MOST = 0.005, 0.1
_FROZEN = "guest-fsfreeze-freeze and -thaw only"
_ALLOW = "allow the guest-fsfreeze-* commands in the guest: /etc/qemu/qemu-ga.conf or /etc/sysconfig/qemu-ga"

Json = dict[str, Any]


class AgentChannel:
    """See `seams.GuestChannel`. `command(request, timeout)` sends one JSON command and returns the JSON reply; it
    raises GuestError when there is none within `timeout` seconds."""

    def __init__(self, command: Callable[[str, float], str]) -> None:
        self._command = command
        self._windows = False

    def close(self) -> None:
        """Nothing is open between two commands."""

    # --- what it is --------------------------------------------------------------------------------------------

    def ping(self) -> bool:
        """Whether an agent answers now, and to this very question. Never raises GuestError."""
        token = secrets.randbelow(1 << 31)
        try:
            return self._ask("guest-sync", ASK_SECONDS, {"id": token}) == token
        except GuestError:
            return False

    def info(self) -> GuestInfo:
        said = self._table("guest-info")
        commands = said.get("supported_commands")
        allowed = {
            str(command.get("name"))
            for command in (commands if isinstance(commands, list) else [])
            if isinstance(command, dict) and command.get("enabled")
        }
        os, release = self._os() if "guest-get-osinfo" in allowed else (GuestOs.OTHER, "")
        self._windows = os is GuestOs.WINDOWS
        return GuestInfo(
            os=os,
            release=release,
            agent=str(said.get("version", "")),
            can_run={"guest-exec", "guest-exec-status"} <= allowed,
            can_copy={f"guest-file-{act}" for act in ("open", "read", "write", "close")} <= allowed,
            can_freeze={f"guest-fsfreeze-{act}" for act in ("freeze", "thaw", "status")} <= allowed,
            can_freeze_some="guest-fsfreeze-freeze-list" in allowed,
            can_plant_keys={f"guest-ssh-{act}-authorized-keys" for act in ("add", "remove")} <= allowed,
        )

    def _os(self) -> tuple[GuestOs, str]:
        """Refused while frozen: then nothing is known."""
        try:
            said = self._table("guest-get-osinfo")
        except GuestError:
            return GuestOs.OTHER, ""
        if said.get("id") == "mswindows":
            os = GuestOs.WINDOWS
        else:
            # Linux has no mark of its own here; its kernel's version begins with a number as no other id does.
            os = GuestOs.LINUX if "kernel-release" in said else GuestOs.OTHER
        return os, str(said.get("pretty-name") or said.get("name") or said.get("kernel-release") or "")

    # --- commands and files ------------------------------------------------------------------------------------

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float) -> Ran:
        if len(stdin) > PIECE:
            raise GuestError(f"{len(stdin)} bytes are too many for the standard input of a command: put a file")
        arguments: Json = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
        if stdin:
            arguments["input-data"] = base64.b64encode(stdin).decode()
        deadline = time.monotonic() + timeout
        pid = self._table("guest-exec", arguments=arguments).get("pid")
        pause = _POLL_FIRST
        while True:
            said = self._table("guest-exec-status", arguments={"pid": pid})
            if said.get("exited"):
                return _ran(said)
            if time.monotonic() > deadline:
                raise GuestTimeout(f"{argv[0]} did not end within {timeout:.0f} s in the guest, and may still run")
            time.sleep(pause)
            pause = min(pause * 2, _POLL_MOST)

    def put_file(self, path: str, data: bytes) -> None:
        """The agent creates files with mode 0666 whatever its umask: measured."""
        with_handle = self._open(path, "wb")
        try:
            for at in range(0, len(data), PIECE):
                self._write_piece(with_handle, path, data[at : at + PIECE])
        finally:
            with suppress(GuestError):  # an error of the write is the news
                self._ask("guest-file-flush", ASK_SECONDS, {"handle": with_handle})
            self._ask("guest-file-close", ASK_SECONDS, {"handle": with_handle})

    def _write_piece(self, handle: object, path: str, piece: bytes) -> None:
        while piece:
            sent = {"handle": handle, "buf-b64": base64.b64encode(piece).decode()}
            count = self._table("guest-file-write", FILE_SECONDS, sent).get("count")
            if not isinstance(count, int) or not 0 < count <= len(piece):
                raise GuestError(f"{path} could not be written in the guest: {count} of {len(piece)} bytes taken")
            piece = piece[count:]

    def get_file(self, path: str, *, limit: int) -> bytes:
        handle = self._open(path, "rb")
        found = bytearray()
        try:
            while len(found) < limit:
                wanted = {"handle": handle, "count": min(PIECE, limit - len(found))}
                said = self._table("guest-file-read", FILE_SECONDS, wanted)
                found += _bytes(said.get("buf-b64"))
                if said.get("eof") or not said.get("count"):
                    break
        finally:
            self._ask("guest-file-close", ASK_SECONDS, {"handle": handle})
        return bytes(found[:limit])

    def _open(self, path: str, mode: str) -> object:
        return self._ask("guest-file-open", ASK_SECONDS, {"path": path, "mode": mode})

    # --- freeze ------------------------------------------------------------------------------------------------

    def freeze(self, mounts: Sequence[str] = ()) -> int:
        """After any error the guest may be frozen, or become so later, all the same: thaw."""
        timeout = WINDOWS_FREEZE_SECONDS if self._windows else FREEZE_SECONDS
        if mounts:
            return self._count("guest-fsfreeze-freeze-list", timeout, {"mountpoints": list(mounts)})
        return self._count("guest-fsfreeze-freeze", timeout)

    def thaw(self) -> int:
        return self._count("guest-fsfreeze-thaw", THAW_SECONDS)

    def frozen(self) -> bool:
        return self._ask("guest-fsfreeze-status", ASK_SECONDS) == "frozen"

    # --- for the other way in ----------------------------------------------------------------------------------

    def plant_key(self, user: str, key: str) -> None:
        """Let the SSH public key `key` in as `user`."""
        self._ask("guest-ssh-add-authorized-keys", ASK_SECONDS, {"username": user, "keys": [key]})

    def remove_key(self, user: str, key: str) -> None:
        """Absent already: no error."""
        self._ask("guest-ssh-remove-authorized-keys", ASK_SECONDS, {"username": user, "keys": [key]})

    def keys(self, user: str) -> list[str]:
        """Public keys that are let in as `user`."""
        said = self._table("guest-ssh-get-authorized-keys", arguments={"username": user})
        found = said.get("keys")
        return [str(key) for key in found] if isinstance(found, list) else []

    def addresses(self) -> list[str]:
        """Of the guest's interfaces, IPv4 first; neither loopback nor link-local."""
        found: list[str] = []
        said = self._ask("guest-network-get-interfaces", ASK_SECONDS)
        for interface in said if isinstance(said, list) else []:
            for entry in interface.get("ip-addresses") or []:
                address = str(entry.get("ip-address", ""))
                if address and not address.startswith(("127.", "169.254.", "::1", "fe80")):
                    found.append(address)
        return sorted(found, key=lambda address: ":" in address)

    # --- the wire ----------------------------------------------------------------------------------------------

    def _table(self, name: str, timeout: float = ASK_SECONDS, arguments: Json | None = None) -> Json:
        found = self._ask(name, timeout, arguments)
        if not isinstance(found, dict):
            raise GuestError(f"the guest agent answered {name} with {found!r}")
        return found

    def _count(self, name: str, timeout: float, arguments: Json | None = None) -> int:
        found = self._ask(name, timeout, arguments)
        if not isinstance(found, int):
            raise GuestError(f"the guest agent answered {name} with {found!r}")
        return found

    def _ask(self, name: str, timeout: float, arguments: Json | None = None) -> object:
        request: Json = {"execute": name}
        if arguments:
            request["arguments"] = arguments
        try:
            return _returned(name, self._command(json.dumps(request), timeout))
        except GuestError as error:
            if "disabled" in str(error) and "fsfreeze" in name:
                raise GuestError(str(error), hint=_ALLOW) from None
            raise


def _returned(name: str, raw: str) -> object:
    try:
        reply = json.loads(raw)
    except ValueError:
        raise GuestError(f"the guest agent answered {name} with something that is not JSON") from None
    if isinstance(reply, dict) and "return" in reply:
        return reply["return"]
    error = reply.get("error") if isinstance(reply, dict) else None
    words = error.get("desc") if isinstance(error, dict) else None
    raise GuestError(f"the guest agent refused {name}: {words or raw}")


def _ran(said: Json) -> Ran:
    """How a command ended. Windows reports a status of 0xC0000000 and above as a signal."""
    signal = said.get("signal")
    code = said.get("exitcode", 128 + signal if isinstance(signal, int) else None)
    if not isinstance(code, int):
        raise GuestError("the guest agent does not say how a command ended")
    return Ran(
        code=code,
        out=_bytes(said.get("out-data")),
        err=_bytes(said.get("err-data")),
        truncated=bool(said.get("out-truncated") or said.get("err-truncated")),
    )


def _bytes(data: object) -> bytes:
    try:
        return base64.b64decode(str(data or ""), validate=True)
    except binascii.Error:
        raise GuestError("the guest agent sent something that is not base64") from None
