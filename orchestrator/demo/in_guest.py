"""Run commands inside the demo's guests, through the guest agent: how files are written and hashed from within.

Not the `GuestChannel` of the product: backups need freeze and thaw only, and a guest that forbids exec is still backed
up. The demo and the tests own their guests and may look inside.
"""

from __future__ import annotations

import base64
import json
import time
from typing import TYPE_CHECKING, Any

from workers.contract.errors import GuestError

if TYPE_CHECKING:
    import libvirt

POLL = 0.05
"""Seconds between two looks at a command that runs, or at an agent that is not up yet."""
MAX_STDIN = 64 << 10


def agent_command(domain: libvirt.virDomain, execute: str, arguments: dict[str, Any] | None = None) -> Any:
    """The agent's answer to one command, within 10 seconds. Raises libvirt.libvirtError."""
    import libvirt_qemu

    message: dict[str, Any] = {"execute": execute}
    if arguments:
        message["arguments"] = arguments
    return json.loads(libvirt_qemu.qemuAgentCommand(domain, json.dumps(message), 10, 0))["return"]


def wait_for_agent(domain: libvirt.virDomain, *, timeout: float = 120.0) -> float:
    """Wait until the guest agent answers; the seconds that took. Raises GuestError."""
    import libvirt

    begun = time.monotonic()
    why = ""
    while time.monotonic() - begun < timeout:
        try:
            agent_command(domain, "guest-ping")
        except libvirt.libvirtError as error:
            if not domain.isActive():
                raise GuestError(f"{domain.name()} ended before its agent answered") from error
            why = str(error)
            time.sleep(POLL)
        else:
            return time.monotonic() - begun
    raise GuestError(f"the agent of {domain.name()} did not answer within {timeout:.0f} s: {why}")


def guest_run(
    domain: libvirt.virDomain, command: str, *, timeout: float = 120.0, stdin: bytes | None = None
) -> tuple[int, str]:
    """Run the shell `command` in the guest: (exit code, standard output and, if it failed, standard error).
    Raises GuestError when it does not end within `timeout` seconds (it then goes on in the guest), or for a `stdin` of
    more than 64 KiB: it travels in one message, and the agent chokes on long ones."""
    if stdin is not None and len(stdin) > MAX_STDIN:
        raise GuestError(f"{len(stdin)} bytes are too many for one message to the agent")
    arguments: dict[str, Any] = {"path": "/bin/sh", "arg": ["-c", command], "capture-output": True}
    if stdin is not None:
        arguments["input-data"] = base64.b64encode(stdin).decode()
    process = agent_command(domain, "guest-exec", arguments)["pid"]
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        status = agent_command(domain, "guest-exec-status", {"pid": process})
        if status["exited"]:
            code = int(status.get("exitcode", 128 + status.get("signal", 0)))
            output = base64.b64decode(status.get("out-data", ""))
            if code:
                output += base64.b64decode(status.get("err-data", ""))
            return code, output.decode(errors="replace")
        time.sleep(POLL)
    raise GuestError(f"not done in {domain.name()} within {timeout:.0f} s: {command}")


def guest_out(domain: libvirt.virDomain, command: str, *, timeout: float = 120.0, stdin: bytes | None = None) -> str:
    """Standard output of `command` in the guest. Raises GuestError when it fails."""
    code, output = guest_run(domain, command, timeout=timeout, stdin=stdin)
    if code:
        raise GuestError(f"exit code {code} in {domain.name()}: {command}: {output.strip()}")
    return output


def guest_hashes(domain: libvirt.virDomain, folder: str = "/data") -> dict[str, str]:
    """SHA-256 of every file under `folder` as the guest reads it: path → hex digits."""
    listing = guest_out(domain, f"find {folder} -type f | sort | xargs -r sha256sum", timeout=300.0)
    pairs = (line.split(maxsplit=1) for line in listing.splitlines())
    return {path: digest for digest, path in pairs}
