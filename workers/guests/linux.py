"""The extension in a Linux guest, driven over a channel (`extensions/CONTRACT.md` sections 2 and 3).

A new version is put beside the old one and takes its place by one rename at the end; whatever fails before or right
after that, the old one is in force. All files travel as one, since every file of its own would cost several messages,
and each of them 50 ms in an emulated guest. The guest cuts them apart again and compares each with the signed list, in
a folder that nobody but root can enter: the channel is not believed either.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from workers.contract.errors import Busy, ExtensionError, GuestError, PackageRefused, StillframeError
from workers.contract.guests import Answer, GuestOs, Quiesced, Resumed, Status, printable
from workers.contract.seams import GuestChannel, Package, PackageFile, QuiesceRequest
from workers.guests.package import refuse_downgrade

ROOT, TRANSIENT = "/opt/stillframe", "/run/stillframe-ext"
STATUS_SECONDS = 20.0
INSTALL_SECONDS = 60.0
"""For each step of it where the package says nothing."""
RESUME_SECONDS = 180.0
MARGIN_SECONDS = 30.0
MAX_ANSWER = 512 << 10
_WORDS = 300
"""Characters of what a guest says that are handed on in an error."""
_FILES_AT_ONCE = 200
"""Their list is standard input of one command, which the agent takes up to 64 KiB of."""

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/+=-]{0,200}", re.ASCII)
"""What is passed on as an option: no space, no pattern, nothing that a shell could read as something else."""
_BUSY, _NOTHING_TO_DO = 11, 3
_ABSENT = b"absent"

# The version in force, read by this very shell: another one costs 30 ms in an emulated guest. It finds its files in the
# current folder. One in memory is there because the disk could not be written: it is the newer one.
_CURRENT = f"""for root in {TRANSIENT} {ROOT}; do
    [ -f "$root/current/ext" ] && cd -P "$root/current" && {{ . ./ext; exit; }}
done
echo {_ABSENT.decode()}
exit {_NOTHING_TO_DO}"""
# $1: name of the stage, then the roots; the next one is tried only where a file system is read-only. Stages that are
# found there belong to processes that were killed. Says the root, and the version in force there.
_STAGE = """LC_ALL=C; export LC_ALL
stage=$1; shift
for root in "$@"; do
    why=$({ umask 022; mkdir -p "$root" && rm -rf "$root"/.stage-* && umask 077 && mkdir "$root/$stage"; } 2>&1) && {
        echo "$root"
        readlink "$root/current" || echo
        exit 0
    }
    case $why in *Read-only*) ;; *) break ;; esac
