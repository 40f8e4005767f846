"""Program that serves a Kubernetes API with Leases only. `python -m loadtests.hosts.inside.kube_api FOLDER`.

FOLDER holds tls.crt, tls.key and token. The token belongs to the service account that may write Leases.
"""

from __future__ import annotations

import json
import ssl
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PORT = 6443


class Leases:
    """The Lease objects of a fake Kubernetes API, by path. As in the real API, each write gives an object a new
    resource version, and an update from an older version is refused."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._leases: dict[str, dict[str, Any]] = {}
        self._version = 0
        self._lock = threading.Lock()

    def answer(self, method: str, path: str, token: str, body: Any) -> tuple[int, dict[str, Any]]:
        """Handle one request; return the status and the answer."""
        with self._lock:
            if token != f"Bearer {self._token}":
                return 401, {"message": "Unauthorized"}
            if method == "POST":
                path = f"{path}/{body['metadata']['name']}"
                if path in self._leases:
                    return 409, {"message": "it already exists"}
                return 201, self._store(path, body)
            if path not in self._leases:
                return 404, {"message": "not found"}
            if method == "GET":
                return 200, self._leases[path]
            if body["metadata"].get("resourceVersion") != self._leases[path]["metadata"]["resourceVersion"]:
                return 409, {"message": "the object has been modified"}
            return 200, self._store(path, body)

    def _store(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self._version += 1
        body["metadata"]["resourceVersion"] = str(self._version)
        self._leases[path] = body
        return body


def main(folder: Path) -> None:
    """Serve until killed."""
    leases = Leases((folder / "token").read_text().strip())

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, answer = leases.answer(self.command, self.path, self.headers.get("authorization", ""), body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _do

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("0.0.0.0", PORT), Handler)  # noqa: S104 - a namespace of its own
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
