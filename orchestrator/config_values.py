"""What a single value of stillframe.toml may be: sizes, lengths of time, schedules, names, URLs; each check raises
ValueError in words for people, which get file and line in `config_mistakes.py`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from datetime import datetime
from typing import Annotated
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BeforeValidator, Field

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = re.compile(r"^\s*(\d{1,18})\s*([A-Za-z]*)\s*$", re.ASCII)
_TIME = r"([01]\d|2[0-3]):[0-5]\d"
_WALL = re.compile(_TIME, re.ASCII)
_DAYS = "daily|weekdays|weekends|weekly|monthly|mondays|tuesdays|wednesdays|thursdays|fridays|saturdays|sundays"
_SCHEDULE = re.compile(rf"hourly|({_DAYS}) at {_TIME}|every \d+ (minutes?|hours?)( from {_TIME} to {_TIME})?", re.ASCII)
_BLACKOUT = re.compile(rf"(({_DAYS.replace('|weekly|monthly', '')}) )?{_TIME} to {_TIME}", re.ASCII)
_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_DURATION = re.compile(r"^\s*(\d{1,9})\s*(second|minute|hour|day)s?\s*$", re.ASCII)
_CRON_FIELD = re.compile(r"^[0-9A-Za-z*/,#?L-]+$")

MIN_BLOCK = 64 << 10
MAX_BLOCK = 4 << 20


def parse_size(value: object) -> int:
    """Bytes of `"256KiB"`, `"1MiB"`, or a whole number of bytes. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'{value!r} is not a size; write it like "256KiB" or "1MiB"')
    if match[2] not in _UNITS:
        near = [unit for unit in _UNITS if unit and unit[0] == match[2][0].upper()]
        guess = f'; did you mean "{match[1]}{near[0]}"?' if near else ""
        raise ValueError(f'"{match[2]}" is no unit of size (B, KiB, MiB, GiB, TiB){guess}')
    return int(match[1]) * _UNITS[match[2]]


def is_block_size(value: int) -> int:
    if not MIN_BLOCK <= value <= MAX_BLOCK or value & (value - 1):
        raise ValueError("a block size is a power of two from 64KiB to 4MiB")
    return value


def is_scheme(what: str, *allowed: str) -> Callable[[str], str]:
    def check(url: str) -> str:
        if not url.startswith(allowed):
            raise ValueError(f'"{url}" is no {what} that this version knows ({", ".join(allowed)})')
        return url

    return check


def is_hypervisor(uri: str) -> str:
    from workers.contract.errors import ConfigError
    from workers.hypervisors import require_known

    try:
        require_known(uri)
    except ConfigError as error:
        raise ValueError(f"{error}; {error.hint}" if error.hint else str(error)) from None
    return uri


def is_store_url(url: str) -> str:
    if re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9._-]+)*/?", url):
        return url.rstrip("/")
    if url.startswith("s3:"):
        raise ValueError(f'"{url}" is no bucket; write it like "s3://bucket" or "s3://bucket/folder"')
    if not url.startswith("file://"):
        guess = f'; did you mean "file://{url}"?' if url.startswith(("/", "~", "./")) else ""
        raise ValueError(f'"{url}" is no vault that this version knows (file:///path, s3://bucket/prefix){guess}')
    path = url.removeprefix("file://")
    if not path.startswith(("/", "~", "./", "../")):
        raise ValueError(f'"{url}" names a host where a path should begin; did you mean "file:///{path}"?')
    return url


def _meant(words: str, pattern: re.Pattern[str]) -> str:
    """`; did you mean …?` if spelling and the zeros of times are all that is wrong."""
    known = [*_DAYS.split("|"), "hourly", "every", "minutes", "hours", "at", "from", "to"]
    mended: list[str] = []
    for word in words.split()[:12]:
        time = re.fullmatch(r"(\d{1,2})(?:[:.](\d\d))?", word, re.ASCII)
        if time and mended and mended[-1] in ("at", "from", "to"):
            mended.append(f"{int(time[1]):02d}:{time[2] or '00'}")
        elif time or _WALL.fullmatch(word):
            mended.append(word)
        else:
            mended.append(next(iter(difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)), word))
    guess = " ".join(mended)
    return f'; did you mean "{guess}"?' if pattern.fullmatch(guess) else ""


