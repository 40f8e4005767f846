"""A Kubernetes API with Leases only, over real HTTP(S), with versions, conflicts, and a switch that
turns the API off.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cluster.kube.api import KubeLease

TOKEN = "token of a service account"


class FakeApi:
    """Fake of the Kubernetes API.

    `leases`: Leases by name; `away`: if true, every call is answered with 503; `seen`: (method, path) of each call.
    """

    def __init__(self, folder: Path) -> None:
        self.leases: dict[str, dict[str, Any]] = {}
        self.away = False
        self.seen: list[tuple[str, str]] = []
        self.url = ""
        self._version = 0
        self._lock = threading.Lock()
        self._token_file = folder / "token"
        self._token_file.write_text(TOKEN + "\n")

    def lease(self, name: str = "headrace-controller", lease_s: float = 15.0) -> KubeLease:
        """Return a client for one Lease of this API."""
        return KubeLease(self.url, "ns", name, lease_s, self._token_file)

    def answer(self, method: str, path: str, token: str, body: Any) -> tuple[int, dict[str, Any]]:
        """Handle one call; return the status and the answer."""
        with self._lock:
            self.seen.append((method, path))
            folder = "/apis/coordination.k8s.io/v1/namespaces/ns/leases"
            if self.away:
                return 503, {"message": "the server is currently unable to handle the request"}
            if token != f"Bearer {TOKEN}":
                return 401, {"message": "Unauthorized"}
            name = path.removeprefix(f"{folder}/")
            if method == "POST" and path == folder:
                return self._made(body)
            if path == name or name not in self.leases:
                return 404, {"message": f"leases {name!r} not found"}
            if method == "GET":
                return 200, self.leases[name]
            return self._replaced(name, body)

    def _made(self, body: Any) -> tuple[int, dict[str, Any]]:
        name = body["metadata"]["name"]
        if name in self.leases:
            return 409, {"message": f"leases {name!r} already exists"}
        return 201, self._store(name, body)

    def _replaced(self, name: str, body: Any) -> tuple[int, dict[str, Any]]:
        if body["metadata"].get("resourceVersion") != self.leases[name]["metadata"]["resourceVersion"]:
            return 409, {"message": "the object has been modified; please apply your changes to the latest version"}
        return 200, self._store(name, body)

    def _store(self, name: str, body: Any) -> dict[str, Any]:
        self._version += 1
        body["metadata"]["resourceVersion"] = str(self._version)
        self.leases[name] = body
        return self.leases[name]


@contextlib.contextmanager
def kube_api(folder: Path, tls: ssl.SSLContext | None = None) -> Iterator[FakeApi]:
    """Run the fake API. The service account's token is written to `folder`."""
    api = FakeApi(folder)

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            token = self.headers.get("authorization", "")
            status, answer = api.answer(self.command, self.path, token, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _do

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    api.url = f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
