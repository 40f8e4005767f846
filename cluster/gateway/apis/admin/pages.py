"""Pages and filters of the admin API (AIP-158 and a part of AIP-160).

A page token says behind what the next page begins and of which list it is; whoever changes the list's filter in
between is told. It holds nothing that the caller has not seen, and opens nothing: what may be listed is decided anew.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from cluster.api.outcomes import invalid, quoted

MAX_PAGE = 1000
MAX_TOKEN = 8192
MAX_FILTER = 2048
_TERM = re.compile(r'\s*([a-z_]+(?:\.[A-Za-z0-9_./-]{1,63})?)\s*=\s*(?:"([^"\\]*)"|([A-Za-z0-9_./-]+))\s*')


def page_size(asked: int) -> int:
    """How many a page holds. Raises CallError."""
    if asked < 0:
        raise invalid("page_size", f"must not be negative, got {asked}")
    return min(asked or MAX_PAGE, MAX_PAGE)


def next_token(after: Any, *of: str) -> str:
    """The token of the page behind `after`, plain values, of the list that `of` describes."""
    raw = json.dumps([_digest(of), after], separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def after_of(token: str, kind: tuple[type, ...], *of: str) -> tuple[Any, ...] | None:
    """Behind what the page begins, a value of each kind; None at the first page. Raises CallError."""
    if not token:
        return None
    try:
        if len(token) > MAX_TOKEN:
            raise ValueError
        digest, after = json.loads(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
        good = isinstance(after, list) and [type(one) for one in after] == list(kind)
        good = good and all(one == one and abs(one) != float("inf") for one in after if isinstance(one, float))
        if not good or any(isinstance(one, str) and "\0" in one for one in after):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise invalid("page_token", "is not one that this method has returned") from None
    if digest != _digest(of):
        raise invalid("page_token", "is that of another list: ask with the fields of the first page")
    return tuple(after)


def _digest(of: tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join(of).encode()).hexdigest()[:16]


def terms(text: str, known: Mapping[str, str]) -> dict[str, str]:
    """The values of a filter `a = "x" AND b.c = y`. `known` names the fields, with `labels` for `labels.x`.

    Raises CallError."""
    found: dict[str, str] = {}
    if len(text) > MAX_FILTER:
        raise invalid("filter", f"must not be longer than {MAX_FILTER} characters")
    for part in re.split(r"\sAND\s", text) if text.strip() else []:
        match = _TERM.fullmatch(part)
        if match is None:
            raise invalid("filter", f'{part.strip()[:80]!r} is not like field = "value", with AND between')
        name = match[1]
        if name.split(".")[0] not in known or ("." in name) != (name.startswith("labels.")):
            raise invalid("filter", f"{quoted(name)} is none of {', '.join(known.values())}")
        if name in found:
            raise invalid("filter", f"{quoted(name)} is there twice")
        found[name] = match[2] if match[2] is not None else match[3]
    return found