done
echo "$why" >&2
exit 1"""
# $1: the stage. Standard input: hash, size, mode and path of the files that .bundle holds one behind the other.
_UNPACK = """umask 022
cd "$1" || exit 1
while read -r sum size mode path; do
    case $path in */*) mkdir -p "${path%/*}" || exit 1 ;; esac
    : >"$path" || exit 1
    if [ "$size" != 0 ]; then
        why=$(dd bs="$size" count=1 2>&1 >"$path" <&3) || { echo "$path: $why" >&2; exit 1; }
    fi
    found=$(sha256sum <"$path") && [ "${found%% *}" = "$sum" ] || { echo "$path is not what was sent" >&2; exit 1; }
    chmod "$mode" "$path" || exit 1
done 3<.bundle
rm -f .bundle"""
_REMOVE = """rm -rf -- "$1" && { rmdir -- "${1%/*}" 2>/dev/null || :; }"""
# $1: root, $2: the new version, $3: the one that was in force (may be empty), $4: UUID. The old version's own `enable`
# is what the contract has for this; where that does not do it, the link alone has to. The new one's `uninstall` is not
# asked: it may hang.
_BACK = """[ "$2" != "$3" ] || exit 0
if [ ! -f "$1/$3/ext" ]; then
    case $1 in /opt/*) rm -rf /var/lib/stillframe ;; esac
    rm -rf -- "$1" || exit 1
    [ -z "$3" ] || { echo "$3 is gone" >&2; exit 1; }
    exit 0
fi
cd "$1" || exit 1
[ "$(readlink current)" = "$3" ] || /bin/sh "$1/$3/ext" enable --uuid "$4" >/dev/null
[ "$(readlink current)" = "$3" ] || ln -sfn "$3" current || exit 1
case $(readlink previous) in "$2" | "$3") rm -f previous ;; esac
rm -rf -- "$2" """

A = TypeVar("A", bound=Answer)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a package is being put."""

    root: str
    stage: str
    """Folder in the root."""
    old: str
    """Version in force there, empty for none."""


class LinuxExtension:
    """See `seams.Extension`."""

    def __init__(self, channel: GuestChannel) -> None:
        self._channel = channel

    def status(self, uuid: str) -> Status | None:
        return self._current("status", Status, ["--uuid", uuid], STATUS_SECONDS)

    def quiesce(self, request: QuiesceRequest) -> Quiesced:
        options = ["--job", request.job, "--uuid", request.uuid, "--goal", request.goal.value]
        options += ["--freeze-s", str(request.freeze_s), "--limit-s", str(request.limit_s)]
        for disk in request.skip_disks:
            options += ["--skip-disk", disk]
        for name, word in request.options.items():
            options += ["--option", f"{name}={word}"]
        # After the scripts' time the watchdog has `freeze_s` left, then it ends all this from inside.
        found = self._current("quiesce", Quiesced, options, request.limit_s + request.freeze_s + MARGIN_SECONDS)
        if found is None:
            raise ExtensionError("the extension is no longer in the guest", hint="the next backup installs it again")
        return found

    def resume(self, job: str) -> Resumed:
        return self._current("resume", Resumed, ["--job", job], RESUME_SECONDS) or Resumed(watchdog="absent")

    def uninstall(self) -> bool:
        return self._current("uninstall", Answer, [], INSTALL_SECONDS) is not None

    # --- putting it in place -----------------------------------------------------------------------------------

    def install(self, package: Package, uuid: str) -> Status:
        """Also where the version in force answers nonsense. Raises Busy too, while a job holds the guest."""
        if package.os is not GuestOs.LINUX:
            raise PackageRefused(f"package {package.version} is for {package.os}, the guest runs Linux")
        _refuse_unsafe(package.version, uuid)
        before = self._before(uuid)
        refuse_downgrade(package, before)
        if before is not None and before.lease is not None:
            raise Busy(f"job {before.lease.job} holds the guest, its extension cannot be replaced now")
        place = self._stage([TRANSIENT] if before is not None and before.transient else [ROOT, TRANSIENT])
        try:
            self._fill(place, package)
            return self._put_in_force(place, package, uuid)
        finally:
            with suppress(GuestError):  # the next installation removes it
                self._shell(_REMOVE, [f"{place.root}/{place.stage}"])

    def _before(self, uuid: str) -> Status | None:
        try:
            return self.status(uuid)
        except ExtensionError:
            return None  # whatever it is, it is no extension that could be used

    def _stage(self, roots: Sequence[str]) -> _Place:
        stage = f".stage-{secrets.token_hex(4)}"
        said = self._must(_STAGE, [stage, *roots], "no folder for the extension can be made in the guest")
        root, _, old = said.strip().partition("\n")
        if root not in roots or (old and not _SAFE.fullmatch(old)):
            raise ExtensionError(f"the guest answered {said[:_WORDS]!r} when a folder for the extension was to be made")
        return _Place(root, stage, old)

    def _fill(self, place: _Place, package: Package) -> None:
        stage = f"{place.root}/{place.stage}"
        try:
            for part in _parts(package):
                self._channel.put_file(f"{stage}/.bundle", b"".join(file.data for file in part.values()))
                lines = [f"{file.sha256} {len(file.data)} {file.mode:04o} {path}\n" for path, file in part.items()]
                what = "the extension did not arrive in the guest as it was sent"
                self._must(_UNPACK, [stage], what, stdin="".join(lines).encode())
        except GuestError as error:
            raise _as_extension_error(error, "") from None

    def _put_in_force(self, place: _Place, package: Package, uuid: str) -> Status:
        """Move the stage in place, see that it can serve this guest, put it in force, and see that it answers."""
        limits = package.time_limits
        new = f"{place.root}/{package.version}"
        where = ["--root", place.root, "--version", package.version, "--uuid", uuid]
        where += ["--serial", str(package.serial), "--contract", str(package.contract)]
        steps = [
            (f"{place.root}/{place.stage}/ext", "install", where),
            (f"{new}/ext", "probe", []),
            (f"{new}/ext", "enable", ["--uuid", uuid]),
        ]
        try:
            for ext, verb, options in steps:
                self._ask(["/bin/sh", ext, verb, *options], verb, Answer, limits.get(verb, INSTALL_SECONDS))
            status = self._current("status", Status, ["--uuid", uuid], limits.get("status", STATUS_SECONDS))
            _refuse_other(status, package)
        except StillframeError as error:
            words = self._roll_back(place, package.version, uuid)
            if isinstance(error, GuestError):
                raise _as_extension_error(error, words) from None
            raise
        assert status is not None
        return status

    def _roll_back(self, place: _Place, version: str, uuid: str) -> str:
        """What became of it, for people."""
        if place.old == version:
            return ""
        try:
            trouble = self._shell(_BACK, [place.root, version, place.old, uuid])[1]
        except GuestError as error:
            trouble = str(error)
        if trouble:
            return f"; and what was there before could not be put back: {trouble}"
        return f"; {place.old} is in force again" if place.old else "; nothing of it was left in the guest"

    # --- one command -------------------------------------------------------------------------------------------

    def _must(self, script: str, arguments: Sequence[str], what: str, *, stdin: bytes = b"") -> str:
        out, trouble = self._shell(script, arguments, stdin=stdin)
        if trouble:
            raise ExtensionError(f"{what}: {trouble}")
        return out

    def _shell(self, script: str, arguments: Sequence[str], *, stdin: bytes = b"") -> tuple[str, str]:
        """Standard output of a small script of ours, and what went wrong with it (empty: nothing did)."""
        ran = self._channel.run(["/bin/sh", "-c", script, "sh", *arguments], stdin=stdin, timeout=INSTALL_SECONDS)
        return ran.out.decode(errors="replace"), (_tail(ran.err) or f"exit code {ran.code}") if ran.code else ""

    def _current(self, verb: str, kind: type[A], options: Sequence[str], seconds: float) -> A | None:
        """The answer of the version in force; None: there is none, or it had nothing to do. `options`: names and
        values in turn."""
        _refuse_unsafe(*options[1::2])
        return self._ask(["/bin/sh", "-c", _CURRENT, "sh", verb, *options], verb, kind, seconds)

    def _ask(self, argv: Sequence[str], verb: str, kind: type[A], seconds: float) -> A | None:
        """Run the extension, and understand its answer."""
        ran = self._channel.run(argv, timeout=seconds)
        if ran.code == _NOTHING_TO_DO and ran.out.strip() in (_ABSENT, b""):
            return None
        if ran.truncated or len(ran.out) > MAX_ANSWER:
            raise _nonsense(f"the extension answered {verb} with more than {MAX_ANSWER >> 10} KiB")
        try:
            [line] = (line for line in ran.out.splitlines() if line.strip())
            reply = _Reply.model_validate_json(line)
            if reply.verb != verb:
                raise ValueError("it is the answer to something else")
            found = kind.model_validate_json(line) if reply.ok and ran.code == 0 else None
        except ValueError:
            words = f"exit code {ran.code}: {_tail(ran.err) or _tail(ran.out) or 'it said nothing'}"
            raise _nonsense(f"the extension answered {verb} with nonsense ({words})") from None
        if found is None and ran.code != _NOTHING_TO_DO:
            text = f"{verb}: {printable(reply.error)[:_WORDS] or _tail(ran.err) or f'exit code {ran.code}'}"
            raise Busy(text) if ran.code == _BUSY else ExtensionError(text)
        return found


class _Reply(Answer):
    """What every answer has."""

    verb: str
    ok: bool
    error: str = ""


def _parts(package: Package) -> Iterator[dict[str, PackageFile]]:
    files = list(package.files.items())
    for start in range(0, len(files), _FILES_AT_ONCE):
        yield dict(files[start : start + _FILES_AT_ONCE])


def _refuse_other(status: Status | None, package: Package) -> None:
    """The one that answers must be the one that was sent: its serial decides what is a downgrade later."""
    if status is None:
        raise ExtensionError("the new extension is not there after it was put in force")
    said = (status.version, status.serial, status.contract)
    if said != (package.version, package.serial, package.contract):
        raise ExtensionError(f"the new extension says that it is {status.version}, not {package.version}")


def _refuse_unsafe(*words: str) -> None:
    for word in words:
        if not _SAFE.fullmatch(word):
            raise ExtensionError(f"{word[:_WORDS]!r} cannot be passed to the extension: plain letters and digits only")


def _tail(said: bytes) -> str:
    return printable(said[-4 * _WORDS :].decode(errors="replace").strip())[-_WORDS:]


def _nonsense(text: str) -> ExtensionError:
    return ExtensionError(text, hint=f"in the guest: rm -rf {ROOT} {TRANSIENT}; the next backup installs it again")


def _as_extension_error(error: GuestError, more: str) -> ExtensionError:
    return ExtensionError(f"{error}{more}", hint=error.hint)
