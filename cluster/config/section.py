"""The base of all configuration sections, and checks of URLs and hosts that several sections share."""

from __future__ import annotations

import ipaddress
import urllib.parse

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all configuration sections: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


def url_parts(value: str) -> urllib.parse.SplitResult:
    """Return the parts of a URL. Raises ValueError with a message that shows no password."""
    try:
        parts = urllib.parse.urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"is no URL: {error}") from None
    if port == 0:
        raise ValueError("is no URL of a server: its port is 0; write the server's port, 1 to 65535")
    return parts


def is_this_host(host: str) -> bool:
    """Return whether a host is `localhost` or a loopback address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
