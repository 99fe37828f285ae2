"""What processes that stay write down: one line per thing that happened, with the job that it belongs to.

One place decides how lines look: JSON for programs, words for a terminal. Modules log through the standard library, so
that a line costs nothing where nobody has asked for lines; what is bound in `about` is on every line of that context,
threads that `parallel` starts included. Whatever looks like a secret is struck out here, whoever logs it.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO

OURS = ("orchestrator", "workers")
STRUCK = "***"
_SECRET_NAMES = re.compile(r"pass(word|phrase)?|secret|token|credential|authorization|private|key$", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)([^\s/@:]*):([^\s@]*)@")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_FIRST = ("timestamp", "level", "event", "logger", "job", "command", "machine")

Line = MutableMapping[str, Any]
# Not structlog's own: a command that is done at once must not pay for its import (0.1 s).
_context: ContextVar[Mapping[str, str]] = ContextVar("about", default={})  # noqa: B039 - never changed in place


def setup(*, verbose: bool = False, stream: TextIO | None = None, as_json: bool | None = None) -> None:
    """Write lines to `stream` (standard error), from now on, in this process. `as_json` None: unless it is a terminal.
    `verbose`: also what is only of interest to whoever looks for a fault."""
    import structlog

    out = stream or sys.stderr
    shared: list[Any] = [
        _with_context,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    to_json = not out.isatty() if as_json is None else as_json
    renderer = structlog.processors.JSONRenderer(ensure_ascii=False, default=str) if to_json else _for_people
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _strike, _ordered, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)


@contextmanager
def about(**what: str) -> Iterator[None]:
    """Every line that is written meanwhile, in this context, says so. What is empty is left out."""
    token = _context.set({**_context.get(), **{key: value for key, value in what.items() if value}})
    try:
        yield
    finally:
        _context.reset(token)


def _with_context(_logger: object, _name: str, line: Line) -> Line:
    return {**_context.get(), **line}


def struck(text: str) -> str:
    """`text` without passwords in URLs and credentials of headers."""
    return _BEARER.sub(rf"\1 {STRUCK}", _IN_URL.sub(rf"\1:{STRUCK}@", text))


def _strike(_logger: object, _name: str, line: Line) -> Line:
    return {key: STRUCK if _SECRET_NAMES.search(key) else _struck(value) for key, value in line.items()}


def _struck(value: object) -> object:
    if isinstance(value, str):
        return struck(value)
    if isinstance(value, Mapping):
        return {str(key): STRUCK if _SECRET_NAMES.search(str(key)) else _struck(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_struck(one) for one in value]
    return value


def _ordered(_logger: object, _name: str, line: Line) -> Line:
    first = {key: line[key] for key in _FIRST if key in line}
    return first | {key: value for key, value in line.items() if key not in first}


def _for_people(_logger: object, _name: str, line: Line) -> str:
    """`02:00:07 warning  failed: no space left  job=1a2b machine=web`, and what an exception said below."""
    fields = dict(line)
    time, level, event = (str(fields.pop(key, "")) for key in ("timestamp", "level", "event"))
    exception = "\n".join(map(_plain, str(fields.pop("exception", "")).splitlines()))
    fields.pop("logger", None)
    pairs = " ".join(f"{key}={_plain(value)}" for key, value in fields.items())
    text = f"{time[11:19]} {level:<8} {_plain(event)}" + (f"  {pairs}" if pairs else "")
    return f"{text}\n{exception}" if exception else text


def _plain(value: object) -> str:
    """Names come from machines, and must not steer the terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value))
