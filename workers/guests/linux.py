"""The extension in a Linux guest, driven over a channel (`extensions/CONTRACT.md` sections 2 and 3).

A new version is put beside the old one and takes its place by one rename at the end; whatever fails before or right
after that, the old one is in force. What arrives in the guest is hashed there and compared with the signed list, in a
folder that nobody but root can enter, before it is put in place: the channel is not believed either.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import TypeVar

from pydantic import ValidationError

from workers.contract.errors import Busy, ExtensionError, GuestError, PackageRefused
from workers.contract.guests import Answer, GuestOs, Quiesced, Resumed, Status
from workers.contract.seams import GuestChannel, Package, QuiesceRequest
from workers.guests.package import refuse_downgrade

ROOT, TRANSIENT = "/opt/stillframe", "/run/stillframe-ext"
ASK_SECONDS = 20.0
INSTALL_SECONDS = 60.0
RESUME_SECONDS = 180.0
MARGIN_SECONDS = 30.0
MAX_ANSWER = 512 << 10

_SAFE = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.:/+=-]{0,200}$")
_BUSY, _ABSENT, _NOT_APPLICABLE = 11, 127, 3
# The version in force ($1 is `current`) or another one, wherever it is: on disk, or in memory where the disk cannot be
# written.
_CALL = """version=$1; shift
for root in /opt/stillframe /run/stillframe-ext; do
    [ -f "$root/$version/ext" ] && exec /bin/sh "$root/$version/ext" "$@"
