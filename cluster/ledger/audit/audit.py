"""Audit events: admin actions, failed authentications and policy decisions.

Each event is a JSON line in a file. If there is a database, each event is also a row. Callers may paste a key into a
name or a reason, so `scrub` hides the parts of an event's texts that look like a key or token. This module imports only
the standard library and `cluster.process.private_files`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster.process.private_files import make_missing_folders

Kind = Literal["admin", "auth_failure", "policy"]
MAX_TEXT = 1000
HIDDEN = "[hidden]"

_SECRET = re.compile(
    r"hr_[A-Za-z0-9]{1,32}_[A-Za-z0-9]{8,}"  # Headrace; a key's id alone is not secret
    r"|\bsk-[A-Za-z0-9_-]{8,}"  # OpenAI and LiteLLM
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?"  # JWT
    r"|(?i:\bbearer\s+)\S+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*"
)


def scrub(text: str) -> str:
    """Replace parts that look like a key or token, and truncate the text to MAX_TEXT characters."""
    clean = text.encode("utf-8", "replace").decode().replace("\0", "")
    hidden = _SECRET.sub(HIDDEN, clean[: 4 * MAX_TEXT])
    return hidden if len(hidden) <= MAX_TEXT else hidden[: MAX_TEXT - 1] + "…"


def hide_secrets(value: Any) -> Any:
    """Hide parts that look like a key or token in all texts of a JSON value. Texts are not truncated."""
    if isinstance(value, str):
        return _SECRET.sub(HIDDEN, value)
    if isinstance(value, Mapping):
        return {str(key): hide_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide_secrets(item) for item in value]
    return value if isinstance(value, bool | int | float) or value is None else hide_secrets(str(value))


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, Mapping):
        return {scrub(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value if isinstance(value, bool | int | float) or value is None else scrub(str(value))


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """An audit event. The constructor scrubs all texts.

    `at_s` is in seconds since the epoch. `action` is a name such as keys.create, and `object` is a path such as
    tenants/acme/keys/k1. `actor` is `key:<id>`, `jwt:<subject>` or `cli:<user>`, or the claimed id if authentication
    failed. `source` is the peer's address.
    """

    at_s: float
    kind: Kind
    action: str
    actor: str = ""
    tenant: str = ""
    object: str = ""
    outcome: str = "ok"
    reason: str = ""
    source: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    event_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        for name, longest in (("action", 64), ("actor", 255), ("tenant", 255), ("object", 255), ("source", 255)):
            object.__setattr__(self, name, scrub(getattr(self, name))[:longest])
        object.__setattr__(self, "reason", scrub(self.reason))
        object.__setattr__(self, "details", _clean(self.details))

    def as_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON values."""
        return {attribute.name: getattr(self, attribute.name) for attribute in dataclasses.fields(self)}


class AuditLog:
    """File of audit events, with one JSON line per event. Thread-safe.

    The file is readable and writable by its owner only.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        make_missing_folders(path.parent)

    def write(self, event: AuditEvent) -> None:
        """Append an event to the file in one system call. Raises OSError.

        After a log rotation the file is created again.
        """
        line = json.dumps(event.as_json(), ensure_ascii=False, separators=(",", ":")) + "\n"
        with self._lock:
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(handle, line.encode())
            finally:
                os.close(handle)
