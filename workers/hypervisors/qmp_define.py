"""A machine of a bare QEMU made known: nobody keeps a list of such machines, so it is two files beside its disks.

`<name>.qemu.json` is its definition, `<name>.start` a program that starts it in the background with a QMP socket. Both
are written whole or not at all, and only over those of the same machine. A mark in the runtime folder says where they
are, for whoever has to take back a restore that did not end.
"""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path

from workers.contract.errors import HypervisorError, TargetExists, UsageError
from workers.hosts.local import LOCAL
from workers.hypervisors import host_files, qmp_definition
from workers.hypervisors.qmp_definition import Definition

START_SECONDS = 120.0


def files_of(definition: Definition) -> tuple[Path, Path]:
    """Definition and start script."""
    if "/" in definition.name or definition.name in ("", ".", ".."):
        raise UsageError(f"a machine cannot be named {definition.name!r}: its start script is a file of that name")
    folder = definition.script_folder()
    return folder / f"{definition.name}.qemu.json", folder / f"{definition.name}.start"


def write(definition: Definition, nvram: bytes | None, marks: Path) -> Path:
    """The start script. Raises TargetExists, HypervisorError."""
    document, script = files_of(definition)
    _require_ours(document, script, definition.uuid)
    if nvram is not None:
        if definition.nvram is None:
            raise UsageError(f"the point has NVRAM, but {definition.name} is defined without")
        host_files.write_nvram(LOCAL, Path(definition.nvram.names[-1]), nvram)
    try:
        marks.mkdir(parents=True, exist_ok=True)
        _put(_mark(marks, definition.uuid), json.dumps([str(document), str(script)]), 0o600)
        _put(document, definition.model_dump_json(indent=1) + "\n", 0o600)
        _put(script, qmp_definition.script(definition), 0o700)
    except OSError as error:
        raise HypervisorError(f"cannot write the start script of {definition.name}: {error}") from None
    return script


def _require_ours(document: Path, script: Path, uuid: str) -> None:
    if document.exists():
        with suppress(UsageError, OSError, ValueError):
            if qmp_definition.read(document.read_text()).uuid == uuid:
                return
        raise TargetExists(f"{document} is another machine's", hint="choose another --name")
    if script.exists():
        raise TargetExists(f"{script} exists already", hint="choose another --name")


def _put(path: Path, text: str, mode: int) -> None:
    partial = path.with_name(f"{path.name}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w", errors="surrogateescape") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.chmod(mode)
    partial.replace(path)


def _mark(marks: Path, uuid: str) -> Path:
    return marks / f"qemu-{uuid}.json"


def remove(uuid: str, marks: Path) -> None:
    """The files of a machine that was defined here since the host came up. Others are somebody's own."""
    mark = _mark(marks, uuid)
    try:
        document, script = (Path(name) for name in json.loads(mark.read_text()))
    except (OSError, ValueError):
        return
    with suppress(UsageError, OSError, ValueError):
        if qmp_definition.read(document.read_text()).uuid == uuid:
            script.unlink(missing_ok=True)
            document.unlink()
    mark.unlink(missing_ok=True)


def start(script: Path, name: str) -> None:
    """Run the start script. Raises HypervisorError with QEMU's own words."""
    try:
        done = subprocess.run(
            [str(script)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=START_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HypervisorError(f"starting {name}: {error}") from None
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise HypervisorError(
            f"starting {name}: {words[-1] if words else f'exit {done.returncode}'}",
            hint=f"mend the command in {script}, and run it",
        )
