"""Redaction of the parts of a support bundle. This module reads no files.

There are two steps. `Rules` keeps only the values of a configuration that are known to be harmless: numbers, switches,
and texts under the keys of SHOWN. `Redactor` then replaces, in every text of the bundle, the secrets that the rules
found, the contents of secret files, and everything that has the form of a key, a token or a private key.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit, urlunsplit

REDACTED = "[redacted]"
MIN_SECRET = 4
"""Minimum length of a secret that is searched for in the bundle. Shorter texts would be found everywhere."""
SHOWN = frozenset(
    {
        "api_version", "name", "aliases", "version", "revision", "digest", "dtype", "class", "classes", "fallback",
        "ray", "gpu", "type", "load_format", "license", "control_tokens_in_content", "prefer", "fault", "builtin",
        "on_failure", "action", "currency", "tenant", "tenants", "role", "algorithms", "tenant_claim", "role_claim",
        "formats", "licenses", "level", "format", "cache_group", "grpc", "http", "link", "admin", "metrics",
        "client_id", "scopes", "log_level", "models", "on_budget", "policy",
        # engine arguments with a fixed set of values
        "kv_cache_dtype", "quantization", "tool_call_parser", "reasoning_parser", "attention_backend", "task",
        "scheduling_policy", "distributed_executor_backend", "tokenizer_mode",
        # values of the chart
        "fullnameOverride", "repository", "tag", "pullPolicy", "storageClass", "accessMode", "size", "cpu", "memory",
        "kind", "apiVersion", "imageRegistry",
    }
)  # fmt: skip
"""Keys whose texts are shown. Texts of keys that end with `file`, `dir` or `folder` are paths and shown too."""
ADDRESSES = frozenset(
    {
        "source", "sources", "database_url", "limits_url", "dashboard_url", "url", "endpoint", "issuer", "public_url",
        "traces_url", "prometheus_url", "address", "gateways",
    }
)  # fmt: skip
"""Keys of addresses, which are shown without user, password and query."""
_PATH = re.compile(r"(^|_)(file|dir|folder)$")
_SECRET = re.compile(
    r"(?i)pass|pwd|secret|token|(api|access|account)[_-]?key|private|credential|authorization|bearer|pepper|cookie"
    r"|header|dsn|signature"
)
_HARMLESS = re.compile(r"_tokens$|^tokens?_per_|TokensPer|^(existing|tls|gateway|worker|controller)Secret$|_file$")
"""Pattern of keys that match _SECRET but have a harmless value: a number of tokens, the name of a Kubernetes Secret, or
a path."""
_URL = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)([^\s/@\"'<>]+)@")
_FORMS = (
    re.compile(r"(hr_[A-Za-z0-9]{1,32}_)[A-Za-z0-9]{8,}()"),
    re.compile(r"(?i)(\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}()"),
    re.compile(r"()\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*)?()"),
    re.compile(r"(-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----)[\s\S]*?(-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)"),
    re.compile(r"()\b(?:hf|sk|ghp|github_pat|xox[abprs])[_-][A-Za-z0-9_-]{16,}()"),
)


@dataclass
class Rules:
    """Filter that keeps only the harmless values of a document, and collects the secrets that it leaves out.

    `known`: all keys that a configuration may have. A number is left out if its path has a key that is not in `known`
    and whose name suggests a secret (_SECRET). Other numbers are kept.
    """

    known: frozenset[str] = frozenset()
    secrets: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)
    """Paths of the values that were left out or changed."""

    def apply(self, value: Any, path: tuple[str, ...] = ()) -> Any:
        """Return a copy of a document that keeps only the harmless values. `path`: the keys above `value`."""
        if isinstance(value, Mapping):
            return {str(key): self.apply(item, (*path, str(key))) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.apply(item, path) for item in value]
        if value is None or isinstance(value, bool):
            return value
        key = path[-1] if path else ""
        is_secret = any(self._is_secret(each) for each in path)
        if not isinstance(value, int | float) or is_secret:
            return self._text(str(value), key, path, is_secret)
        return value

    def _is_secret(self, key: str) -> bool:
        return key not in self.known and bool(_SECRET.search(key)) and not _HARMLESS.search(key)

    def _text(self, value: str, key: str, path: tuple[str, ...], is_secret: bool) -> str:
        if not value:
            return value
        if is_secret:
            self.secrets.add(value)
        elif _PATH.search(key) or key in SHOWN:
            return value
        elif key in ADDRESSES:
            shown, inside = without_credentials(value)
            self.secrets |= inside
            if shown != value:
                self.left_out.add(".".join(path))
            return shown
        self.left_out.add(".".join(path))
        return REDACTED


def without_credentials(address: str) -> tuple[str, set[str]]:
    """Return an address without password, query and fragment, and the secrets that were in it.

    A user name without a password is removed too, because some services accept a token as the user name. In addresses
    of PostgreSQL, which accepts no token, the user name stays. A text that cannot be parsed as an address is redacted
    as a whole.
    """
    try:
        parts = urlsplit(address)
        password, user = parts.password, parts.username
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return REDACTED, {address}
    secrets: set[str] = set()
    if parts.query:
        secrets |= {value for _, value in parse_qsl(parts.query)} | {parts.query}
    if parts.fragment:
        secrets.add(parts.fragment)
    netloc = host
    if "@" in parts.netloc:
        keeps_user = bool(password) or parts.scheme.startswith("postgresql")
        secrets |= {text for text in (password, None if keeps_user else user) if text}
        netloc = (f"{user}:{REDACTED}@" if password else f"{user}@" if keeps_user else f"{REDACTED}@") + host
    secrets |= {unquote(text) for text in secrets}
    query, fragment = (REDACTED if text else "" for text in (parts.query, parts.fragment))
    return urlunsplit((parts.scheme, netloc, parts.path, query, fragment)), secrets


def secrets_in_file(text: str) -> set[str]:
    """Return the secrets in a secret file: its lines, and the values of lines of the form `name: value`."""
    found = {text.strip()}
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("-----"):
            continue
        found |= {line, line.partition(":")[2].strip()}
    return {secret for secret in found if len(secret) >= MIN_SECRET}


class Redactor:
    """Replaces secrets and, with a `salt`, names of tenants in texts and documents.

    `secrets`: texts that must not be in the bundle. `names`: names of tenants. `salt`: key for the hashes of the names,
    different for each bundle; None keeps the names.
    """

    def __init__(self, secrets: Iterable[str], salt: bytes | None = None, names: Iterable[str] = ()) -> None:
        self._secrets = frozenset(secret for secret in secrets if _is_searched(secret))
        variants = {form for secret in self._secrets for form in variants_of(secret)}
        self._known = _any_of(variants)
        self._hashes = {} if salt is None else {name: hashed(name, salt) for name in names if name}
        self._names = _any_of(self._hashes, r"(?<![A-Za-z0-9._-])", r"(?![A-Za-z0-9_-])")
        self.replaced = 0
        """Number of places where a secret was replaced."""

    def text(self, text: str) -> str:
        """Return a text in which secrets and, with a `salt`, names of tenants are replaced."""
        if self._known is not None:
            text, number = self._known.subn(REDACTED, text)
            self.replaced += number
        for form in _FORMS:
            text, number = form.subn(rf"\1{REDACTED}\2", text)
            self.replaced += number
        text = _URL.sub(self._without_user, text)
        if self._names is not None:
            text = self._names.sub(lambda match: self._hashes[match[0]], text)
        return text

    def document(self, value: Any) -> Any:
        """Return a JSON document in which every text, also each key, is redacted."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.document(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.document(item) for item in value]
        if isinstance(value, int | float) and not isinstance(value, bool) and repr(value) in self._secrets:
            self.replaced += 1
            return REDACTED
        return value

    def _without_user(self, match: re.Match[str]) -> str:
        user, colon, _ = match[2].partition(":")
        if not colon or user == REDACTED:
            return match[0]
        self.replaced += 1
        return f"{match[1]}{user}:{REDACTED}@"

    def is_clean(self, data: str) -> bool:
        """Return whether a redacted part is free of secrets, in all forms that `variants_of` returns."""
        return self._known is None or self._known.search(data) is None


