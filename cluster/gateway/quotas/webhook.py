"""Delivery of signed JSON events to an operator's web server. Delivery blocks, so it must run in a thread.

The signature is an HMAC-SHA256 of the time and the body, so that a receiver can reject old or forged events:
`x-headrace-signature: t=<seconds>,v1=<hex of HMAC(secret, "<seconds>." + body)>`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

from cluster.gateway.auth.no_redirect import open_no_redirect

TIMEOUT_S = 5.0


class NotDelivered(Exception):
    """Raised when the receiver of a webhook is unreachable or refuses the event. The message is for the log; it
    contains neither the body nor the secret."""


def signature(secret: bytes, at_s: int, body: bytes) -> str:
    """Return the value of the x-headrace-signature header."""
    digest = hmac.new(secret, b"%d." % at_s + body, hashlib.sha256).hexdigest()
    return f"t={at_s},v1={digest}"


def post(url: str, secret: bytes, event: str, event_id: str, body: Mapping[str, Any], at_s: float) -> None:
    """Send an event. Any 2xx response counts as delivery. Raises NotDelivered."""
    data = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    headers = {
        "content-type": "application/json",
        "user-agent": "headrace",
        "x-headrace-event": event,
        "x-headrace-id": event_id,
        "x-headrace-signature": signature(secret, int(at_s), data),
    }
    request = urllib.request.Request(url, data, headers, method="POST")  # noqa: S310 - https, or this host, by config
    try:
        with open_no_redirect(request, TIMEOUT_S) as answer:
            answer.read(1024)
    except urllib.error.HTTPError as error:
        error.close()
        raise NotDelivered(f"the receiver answered {error.code}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise NotDelivered(f"the receiver was not reached: {type(error).__name__}") from None
