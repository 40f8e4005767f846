"""Texts about the sources of adapters, such as the reason of a failed fetch, for readers who may not see all of them.

Problem: the message of a library may repeat a source, which may hold a password, a signed query or a path on a node.
Invariants: no text has credentials. The text for a tenant has neither the source nor a path.
"""

from __future__ import annotations

import re

_USER = re.compile(r"(?<=://)[^/\s]*@")
_QUERY = re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]*")
_PATH = re.compile(r"(?<![\w.:/*\]])/[^\s'\",;:)]+")


def without_credentials(text: str) -> str:
    """Return a text whose URLs have neither a user with a password nor a query."""
    return _QUERY.sub(r"\1", _USER.sub("", text))


def without_places(text: str, source: str) -> str:
    """Return a text that shows neither the `source` nor a path, for tenants."""
    text, plain = without_credentials(text), without_credentials(source)
    _, _, address = plain.partition("://")  # "" for a folder, whose path is hidden below
    for place in (plain, address, address.partition("@")[0]):
        if address and "/" in place:
            text = text.replace(place, "the source")
    return _PATH.sub("a path", text)
