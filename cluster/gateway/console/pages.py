"""The console's page and its static files, from the package's own folder `static`.

The files are read once, when the endpoints are made, and each file gets an endpoint of its own. So no request can reach
any other file.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cluster.gateway.apis.http.exchange import Application, Endpoint, Exchange
from cluster.gateway.console.errors import FORM

FOLDER: Final = Path(__file__).resolve().parent / "static"
STATIC: Final = "/console/static/"
INDEX: Final = "index.html"
CSP_REPORT: Final = "/console/csp-report"
CSP: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    f"report-uri {CSP_REPORT}"
)
HEADERS: Final = [
    (b"content-security-policy", CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=(), payment=(), usb=()"),
    (b"cache-control", b"no-cache"),
]
_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
    ".md": "text/plain; charset=utf-8",
    ".png": "image/png",
    ".ico": "image/x-icon",
}
_COMPRESSED: Final = (".html", ".js", ".mjs", ".css", ".svg", ".json", ".txt", ".md")
"""Suffixes of files that are sent compressed. These files hold nothing secret, so their compressed size reveals no
secret."""


@dataclass(slots=True)
class StaticFile:
    """A file of the page with its type and entity tag."""

    content: bytes
    kind: str
    is_text: bool
    etag: bytes = field(init=False)
    _zipped: bytes | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.etag = b'"%b"' % hashlib.sha256(self.content).hexdigest()[:32].encode()

    async def zipped(self) -> bytes:
        """Return the compressed content. It is made once, in a thread."""
        if self._zipped is None:
            self._zipped = await asyncio.to_thread(gzip.compress, self.content, 9, mtime=0)
        return self._zipped

    async def respond(self, exchange: Exchange) -> None:
        """Answer a request for the file. If the browser already has the file, answer 304."""
        headers = [*HEADERS, (b"etag", self.etag), (b"vary", b"accept-encoding")]
        if self.etag.decode() in exchange.header(b"if-none-match").split(", "):
            await exchange.start(304, headers)
            await exchange.send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        content = self.content
        if self.is_text and "gzip" in exchange.header(b"accept-encoding"):
            content = await self.zipped()
            headers.append((b"content-encoding", b"gzip"))
        headers += [(b"content-type", self.kind.encode()), (b"content-length", b"%d" % len(content))]
        await exchange.start(200, headers)
        await exchange.send({"type": "http.response.body", "body": content, "more_body": False})


def read_files(folder: Path = FOLDER) -> Mapping[str, StaticFile]:
    """Return the files of known types below a folder, by their path in the folder. Symbolic links are left out."""
    files = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.suffix in _TYPES and path.is_file() and not path.is_symlink():
            name = path.relative_to(folder).as_posix()
            files[name] = StaticFile(path.read_bytes(), _TYPES[path.suffix], path.suffix in _COMPRESSED)
    return files


def page_endpoints(files: Mapping[str, StaticFile]) -> Mapping[str, Application]:
    """Return the endpoints of the page and of each static file, by path."""
    endpoints: dict[str, Application] = {
        f"{STATIC}{name}": Endpoint(FORM, "GET", file.respond) for name, file in files.items()
    }
    if INDEX in files:
        endpoints["/"] = Endpoint(FORM, "GET", files[INDEX].respond)
    return endpoints
