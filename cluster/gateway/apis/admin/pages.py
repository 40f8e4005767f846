"""Pagination and filters of the admin API (AIP-158 and a part of AIP-160).

A page token holds the position of a page's last row and a digest of the list's parameters. A token that is used with
another filter is refused. A token holds only data that the caller has already seen, and grants no access: each request
for a page is authorized by itself.
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


def page_size(requested: int) -> int:
    """Return the number of rows in a page: MAX_PAGE for 0, else at most MAX_PAGE. Raises CallError below 0."""
    if requested < 0:
        raise invalid("page_size", f"must not be negative, got {requested}")
    return min(requested or MAX_PAGE, MAX_PAGE)


def next_token(after: Any, *list_key: str) -> str:
    """Return the page token with which the caller requests the next page of a list. `after`: position of the last row
    of this page. `list_key`: name and filters of the list; the token is valid only together with them."""
    raw = json.dumps([_digest(list_key), after], separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def position_of(token: str, kinds: tuple[type, ...], *list_key: str) -> tuple[Any, ...] | None:
    """Return the position in a list after which the requested page begins. `token`: the page token of the request;
    "" asks for the first page, for which None is returned.

    `kinds`: the types of the values in a position. `list_key`: the parameters of the list. Raises CallError if
    the token is invalid or belongs to a list with other parameters.
    """
    if not token:
        return None
    try:
        if len(token) > MAX_TOKEN:
            raise ValueError
        digest, after = json.loads(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
        well_formed = isinstance(after, list) and [type(value) for value in after] == list(kinds)
        well_formed = well_formed and all(
            value == value and abs(value) != float("inf") for value in after if isinstance(value, float)
        )
        if not well_formed or any(isinstance(value, str) and "\0" in value for value in after):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise invalid("page_token", "is not one that this method has returned") from None
    if digest != _digest(list_key):
        raise invalid("page_token", "belongs to another list: repeat the other fields of the first page's request")
    return tuple(after)


def _digest(list_key: tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join(list_key).encode()).hexdigest()[:16]


def parse_filter(text: str, known: Mapping[str, str]) -> dict[str, str]:
    """Return the values in a filter like `a = "x" AND b.c = y`, keyed by field. Raises CallError for an invalid filter.

    `known`: the fields that a filter may name, each with the text that error messages show for it. If `labels` is one
    of these fields, a filter may name the label `x` as `labels.x`.
    """
    values: dict[str, str] = {}
    if len(text) > MAX_FILTER:
        raise invalid("filter", f"must not be longer than {MAX_FILTER} characters")
    for part in re.split(r"\sAND\s", text) if text.strip() else []:
        match = _TERM.fullmatch(part)
        if match is None:
            raise invalid("filter", f'{part.strip()[:80]!r} must be like field = "value"; join several with AND')
        name = match[1]
        if name.split(".")[0] not in known or ("." in name) != (name.startswith("labels.")):
            raise invalid("filter", f"{quoted(name)} is not a field; the fields are {', '.join(known.values())}")
        if name in values:
            raise invalid("filter", f"{quoted(name)} is given twice; remove one")
        values[name] = match[2] if match[2] is not None else match[3]
    return values
