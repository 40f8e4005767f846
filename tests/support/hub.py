"""A Hugging Face hub on loopback, with one repository."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" * 6 + "c0ff"


@dataclass
class Hub:
    """A running stand-in for the Hugging Face hub. `fetched`: the files whose content was requested."""

    url: str = ""
    fetched: list[str] = field(default_factory=list)


@contextmanager
def running_hub(name: str, folder: Path, sizes: Mapping[str, int] | None = None) -> Iterator[Hub]:
    """Serve the files of a folder as the repository `name`.

    `sizes`: file sizes to report in place of the real sizes.
    """
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{name}/revision/"):
                self.reply(json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode(), with_body)
            elif path.startswith(f"/api/models/{name}/tree/"):
                sized = {file.name: file.stat().st_size for file in folder.iterdir()} | dict(sizes or {})
                files = [{"type": "file", "path": n, "size": size, "oid": n} for n, size in sized.items()]
                self.reply(json.dumps(files).encode(), with_body)
            elif path.startswith(f"/{name}/resolve/") and (file := folder / path.rsplit("/", 1)[1]).is_file():
                if with_body:
                    hub.fetched.append(file.name)
                self.reply(file.read_bytes(), with_body, file.name)
            else:
                self.send_error(404)

        def reply(self, content: bytes, with_body: bool, tag: str = "") -> None:
            self.send_response(200)
            self.send_header("content-length", str((sizes or {}).get(tag, len(content))))
            if tag:
                self.send_header("etag", f'"{tag}"')
                self.send_header("x-repo-commit", COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
