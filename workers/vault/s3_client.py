"""How a bucket is reached, which of its errors pass by themselves, and what the others mean.

botocore's own retries are off. After a connection that was cut nobody knows whether the server acted; a repeated
create then meets the object that its own first try has made, and only the caller can tell that from somebody else's.
So every request is made here, one at a time, by `Patience`: waits grow and are spread at random, so that many writers
that one outage has stopped do not come back as one.
"""

from __future__ import annotations

import base64
import hashlib
import random
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from io import BufferedReader, BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import botocore.session
from botocore.config import Config
from botocore.configloader import raw_config_parse
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigParseError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    SSLError,
)
from botocore.parsers import ResponseParserError

from workers.config import S3Access
from workers.contract.errors import (
    ConfigError,
    Corrupt,
    NoSpace,
    ObjectMissing,
    StillframeError,
    StoreUnreachable,
    VaultError,
    VaultMissing,
)

T = TypeVar("T")
File = BytesIO | BufferedReader
CONNECTIONS = 32
"""Requests of one process that can be under way at the same time; more wait for a connection."""


@dataclass(frozen=True, slots=True)
class Patience:
    """For how long a store may be ill before we give up on it; seconds."""

    attempts: int = 8
    first_wait: float = 0.2
    longest_wait: float = 10.0
    connect_timeout: float = 10.0
    read_timeout: float = 60.0

    def wait(self, failures: int) -> None:
        """Before the next attempt: up to twice as long each time, at random."""
        time.sleep(random.uniform(0, min(self.longest_wait, self.first_wait * 2**failures)))


PATIENCE = Patience()


class ShortAnswer(Exception):
    """An answer that is not what its own headers promise: worth another try."""


class Taken(VaultError):
    """A conditional create was refused: there is an object of that name."""


class UploadGone(VaultError):
    """There is no such multipart upload: it was completed, or removed."""


class PastEnd(Corrupt):
    """A range begins beyond the end of the object."""


class Denied(StoreUnreachable):
    """The store knows who asks, or does not, and refuses."""


class Unsupported(VaultError):
    """The store does not know this kind of request, or the bucket is not set up for it."""


# --- the client ------------------------------------------------------------------------------------------------------


def make_client(access: S3Access, patience: Patience) -> Any:
    """A client, and nothing is asked of the network yet, but for credentials that come from there.
    Raises ConfigError."""
    session = _session()
    keys: dict[str, str | None] = {}
    if access.credentials_file is not None:
        keys = _credentials(access.credentials_file)
    elif session.get_credentials() is None:
        raise ConfigError(
            "there are no credentials for S3",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or credentials_file in the vault's section s3",
        )
    if access.ca_file is not None and not access.ca_file.is_file():
        raise ConfigError(f"there is no file {access.ca_file}", hint="ca_file is the PEM of your certificate authority")
    try:
        with _making:
            return session.create_client(
                "s3",
                **keys,
                region_name=access.region or session.get_config_variable("region") or "us-east-1",
                endpoint_url=access.endpoint,
                verify=None if access.ca_file is None else str(access.ca_file),
                config=_settings(access, patience),
            )
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(f"cannot reach S3 like that: {error}", hint="check endpoint and region") from error


@cache
def _session() -> botocore.session.Session:
    """One for the process: what it has read of the service's description is used for the next client."""
    return botocore.session.Session()


_making = Lock()
"""A session makes one client at a time."""


