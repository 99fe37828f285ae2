"""What came back from a verb of the extension, judged: exactly one line of JSON that fits, or an error that says what
came instead (`extensions/CONTRACT.md` section 3). It comes from inside a guest, and nothing in it is believed beyond
its type.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import ValidationError

from workers.contract.errors import Busy, ExtensionError, GuestError
from workers.contract.guests import Answer, Ran, printable

MAX_ANSWER = 512 << 10
NOT_APPLICABLE, BUSY = 3, 11
_MARK = b"\xef\xbb\xbf"
"""Some shells of Windows begin their output with it."""

A = TypeVar("A", bound=Answer)


class _Reply(Answer):
    ok: bool
    error: str = ""


def read_answer(ran: Ran, verb: str, kind: type[A]) -> A | None:
    """The answer; None: not applicable, there was nothing to do. Raises Busy, ExtensionError."""
    if ran.truncated or len(ran.out) > MAX_ANSWER:
        raise ExtensionError(f"the extension answered {verb} with more than {MAX_ANSWER >> 10} KiB")
    said = words(ran)
    lines = [line for line in ran.out.removeprefix(_MARK).splitlines() if line.strip()]
    try:
        [line] = lines
        reply = _Reply.model_validate_json(line)
        if reply.ok and ran.code == NOT_APPLICABLE:
            return None
        if reply.ok and ran.code == 0:
            return kind.model_validate_json(line)
    except (ValueError, ValidationError):
        came = f"exit code {ran.code}: {said or f'{len(lines)} lines'}"
        raise ExtensionError(f"the extension answered {verb} with nonsense ({came})") from None
    text = f"{verb}: {printable(reply.error)[:300] or said or f'exit code {ran.code}'}"
    raise Busy(text) if ran.code == BUSY else ExtensionError(text)


def words(ran: Ran) -> str:
    """What a command said on standard error, for people. PowerShell's own records in XML are none."""
    said = ran.err.decode(errors="replace").partition("#< CLIXML")[0]
    return printable(said).strip()[-300:]


def as_extension_error(error: GuestError) -> ExtensionError:
    return error if isinstance(error, ExtensionError) else ExtensionError(str(error), hint=error.hint)