def is_schedule(words: str) -> str:
    if not _SCHEDULE.fullmatch(words):
        raise ValueError(
            f'"{words}" is no schedule{_meant(words, _SCHEDULE)}; write "hourly", "daily at 02:00", '
            '"weekdays at 22:30", "every 4 hours from 08:00 to 20:00", or use cron = "0 2 * * *"'
        )
    if every := re.match(r"every (\d+) (minute|hour)", words):
        # Counted anew from each midnight: what is longer than a day would be daily, and say something else.
        minutes = int(every[1]) * (60 if every[2] == "hour" else 1)
        if not 1 <= minutes <= 24 * 60:
            raise ValueError(
                f'"{words}": between one minute and 24 hours; for more, write "daily at 02:00" or use cron'
            )
    return words


def parse_duration(value: object) -> int:
    """Seconds of `"30 minutes"`, `"4 hours"`, `"1 day"`, or a whole number of seconds. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _DURATION.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'{value!r} is no length of time; write it like "30 minutes" or "4 hours"')
    return int(match[1]) * _SECONDS[match[2]]


def is_blackout(words: str) -> str:
    if not _BLACKOUT.fullmatch(words):
        meant = _meant(words, _BLACKOUT)
        raise ValueError(f'"{words}" is no window{meant}; write it like "08:00 to 18:00" or "weekdays 08:00 to 18:00"')
    return words


def is_cron(expression: str) -> str:
    from cronsim import CronSim, CronSimError

    fields = expression.split()
    if len(fields) != 5 or not all(_CRON_FIELD.match(field) for field in fields):
        raise ValueError(f'"{expression}" is no cron expression of five fields, like "0 2 * * *"')
    try:
        next(CronSim(expression, datetime(2000, 1, 1)))
    except CronSimError as error:
        raise ValueError(f'"{expression}" is no cron expression: {str(error).lower()}') from None
    except StopIteration:
        raise ValueError(f'"{expression}" is never due') from None
    return expression


def leaves_time(blackout: list[str]) -> list[str]:
    from orchestrator.schedules import covers_the_week

    if covers_the_week(blackout):
        raise ValueError("these windows cover the whole week: no backup would ever begin")
    return blackout


def is_upkeep(words: str) -> str:
    return words if words == "never" else is_schedule(words)


def is_timezone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(f'"{name}" is no time zone; write it like "Europe/Berlin"') from None
    return name


def is_public_key(digits: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise ValueError("a public key has 64 hex digits, as `stillframe extension list` shows it")
    return digits


def is_host_key(line: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9@.-]+ [A-Za-z0-9+/]{16,}={0,3}( .*)?", line):
        raise ValueError('a host key is written like "ssh-ed25519 AAAA…", as `ssh-keyscan HOST` prints it')
    return line


def is_application(name: str) -> str:
    if re.match(r"\d\d-", name):
        raise ValueError(f'"{name}" is a folder; an option is for the application: did you mean {name[3:]}?')
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", name):
        raise ValueError(f'"{name}" is no application: write its folder\'s name without the number, like postgresql')
    return name


def is_word(word: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}", word):
        raise ValueError(f'"{word}" is not one word of letters, digits, dot, colon, dash and underscore')
    return word


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Size = Annotated[int, BeforeValidator(parse_size)]
Duration = Annotated[int, BeforeValidator(parse_duration)]
BlockSize = Annotated[Size, AfterValidator(is_block_size)]
Path_ = Annotated[str, Field(min_length=1)]
Options = dict[Annotated[str, AfterValidator(is_application)], Annotated[str, AfterValidator(is_word)]]
