"""Sources of the parts of a support bundle: files, a gateway's admin port, and pages of metrics."""

from __future__ import annotations

import http.client
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, get_args

import grpc
import psutil
from pydantic import BaseModel

from cluster.admin.v1 import routing_pb2, scaling_pb2
from cluster.cli.commands.version import versions
from cluster.cli.support.parts import MAX_PART_BYTES, LeftOut, Parts, event_lines
from cluster.cli.support.redaction import Rules, secrets_in_file
from cluster.cli.target.access import Access
from cluster.cli.target.admin_client import Admin, plain
from cluster.client.errors import from_rpc
from cluster.config.document import ConfigError, load
from cluster.config.schema import Config
from cluster.config.yaml_reader import NotYaml
from cluster.config.yaml_reader import load as load_yaml
from cluster.observe.events import EVENTS

T = TypeVar("T")
MAX_CONFIG_BYTES = 4 << 20
MAX_SECRET_BYTES = 64 << 10
MAX_CALLS = 50
"""Maximum number of recent calls whose routing decisions are collected."""
LAST_DECISIONS = 20
MAX_LINES = 5000
TAIL_BYTES = 4 << 20
REQUEST_S = 10.0
PAGE_S = 5.0
_SECRET_FILES = ("secret", "pepper", "token", "header", "key", "password")


def known_keys(kind: type[BaseModel] = Config, seen: set[type[BaseModel]] | None = None) -> frozenset[str]:
    """Return all keys of a configuration section and of the sections below it."""
    seen = set() if seen is None else seen
    if kind in seen:
        return frozenset()
    seen.add(kind)
    keys = {field.alias or name for name, field in kind.model_fields.items()}
    for field in kind.model_fields.values():
        for inner in _models_in(field.annotation):
            keys |= known_keys(inner, seen)
    return frozenset(keys)


def _models_in(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def read_file(file: Path, most_bytes: int) -> str:
    """Return the text of a regular file that is not too large. Raises LeftOut."""
    try:
        with file.open("rb") as opened:
            if not file.is_file():
                raise LeftOut(f"{file} is no regular file")
            data = opened.read(most_bytes + 1)
    except OSError as error:
        raise LeftOut(f"{file} cannot be read: {error.strerror}") from None
    if len(data) > most_bytes:
        raise LeftOut(f"{file} has more than {most_bytes >> 10} KiB")
    return data.decode("utf-8", "replace")


def configuration(file: Path, rules: Rules) -> Any:
    """Return the harmless values of a configuration file or of the chart's values. Raises LeftOut.

    Adds the secrets in the file, and the secrets in the secret files that the file names, to `rules.secrets`.
    """
    text = read_file(file, MAX_CONFIG_BYTES)
    try:
        data = load_yaml(text)
    except NotYaml:
        raise LeftOut(f"{file} is no YAML") from None  # the error may quote a line
    rules.secrets |= {secret for path in _secret_files(data) for secret in _secrets_of(path)}
    return rules.apply(data)


def _secret_files(value: Any) -> Iterable[Path]:
    """Yield the paths of the secret files that a document names."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            is_file = isinstance(item, str) and str(key).endswith("_file")
            if is_file and any(word in str(key) for word in _SECRET_FILES):
                yield Path(item)
            else:
                yield from _secret_files(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _secret_files(item)


def _secrets_of(file: Path) -> set[str]:
    """Return the secrets in a file. The result is empty if the file cannot be read or is too large for a secret file.

    A file that this user cannot read needs no redaction, because the bundle cannot contain the file's secrets.
    """
    try:
        return secrets_in_file(read_file(file, MAX_SECRET_BYTES))
    except (LeftOut, ValueError):
        return set()


def problems(file: Path) -> Any:
    """Return the errors of a configuration file. The messages may quote secrets, which the redactor replaces."""
    try:
        load(file)
    except ConfigError as error:
        return {"is_valid": False, "problems": str(error).splitlines()[:200]}
    return {"is_valid": True, "problems": []}


def machine() -> dict[str, Any]:
    """Return the versions of Headrace and of the installed packages, and this machine's platform, CPUs and memory."""
    packages = {str(each.metadata["Name"]): each.version for each in metadata.distributions() if each.metadata["Name"]}
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "time_s": round(time.time(), 3),
        "packages": dict(sorted(packages.items(), key=lambda pair: pair[0].lower())),
    }


