"""With `secrets.create`, the chart makes its Secret at the first installation and keeps the Secret at later
upgrades.

Helm must be able to read from the cluster, to find the existing Secret.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import helm

pytestmark = pytest.mark.slow

KEYS = ("cluster", "key-pepper", "database-password", "auth_token")
DISCOVERY: Mapping[str, Any] = {
    "/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.0"},
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
    "/api/v1": {
        "kind": "APIResourceList",
        "groupVersion": "v1",
        "resources": [
            {"name": name, "namespaced": True, "kind": kind, "verbs": ["get", "list"]}
            for name, kind in (("secrets", "Secret"), ("serviceaccounts", "ServiceAccount"))
        ],
    },
}


@contextlib.contextmanager
def api_server(objects: Mapping[str, Any]) -> Iterator[str]:
    """Run a Kubernetes API server with these objects, and yield its URL.

    `objects`: each object by its path, `secrets/NAME` or `serviceaccounts/NAME`.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            answer = DISCOVERY.get(path) or objects.get(path.removeprefix(f"/api/v1/namespaces/{helm.NAMESPACE}/"))
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


ACCOUNT = {"serviceaccounts/default": {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}}


OWNED = {
    "name": "headrace-secrets",
    "labels": {"app.kubernetes.io/managed-by": "Helm"},
    "annotations": {"meta.helm.sh/release-name": "headrace", "meta.helm.sh/release-namespace": "headrace"},
}


def secret(*keys: str) -> dict[str, Any]:
    """Return the Secret of an earlier install of the release. `keys`: the keys of the Secret's data."""
    data = dict.fromkeys(keys, "b2xk")
    return {"secrets/headrace-secrets": {"apiVersion": "v1", "kind": "Secret", "metadata": OWNED, "data": data}}


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a copy of the chart that renders only the Secret.

    For other objects, the fake API server would have to know their kinds.
    """
    copy = tmp_path_factory.mktemp("charts") / "headrace"
    shutil.copytree(helm.CHART, copy)
    for file in (copy / "templates").iterdir():
        if file.name not in ("_helpers.tpl", "secrets.yaml"):
            file.unlink()
    return copy


def rendered(chart: Path, objects: Mapping[str, Any], *arguments: str) -> dict[str, Any]:
    """Return the Secret that the chart renders for a cluster with these objects. Raises HelmFailed."""
    with api_server(objects) as url:
        asked = ("--set", "secrets.create=true", "--dry-run=server", "--kube-apiserver", url, *arguments)
        text = helm.run("template", "headrace", chart, "-n", helm.NAMESPACE, "--disable-openapi-validation", *asked)
    (manifest,) = yaml.safe_load_all(text)
    assert manifest["metadata"]["name"] == "headrace-secrets"
    return dict(manifest)


def test_the_first_install_makes_the_secret(chart: Path) -> None:
    """The first install makes the Secret that all pods need. The Secret is immutable and outlives the release."""
    made = rendered(chart, ACCOUNT)
    assert made["immutable"] is True
    assert made["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert set(made["data"]) == set(KEYS)
    assert len(set(made["data"].values())) == len(KEYS)


@pytest.mark.parametrize("arguments", [(), ("--is-upgrade",)])
def test_what_is_there_is_kept(chart: Path, arguments: tuple[str, ...]) -> None:
    """An existing Secret is kept, since a new Secret would invalidate every API key."""
    made = rendered(chart, {**ACCOUNT, **secret(*KEYS)}, *arguments)
    assert made["data"] == dict.fromkeys(KEYS, "b2xk")


@pytest.mark.parametrize(
    ("objects", "arguments", "words"),
    [
        ({}, (), "the namespace headrace cannot be seen from here"),
        (ACCOUNT, ("--is-upgrade",), "the Secret headrace-secrets is gone"),
        ({**ACCOUNT, **secret("cluster")}, ("--is-upgrade",), "the Secret headrace-secrets has no key key-pepper"),
    ],
)
def test_no_second_pepper_is_made(
    chart: Path, objects: Mapping[str, Any], arguments: tuple[str, ...], words: str
) -> None:
    """The chart refuses to make a second key pepper, which would silently invalidate every API key."""
    with pytest.raises(helm.HelmFailed, match=words):
        rendered(chart, objects, *arguments)