done
exit 127"""
_STAGE = """umask 022
mkdir -p "$1" && umask 077 && mkdir "$2" && cd "$2" && shift 2 && { [ $# -eq 0 ] || mkdir -p -- "$@"; }"""
_CHECK = """cd "$1" && sha256sum -c - >/dev/null && shift || exit 1
while [ $# -gt 1 ]; do chmod "$1" "$2" || exit 1; shift 2; done"""

A = TypeVar("A", bound=Answer)


class LinuxExtension:
    """See `seams.Extension`."""

    def __init__(self, channel: GuestChannel) -> None:
        self._channel = channel

    def status(self, uuid: str) -> Status | None:
        return self._verb("status", Status, ["--uuid", uuid], ASK_SECONDS)

    def quiesce(self, request: QuiesceRequest) -> Quiesced:
        options = ["--job", request.job, "--uuid", request.uuid, "--goal", request.goal.value]
        options += ["--freeze-s", str(request.freeze_s), "--limit-s", str(request.limit_s)]
        for disk in request.skip_disks:
            options += ["--skip-disk", disk]
        for name, word in request.options.items():
            options += ["--option", f"{name}={word}"]
        found = self._verb("quiesce", Quiesced, options, request.limit_s + MARGIN_SECONDS)
        if found is None:
            raise ExtensionError("the extension is no longer in the guest", hint="the next backup installs it again")
        return found

    def resume(self, job: str) -> Resumed:
        return self._verb("resume", Resumed, ["--job", job], RESUME_SECONDS) or Resumed(watchdog="absent")

    def uninstall(self) -> bool:
        return self._verb("uninstall", Answer, [], INSTALL_SECONDS) is not None

    # --- putting it in place -----------------------------------------------------------------------------------

    def install(self, package: Package, uuid: str) -> Status:
        if package.os is not GuestOs.LINUX:
            raise PackageRefused(f"package {package.version} is for {package.os}, the guest runs Linux")
        before = self.status(uuid)
        refuse_downgrade(package, before)
        if before is not None and before.lease is not None:
            raise Busy(f"job {before.lease.job} holds the guest, its extension cannot be replaced now")
        root = TRANSIENT if before is not None and before.transient else ROOT
        try:
            self._put(package, uuid, root)
        except ExtensionError:
            if root == TRANSIENT or self._writable(ROOT):
                raise
            self._put(package, uuid, TRANSIENT)
        return self._in_force(package, uuid, before)

    def _writable(self, root: str) -> bool:
        probe = f"{root}/.try-{secrets.token_hex(4)}"
        return self._shell('mkdir -p "$1" && mkdir "$2" && rmdir "$2"', [root, probe]) == ""

    def _put(self, package: Package, uuid: str, root: str) -> None:
        """Stage, check, move in place; not yet in force. The stage is gone afterwards."""
        stage = f"{root}/.stage-{secrets.token_hex(4)}"
        folders = sorted({path.rpartition("/")[0] for path in package.files} - {""})
        try:
            self._must(_STAGE, [root, stage, *folders], "no folder for the extension can be made in the guest")
            for path, file in package.files.items():
                self._channel.put_file(f"{stage}/{path}", file.data)
            sums = "".join(f"{file.sha256}  {path}\n" for path, file in package.files.items())
            modes = [word for path, file in package.files.items() for word in (f"{file.mode:o}", path)]
            what = "the extension did not arrive in the guest as it was sent"
            self._must(_CHECK, [stage, *modes], what, stdin=sums.encode())
            where = ["--root", root, "--version", package.version, "--uuid", uuid]
            where += ["--serial", str(package.serial), "--contract", str(package.contract)]
            self._call(["/bin/sh", f"{stage}/ext", "install", *where], "install", Answer, INSTALL_SECONDS)
        except GuestError as error:
            raise _as_extension_error(error) from None
        finally:
            with suppress(GuestError):
                self._shell('rm -rf -- "$1"', [stage])

    def _in_force(self, package: Package, uuid: str, before: Status | None) -> Status:
        """Put the new version in force, and see that it answers; else the one before is again."""
        try:
            self._call(_version(package.version, "enable", "--uuid", uuid), "enable", Answer, INSTALL_SECONDS)
            status = self.status(uuid)
            if status is None or status.version != package.version or status.contract != package.contract:
                raise ExtensionError(f"the new extension says that it is {status.version if status else 'absent'}")
            self._verb("probe", Answer, [], INSTALL_SECONDS)
        except GuestError as error:
            self._roll_back(package, uuid, before)
            raise _as_extension_error(error) from None
        return status

    def _roll_back(self, package: Package, uuid: str, before: Status | None) -> None:
        with suppress(GuestError):
            if before is not None and before.version != package.version:
                self._call(_version(before.version, "enable", "--uuid", uuid), "enable", Answer, INSTALL_SECONDS)
            elif before is None:
                self._shell('rm -rf -- "$1/current" "$1/$3" "$2/current" "$2/$3"', [ROOT, TRANSIENT, package.version])

    # --- one command -------------------------------------------------------------------------------------------

    def _must(self, script: str, arguments: Sequence[str], what: str, *, stdin: bytes = b"") -> None:
        words = self._shell(script, arguments, stdin=stdin)
        if words:
            raise ExtensionError(f"{what}: {words}")

    def _shell(self, script: str, arguments: Sequence[str], *, stdin: bytes = b"") -> str:
        """What went wrong with a small script of ours; empty: nothing did."""
        ran = self._channel.run(["/bin/sh", "-c", script, "sh", *arguments], stdin=stdin, timeout=INSTALL_SECONDS)
        return (ran.err.decode(errors="replace").strip()[:300] or f"exit code {ran.code}") if ran.code else ""

    def _verb(self, verb: str, kind: type[A], options: Sequence[str], seconds: float) -> A | None:
        """The answer of the version in force; None: there is none, or (exit code 3) nothing to do."""
        for option in options:
            if not _SAFE.match(option) and not option.startswith("--"):
                raise ExtensionError(f"{option!r} cannot be passed to the extension")
        return self._call(_version("current", verb, *options), verb, kind, seconds)

    def _call(self, argv: Sequence[str], verb: str, kind: type[A], seconds: float) -> A | None:
        ran = self._channel.run(argv, timeout=seconds)
        said = ran.err.decode(errors="replace").strip()[-300:]
        if ran.code in (_ABSENT, _NOT_APPLICABLE) and not ran.out.strip():
            return None
        if ran.truncated or len(ran.out) > MAX_ANSWER:
            raise ExtensionError(f"the extension answered {verb} with more than {MAX_ANSWER >> 10} KiB")
        lines = [line for line in ran.out.splitlines() if line.strip()]
        try:
            [line] = lines
            reply = _Reply.model_validate_json(line)
            if not reply.ok or ran.code not in (0, _NOT_APPLICABLE):
                raise _refused(verb, ran.code, reply.error or said)
            return None if ran.code == _NOT_APPLICABLE else kind.model_validate_json(line)
        except (ValueError, ValidationError):
            words = said or f"{len(lines)} lines"
            raise ExtensionError(
                f"the extension answered {verb} with nonsense (exit code {ran.code}: {words})"
            ) from None


def _version(version: str, *arguments: str) -> list[str]:
    return ["/bin/sh", "-c", _CALL, "sh", version, *arguments]


class _Reply(Answer):
    ok: bool
    error: str = ""


def _refused(verb: str, code: int, words: str) -> GuestError | Busy:
    text = f"{verb}: {words[:300] or f'exit code {code}'}"
    return Busy(text) if code == _BUSY else ExtensionError(text)


def _as_extension_error(error: GuestError) -> ExtensionError:
    return error if isinstance(error, ExtensionError) else ExtensionError(str(error), hint=error.hint)
