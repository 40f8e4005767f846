"""Who did what and why, who was kept out, what was decided: one JSON line each, and a row where there is a database.

Keys never: every text of an event passes `scrub`, which knows the shapes of keys and tokens, so that a key pasted
into a name or a reason does not come to rest here. Standard library only.
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
    r"hr_[A-Za-z0-9]{1,32}_[A-Za-z0-9]{8,}"  # ours; the id alone may stand
    r"|\bsk-[A-Za-z0-9_-]{8,}"  # OpenAI's and LiteLLM's
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?"  # JWT
    r"|(?i:\bbearer\s+)\S+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*"
)


def scrub(text: str) -> str:
    """The text without anything that looks like a key or token, and not longer than MAX_TEXT."""
    clean = text.encode("utf-8", "replace").decode().replace("\0", "")
    cut = _SECRET.sub(HIDDEN, clean[: 4 * MAX_TEXT])
    return cut if len(cut) <= MAX_TEXT else cut[: MAX_TEXT - 1] + "…"


def hide_secrets(value: Any) -> Any:
    """Plain values of any length without anything that looks like a key or token."""
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
    """One event. `at_s` since the epoch; `action` e.g. keys.create; `object` e.g. tenants/acme/keys/k1.

    `actor` is who (`key:<id>`, `jwt:<subject>`, `cli:<user>`; of a failure the id that was claimed), `source` from
    where (a peer's address). Texts are scrubbed when it is made.
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
        """Plain values."""
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}


class AuditLog:
    """Appends events to a file, one JSON line each, readable by its owner only. Thread-safe; a write is one call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        make_missing_folders(path.parent)

    def write(self, event: AuditEvent) -> None:
        """Append one event. A file that was moved away (log rotation) is made anew. Raises OSError."""
        line = json.dumps(event.as_json(), ensure_ascii=False, separators=(",", ":")) + "\n"
        with self._lock:
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(handle, line.encode())
            finally:
                os.close(handle)