def _is_searched(secret: str) -> bool:
    """Return whether texts are searched for this secret. Short texts and short numbers are not searched for: they would
    be found in many places that contain no secret."""
    return len(secret) >= (8 if secret.isdecimal() else MIN_SECRET) and secret not in REDACTED


def variants_of(secret: str) -> set[str]:
    """Return the forms that a secret may have in a text: unchanged, quoted for a URL or for JSON, in base64."""
    encoded = base64.b64encode(secret.encode("utf-8", "surrogatepass")).decode()
    forms = {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], encoded}
    if not any("\ud800" <= char <= "\udfff" for char in secret):
        forms |= {quote(secret, safe=""), quote_plus(secret), quote(secret)}
    return {form for form in forms if len(form) >= MIN_SECRET}


def hashed(name: str, salt: bytes) -> str:
    """Return the text that replaces a tenant's name in a bundle with hashed names."""
    return f"tenant-{hmac.new(salt, name.encode(), hashlib.sha256).hexdigest()[:12]}"


def _any_of(texts: Collection[str], before: str = "", after: str = "") -> re.Pattern[str] | None:
    """Return a regular expression that matches any of the texts, the longest first. Returns None if there are no texts.

    `before`, `after`: regular expressions that must match before and after the text.
    """
    if not texts:
        return None
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile(f"{before}(?:{'|'.join(map(re.escape, longest_first))}){after}")


def tenant_names(value: Any) -> set[str]:
    """Return the names of tenants in a document: below `tenant` and `tenants`, and in names like `tenants/acme`."""
    found: set[str] = set()
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key == "tenant" and isinstance(item, str):
                found.add(item.removeprefix("tenants/"))
            elif key == "tenants" and isinstance(item, list | tuple):
                found |= {str(each) for each in item if isinstance(each, str)}
                found |= {
                    str(each[field])
                    for each in item
                    if isinstance(each, Mapping)
                    for field in ("id", "name")
                    if isinstance(each.get(field), str)
                }
            found |= tenant_names(item)
    elif isinstance(value, list | tuple):
        for item in value:
            found |= tenant_names(item)
    return {name for name in found if name}


def tenant_labels(metrics: str) -> set[str]:
    """Return the names of tenants in the labels of a metrics page."""
    return {name for name in re.findall(r'[{,]tenant="((?:[^"\\]|\\.)*)"', metrics) if name}