class GatewaySource:
    """The parts of a support bundle that come from a gateway's admin port. A method raises LeftOut if its part cannot
    be read."""

    def __init__(self, api: Admin, access: Access, parts: Parts) -> None:
        self._api = api
        self._access = access
        self._parts = parts

    def _ask(self, question: Callable[[], T]) -> T:
        self._parts.seconds_left(REQUEST_S)
        try:
            return question()
        except grpc.RpcError as error:
            refusal = from_rpc(error, endpoint=self._access.address)
            raise LeftOut(f"{self._access.address}: {refusal.reason}: {refusal.message}") from None
        except ValueError as error:
            raise LeftOut(f"{self._access.address}: {error}") from None

    def catalog(self) -> Any:
        """Return the models, and the age of the controller's last message."""
        entries, age_s = self._ask(self._api.catalog)
        return {"age_s": age_s, "models": [plain(entry) for entry in entries]}

    def workers(self) -> Any:
        """Return the workers that are linked to the gateway."""
        return [plain(worker) for worker in self._ask(self._api.workers)]

    def overview(self) -> Any:
        """Return the overview with its calls."""
        return self._ask(self._api.overview)

    def scaling(self, models: Sequence[str]) -> Any:
        """Return the last scaling decisions of the models."""
        found = {}
        for model in models:
            request = scaling_pb2.ExplainScalingRequest(name=model, limit=LAST_DECISIONS)
            found[model] = plain(self._ask(partial(self._api.fleet, "ExplainScaling", request)))
        return found

    def routing(self, calls: Sequence[str]) -> Any:
        """Return the routing decisions of recent calls. The decisions contain no text of a prompt or an answer."""
        found = []
        for call in calls[:MAX_CALLS]:
            request = routing_pb2.ExplainRequestRequest(request_id=call)
            try:
                answer = self._ask(partial(self._api.fleet, "ExplainRequest", request))
            except LeftOut:
                continue  # the gateway no longer remembers it
            found += [plain(each) for each in answer.calls]
        return found


def metrics_page(address: str, timeout_s: float) -> str:
    """Return the metrics page of a process. Raises LeftOut."""
    host, _, port = address.rpartition(":")
    if host in ("0.0.0.0", "[::]", ""):  # noqa: S104 - compared, not bound
        host = "127.0.0.1"
    try:
        connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=timeout_s)
    except ValueError:
        raise LeftOut(f"{address} is no host:port") from None
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        data, end = b"", time.monotonic() + timeout_s
        while (piece := answer.read1(1 << 16)) and len(data) <= MAX_PART_BYTES and time.monotonic() < end:
            data += piece
    except (OSError, http.client.HTTPException) as error:
        raise LeftOut(f"{address} does not answer: {error}") from None
    finally:
        connection.close()
    if answer.status != http.client.OK:
        raise LeftOut(f"{address} answers with status {answer.status}")
    return data.decode("utf-8", "replace")


def events(file: Path, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return the newest events in a log file. For each kind of lines that are left out, `note` is called with a
    message. Raises LeftOut if the file cannot be read or has no events."""
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(size - TAIL_BYTES, 0))
            lines = opened.read(TAIL_BYTES).decode("utf-8", "replace").splitlines()
    except OSError as error:
        raise LeftOut(f"{file} cannot be read: {error.strerror}") from None
    found, others = event_lines(lines, EVENTS, MAX_LINES)
    if size > TAIL_BYTES:
        note(f"of {size} bytes only the last {TAIL_BYTES} were read")
    if others:
        note(f"{others} lines that are no events of Headrace")
    if not found:
        raise LeftOut(f"{file} has no events of Headrace")
    return found
