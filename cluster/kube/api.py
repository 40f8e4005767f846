"""Kubernetes Leases, read and written from within a pod, through the API server. Each request reads the token of the
pod's service account from its file, because Kubernetes renews the token.
"""

from __future__ import annotations

import datetime
import http.client
import json
import os
import ssl
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.kube.lease import LeaseRecord

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
CALL_S = 3.0
"""Time limit of an API call in seconds. The limit is well below LeaseTerms.yield_s, so that a call that hangs fails
before the holder's term ends."""


class ApiUnavailable(Exception):
    """Error: the Kubernetes API did not answer, or answered with an error. The message contains that error."""


class Conflict(Exception):
    """Error: another process has written the record since this process read it."""


class LeaseStore(Protocol):
    """Storage of the lease record. Both methods block, and raise ApiUnavailable if the API fails."""

    def read(self) -> LeaseRecord | None:
        """Return the record; None if the store has none."""

    def write(self, holder: str, over: LeaseRecord | None) -> LeaseRecord:
        """Replace the stored record with a record of `holder` ("" for no holder). Returns the new record.

        `over`: the record to replace, as the caller last read it; None to create the first record. Raises Conflict if
        the stored record has changed since that read."""


@dataclass(frozen=True, slots=True)
class KubeLease:
    """A LeaseStore that keeps the record in a coordination.k8s.io/v1 Lease. `lease_s` (seconds) is written only for
    tools that show the Lease."""

    url: str
    namespace: str
    name: str
    lease_s: float
    token_file: Path
    ca_file: Path | None = None

    @classmethod
    def of_this_pod(cls, name: str, lease_s: float, account: Path = ACCOUNT) -> KubeLease:
        """Create a store for the Lease `name` in this pod's namespace. Raises ValueError outside a pod."""
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        try:
            namespace = (account / "namespace").read_text().strip()
        except OSError as error:
            raise ValueError(f"a Lease needs a pod with a service account's token: {error}") from None
        if not host:
            raise ValueError("a Lease needs a pod: KUBERNETES_SERVICE_HOST is not set")
        host = f"[{host}]" if ":" in host else host
        return cls(f"https://{host}:{port}", namespace, name, lease_s, account / "token", account / "ca.crt")

    def read(self) -> LeaseRecord | None:
        """Return the Lease's record; None if there is no Lease. Raises ApiUnavailable."""
        status, answer = self._call("GET", self._path())
        if status == http.client.NOT_FOUND:
            return None
        if status != http.client.OK:
            raise ApiUnavailable(_error_text(status, answer))
        return _record(answer)

    def write(self, holder: str, over: LeaseRecord | None) -> LeaseRecord:
        """Write a record of `holder` ("" for no holder) into the Lease and return it. `over`: the record to replace, as
        the caller last read it; None to create the Lease. Raises Conflict if the record has changed since, and
        ApiUnavailable."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        changed = over is None or over.holder != holder
        transitions = 0 if over is None else over.transitions + (1 if changed and holder else 0)
        spec: dict[str, object] = {
            "holderIdentity": holder,
            "leaseDurationSeconds": max(round(self.lease_s), 1),
            "renewTime": now,
            "leaseTransitions": transitions,
        }
        metadata = {"name": self.name, "namespace": self.namespace}
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
        if over is None:
            status, answer = self._call("POST", self._path(named=False), body)
        else:
            metadata["resourceVersion"] = over.version
            status, answer = self._call("PUT", self._path(), body)
        if status in (http.client.CONFLICT, http.client.NOT_FOUND):
            raise Conflict(_error_text(status, answer))
        if status not in (http.client.OK, http.client.CREATED):
            raise ApiUnavailable(_error_text(status, answer))
        return _record(answer)

    def _path(self, *, named: bool = True) -> str:
        folder = f"/apis/coordination.k8s.io/v1/namespaces/{self.namespace}/leases"
        return f"{folder}/{self.name}" if named else folder

    def _call(self, method: str, path: str, body: Mapping[str, object] | None = None) -> tuple[int, Any]:
        parts = urllib.parse.urlsplit(self.url)
        try:
            headers = {
                "authorization": f"Bearer {self.token_file.read_text().strip()}",
                "content-type": "application/json",
            }
            connection = self._connection(parts)
            try:
                connection.request(method, path, None if body is None else json.dumps(body), headers)
                answer = connection.getresponse()
                return answer.status, json.loads(answer.read() or b"{}")
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ApiUnavailable(f"{self.url}: {error}") from None

    def _connection(self, parts: urllib.parse.SplitResult) -> http.client.HTTPConnection:
        host, port = parts.hostname or "", parts.port
        if parts.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=CALL_S)
        context = ssl.create_default_context(cafile=str(self.ca_file) if self.ca_file else None)
        return http.client.HTTPSConnection(host, port, timeout=CALL_S, context=context)


def _record(lease: Any) -> LeaseRecord:
    try:
        spec = lease.get("spec") or {}
        return LeaseRecord(
            holder=str(spec.get("holderIdentity") or ""),
            version=str(lease["metadata"]["resourceVersion"]),
            transitions=int(spec.get("leaseTransitions") or 0),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ApiUnavailable("the API's answer is not a Lease") from None


def _error_text(status: int, answer: Any) -> str:
    message = answer.get("message", "") if isinstance(answer, dict) else ""
    return f"{status} {message}".strip()
