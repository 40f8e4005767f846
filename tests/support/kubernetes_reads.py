"""A Kubernetes API server that only answers reads, for charts that look up objects."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support import helm

KINDS = {
    "v1": {"secrets": "Secret", "serviceaccounts": "ServiceAccount", "services": "Service"},
    "apps/v1": {"statefulsets": "StatefulSet", "deployments": "Deployment"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
}
"""The kinds that the server knows, by API version and path."""
ACCOUNT = {"serviceaccounts/default": {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}}
"""The object that every namespace has."""


def _discovery() -> dict[str, Any]:
    groups = [
        {"name": version.split("/")[0], "versions": [{"groupVersion": version, "version": "v1"}]}
        for version in KINDS
        if "/" in version
    ]
    return {
        "/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups},
    } | {
        f"{'/apis' if '/' in version else '/api'}/{version}": {
            "kind": "APIResourceList",
            "groupVersion": version,
            "resources": [
                {"name": name, "namespaced": True, "kind": kind, "verbs": ["get", "list"]}
                for name, kind in kinds.items()
            ],
        }
        for version, kinds in KINDS.items()
    }


@contextlib.contextmanager
def api_server(objects: Mapping[str, Any]) -> Iterator[str]:
    """Run a Kubernetes API server with these objects, and yield its URL.

    `objects`: each object by its path, for example `secrets/NAME`.
    """
    discovery = _discovery()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            answer = discovery.get(path) or objects.get(re.sub(f"^.*/namespaces/{helm.NAMESPACE}/", "", path))
            missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            data = json.dumps(answer or missing).encode()
            self.send_response(200 if answer else 404)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def chart_of(folder: Path, template: str) -> Path:
    """Copy the chart into a folder, with only one template that renders objects, since the server does not know the
    kinds of all objects. Returns the path of the copy."""
    copy = folder / "headrace"
    shutil.copytree(helm.CHART, copy)
    for file in (copy / "templates").iterdir():
        if file.name != template and not file.name.startswith("_"):
            file.unlink()
    return copy


def rendered(chart: Path, objects: Mapping[str, Any], *arguments: str) -> str:
    """Return what Helm renders for a cluster with these objects. Raises HelmFailed."""
    with api_server(objects) as url:
        asked = ("--dry-run=server", "--kube-apiserver", url, *arguments)
        return helm.run("template", "headrace", chart, "-n", helm.NAMESPACE, "--disable-openapi-validation", *asked)