def _settings(access: S3Access, patience: Patience) -> Config:
    return Config(
        signature_version="s3v4",
        s3={"addressing_style": "path" if access.path_style else "virtual"},
        retries={"total_max_attempts": 1},
        connect_timeout=patience.connect_timeout,
        read_timeout=patience.read_timeout,
        max_pool_connections=CONNECTIONS,
        tcp_keepalive=True,
        # Not every store knows the newer check sums. What we send carries its MD5, which all know; what we read is
        # checked by the vault.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )


def _credentials(path: Path) -> dict[str, str | None]:
    """Raises ConfigError."""
    hint = "it holds [default], aws_access_key_id = … and aws_secret_access_key = …, one per line"
    try:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"credentials file {path} can be read by others", hint=f"chmod 600 {path}")
        profile = raw_config_parse(str(path)).get("default", {})
    except (OSError, ConfigParseError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read credentials file {path}: {error}", hint=hint) from None
    if "aws_access_key_id" not in profile or "aws_secret_access_key" not in profile:
        raise ConfigError(f"credentials file {path} has no key in a profile [default]", hint=hint)
    return {name: profile.get(name) for name in ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")}


def md5_of(file: File) -> str:
    """Of a whole file, so that the store refuses what the network has changed."""
    file.seek(0)
    return base64.b64encode(hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).digest()).decode()


# --- calls -----------------------------------------------------------------------------------------------------------


def call(patience: Patience, place: str, what: str, act: Callable[[], T]) -> T:
    """What `act` returns, tried again as long as that can help. `what` completes "cannot …".
    Raises the errors of `translated`, StoreUnreachable."""
    last: Exception | None = None
    for failures in range(patience.attempts):
        try:
            return act()
        except (ClientError, BotoCoreError, ResponseParserError, ShortAnswer) as error:
            if not _passes(error):
                raise translated(error, place, what) from error
            last = error
        if failures + 1 < patience.attempts:
            patience.wait(failures)
    raise StoreUnreachable(
        f"cannot {what}: {place} failed {patience.attempts} times, at last with: {last}",
        hint="check the network, and that the store runs; a later run goes on",
    ) from last


_PASSING_CODES = frozenset(
    {
        "BadDigest",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "ConditionalRequestConflict",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "XAmzContentChecksumMismatch",
    }
)
_PASSING = (ConnectionError, HTTPClientError, IncompleteReadError, ResponseParserError, ShortAnswer)
_NOT_PASSING_STATUS = frozenset({501, 507})


def _passes(error: Exception) -> bool:
    if isinstance(error, ClientError):
        code, status = _answer(error)
        if status in _NOT_PASSING_STATUS or code in _FULL:
            return False
        return code in _PASSING_CODES or status in (408, 409, 429) or status >= 500
    if isinstance(error, SSLError):
        return False
    return isinstance(error, _PASSING)


def _answer(error: ClientError) -> tuple[str, int]:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(error.response.get("Error", {}).get("Code", "")), int(status)


_FULL = frozenset({"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "InsufficientStorage"})
_ELSEWHERE = frozenset({"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "301", "307"})
_KEYS = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"})
_HINT_KEYS = "check the credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the vault's credentials_file"
_HINT_RIGHTS = "check the credentials, and that their policy allows to list, get, put and delete objects there"
_HINT_BUCKET = "check the bucket's name and the endpoint; make it first: Stillframe makes no buckets"


def translated(error: Exception, place: str, what: str) -> StillframeError:
    """An error that another try would not mend, as ours."""
    if isinstance(error, SSLError):
        hint = "set ca_file in the vault's section s3 to the PEM of the authority that signed the certificate"
        return StoreUnreachable(f"cannot {what}: the certificate of {place} is not trusted: {error}", hint=hint)
    if not isinstance(error, ClientError):
        return StoreUnreachable(f"cannot {what}: {error}", hint="check endpoint, region and credentials")
    code, status = _answer(error)
    said = f"cannot {what}: {place} says {code or status}"
    if detail := error.response.get("Error", {}).get("Message"):
        said = f"{said}: {detail}"
    if code in _FULL or status == 507:
        return NoSpace(said, hint="free space where the vault lives")
    if code in _ELSEWHERE:
        return StoreUnreachable(said, hint="check region and endpoint in the vault's section s3")
    if code == "RequestTimeTooSkewed":
        return StoreUnreachable(said, hint="set this host's clock")
    if code in _KEYS:
        return Denied(said, hint=_HINT_KEYS)
    made = _MEANINGS.get(code) or _MEANINGS.get(str(status))
    return VaultError(said) if made is None else made(said)


_MEANINGS: dict[str, Callable[[str], StillframeError]] = {
    "NoSuchBucket": lambda said: VaultMissing(said, hint=_HINT_BUCKET),
    "NoSuchUpload": UploadGone,
    "ObjectLockConfigurationNotFoundError": Unsupported,
    "401": lambda said: Denied(said, hint=_HINT_KEYS),
    "403": lambda said: Denied(said, hint=_HINT_RIGHTS),
    "404": ObjectMissing,
    "405": Unsupported,
    "412": Taken,
    "416": PastEnd,
    "501": Unsupported,
}
"""By the code of the answer, else by its status."""
