"""Where a vault's secret comes from: a key file, a passphrase file, or a program. The only place that reads one.

A program (`key_command`) stands for every secret store there is, and its faults are ours to tell: it may be missing,
hang, fail, or print something else. What it prints is never shown, and its complaints only in their last line.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress

from workers.config import VaultConfig
from workers.contract.errors import WrongKey

COMMAND_SECONDS = 30.0
_OUTPUT_LIMIT = 4096
_DIGITS = re.compile(r"[0-9A-Za-z+/-]{24,}")


def secrets_of(name: str, vault: VaultConfig, *, seconds: float = COMMAND_SECONDS) -> tuple[bytes | None, bytes | None]:
    """Key and passphrase of a vault, from where the configuration says. Raises WrongKey."""
    from workers.vault.keys import read_key_file, read_passphrase_file

    if vault.key_file is not None:
        return read_key_file(vault.key_file), None
    if vault.passphrase_file is not None:
        return None, read_passphrase_file(vault.passphrase_file)
    if vault.key_command:
        return _from_command(name, vault.key_command, seconds), None
    raise WrongKey(f"vault {name!r} has no key configured", hint=f"set key_file under [vaults.{name}]")


def _from_command(name: str, argv: Sequence[str], seconds: float) -> bytes:
    """The key that a program prints; `seconds` until it is stopped, with what it started."""
    from workers.vault.keys import parse_key

    what, hint = f"key_command of vault {name} ({argv[0]})", f"run it by hand; it is under [vaults.{name}]"
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
        )
    except OSError as error:
        raise WrongKey(f"{what} cannot be run: {error.strerror}", hint=hint) from None
    with process:
        try:
            out, complaint = _talk(process, seconds)
        except subprocess.TimeoutExpired:
            raise WrongKey(f"{what} did not end within {seconds:.0f} s", hint=hint) from None
        finally:
            _stop(process)
    if len(out) > _OUTPUT_LIMIT:
        raise WrongKey(f"{what} prints more than a key file holds", hint=hint)
    if process.returncode != 0:
        raise WrongKey(f"{what} failed: {_last_line(complaint) or f'exit {process.returncode}'}", hint=hint)
    return parse_key(out, f"what {what} prints")


def _talk(process: subprocess.Popen[bytes], seconds: float) -> tuple[bytes, bytes]:
    """What it prints, a little more than the limit at most, and the end of its complaints. Raises TimeoutExpired."""
    assert process.stdout is not None
    assert process.stderr is not None
    deadline = time.monotonic() + seconds
    out, complaint = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, out)
        selector.register(process.stderr, selectors.EVENT_READ, complaint)
        while selector.get_map() and len(out) <= _OUTPUT_LIMIT:
            ready = selector.select(max(deadline - time.monotonic(), 0))
            if not ready:
                raise subprocess.TimeoutExpired(process.args, seconds)
            for key, _ in ready:
                data = os.read(key.fd, _OUTPUT_LIMIT)
                if not data:
                    selector.unregister(key.fileobj)
                key.data.extend(data)
            del complaint[:-_OUTPUT_LIMIT]
    if len(out) <= _OUTPUT_LIMIT:
        process.wait(max(deadline - time.monotonic(), 0))
    return bytes(out), bytes(complaint)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End it, and what it has started, if it has not ended by itself."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _last_line(complaint: bytes) -> str:
    """For people; a run of digits that might be a key is left out."""
    lines = complaint.decode(errors="replace").strip().splitlines()
    return _DIGITS.sub("…", "".join(filter(str.isprintable, lines[-1])))[:200] if lines else ""
