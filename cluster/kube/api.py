"""Leases over the Kubernetes API, as a pod reaches it: its own service account's token, read anew for each call."""

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
"""Less than the time between a holder's last write and its end, so that a hanging call is noticed before."""


class ApiAway(Exception):
    """The API did not answer, or not as it should; the message says what it said."""


class Conflict(Exception):
    """The record has changed since it was read: somebody else was faster."""


class LeaseStore(Protocol):
    """Where the record lies. Both calls block; both raise ApiAway."""

    def read(self) -> LeaseRecord | None:
        """The record, None while there is none."""

    def write(self, holder: str, over: LeaseRecord | None) -> LeaseRecord:
        """Make `holder` its holder ("" for nobody), if it still is `over`. Raises Conflict."""


@dataclass(frozen=True, slots=True)
class KubeLease:
    """A coordination.k8s.io/v1 Lease. `lease_s` is written down for those who look at it."""

    url: str
    namespace: str
    name: str
    lease_s: float
    token_file: Path
    ca_file: Path | None = None

    @classmethod
    def of_this_pod(cls, name: str, lease_s: float, account: Path = ACCOUNT) -> KubeLease:
        """By what every pod is given. Raises ValueError outside one."""
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
        """See LeaseStore."""
        status, found = self._call("GET", self._path())
        if status == http.client.NOT_FOUND:
            return None
        if status != http.client.OK:
            raise ApiAway(_said(status, found))
        return _record(found)

    def write(self, holder: str, over: LeaseRecord | None) -> LeaseRecord:
        """See LeaseStore."""
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
            status, found = self._call("POST", self._path(whole=False), body)
        else:
            metadata["resourceVersion"] = over.version
            status, found = self._call("PUT", self._path(), body)
        if status in (http.client.CONFLICT, http.client.NOT_FOUND):
            raise Conflict(_said(status, found))
        if status not in (http.client.OK, http.client.CREATED):
            raise ApiAway(_said(status, found))
        return _record(found)

    def _path(self, *, whole: bool = True) -> str:
        folder = f"/apis/coordination.k8s.io/v1/namespaces/{self.namespace}/leases"
        return f"{folder}/{self.name}" if whole else folder

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
            raise ApiAway(f"{self.url}: {error}") from None

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
        raise ApiAway("the API answered with something that is no Lease") from None


def _said(status: int, answer: Any) -> str:
    message = answer.get("message", "") if isinstance(answer, dict) else ""
    return f"{status} {message}".strip()
