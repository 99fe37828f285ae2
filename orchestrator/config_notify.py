"""The sections of `[notify]`: who is told of alerts, and by what way."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, StrictInt, model_validator

from workers.contract.machines import Value

Path_ = Annotated[str, Field(min_length=1)]


def _web_host(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("https", "http") and bool(parts.hostname) and parts.username is None and parts.port != 0
    except ValueError:
        good = False
    if not good or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f'"{url}" is no address of a webhook; write it like "https://hooks.example.org/stillframe"')
    return url


Severity = Literal["info", "warning", "critical"]


class EmailSection(Value):
    """Alerts by SMTP."""

    host: Annotated[str, Field(pattern=r"^[A-Za-z0-9:][A-Za-z0-9.:-]*$")]
    port: Annotated[StrictInt, Field(ge=1, le=65535)] = 587
    security: Literal["starttls", "tls", "none"] = "starttls"
    ca_file: Path_ | None = None
    user: str | None = None
    password_file: Path_ | None = None
    sender: Annotated[str, Field(pattern=r"^[^@\s<>]+@[^@\s<>]+$")]
    to: Annotated[list[Annotated[str, Field(pattern=r"^[^@\s<>]+@[^@\s<>]+$")]], Field(min_length=1)]
    severity: Severity = "warning"
    """This and what is worse is sent."""


class WebhookSection(Value):
    """Alerts by HTTP POST, as JSON."""

    url: Annotated[str, AfterValidator(_web_host)]
    ca_file: Path_ | None = None
    secret_file: Path_ | None = None
    """Its content is sent as `Authorization: Bearer …`."""
    severity: Severity = "warning"

    @model_validator(mode="after")
    def _no_secret_in_the_clear(self) -> WebhookSection:
        local = urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")
        if self.secret_file is not None and self.url.startswith("http://") and not local:
            raise ValueError("secret_file would be sent in the clear: use https://")
        return self
