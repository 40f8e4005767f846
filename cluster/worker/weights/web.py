"""A model's folder on a web server, read with bounded memory and time.

Problem: an allowed server may be hostile, taken over, or replaced in the middle of a download. Invariants: a redirect
is followed only to an allowed address; a body is read in pieces and never beyond the announced size; a download is
continued only if the server confirms the range and the version; a transfer without progress ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cluster.policy.catalog.allowed_sources import is_allowed_source

READ_BYTES: Final = 1 << 20
MAX_REDIRECTS: Final = 5
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_ABSENT: Final = (403, 404, 410)
"""Statuses of a file that does not exist. Object stores answer 403 if the caller may not list the folder."""
_NO_HEAD: Final = (403, 405, 501)
"""Statuses with which a server may refuse the method HEAD."""


class FetchError(ValueError):
    """An error for a model that cannot be fetched. The message has the reason and the remedy."""


@dataclass(frozen=True, slots=True)
class Pace:
    """The slowest transfer that is not ended: `least_bytes` in each `window_s` seconds, and `head_s` seconds until the
    head of an answer is there."""

    window_s: float = 20.0
    least_bytes: int = 64 << 10
    head_s: float = 30.0


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a source. `version`: what the source reports of the content, such as an ETag; "" for nothing."""

    path: str
    size: int
    version: str


class WebFolder:
    """A folder on a web server. Use it as a context manager, in a thread without an event loop."""

    def __init__(self, address: str, allowed_sources: Sequence[str], pace: Pace) -> None:
        """`allowed_sources`: patterns of the addresses to which a redirect may lead (`weights.allow.sources`)."""
        import aiohttp
        from yarl import URL

        self._aiohttp: Any = aiohttp
        self._origin = URL(address).origin()
        self._address, self._allowed, self._pace = address, allowed_sources, pace
        self._runner = asyncio.Runner()
        self._session: Any = None

    def __enter__(self) -> WebFolder:
        self._session = self._runner.run(self._connect())
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._session.close())
        self._runner.close()

    async def _connect(self) -> Any:
        return self._aiohttp.ClientSession(
            timeout=self._aiohttp.ClientTimeout(total=None),
            headers={"Accept-Encoding": "identity"},
            cookie_jar=self._aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    def list(self, names: Iterable[str]) -> dict[str, RemoteFile]:
        """Return those of the files `names` that exist. Raises FetchError."""
        found = {name: self._runner.run(self._stat(name)) for name in names}
        return {name: file for name, file in found.items() if file is not None}

    def read(self, name: str, most: int) -> bytes | None:
        """Return the content of a file of at most `most` bytes; None if the file does not exist. Raises FetchError."""
        return self._runner.run(self._read(name, most))

    def copy(self, name: str, file: RemoteFile, part: Path, report: Callable[[int], None]) -> None:
        """Fetch the bytes of a file that are not in `part` yet. Raises FetchError, or another error if a new attempt
        may succeed."""
        self._runner.run(self._copy(name, file, part, part.stat().st_size if part.exists() else 0, report))

    @asynccontextmanager
    async def _open(self, method: str, name: str, headers: Mapping[str, str] | None = None) -> AsyncIterator[Any]:
        """Yield the answer to a request, after allowed redirects."""
        from yarl import URL

        url = URL(f"{self._address}/{name}")
        for _ in range(MAX_REDIRECTS + 1):
            try:
                async with asyncio.timeout(self._pace.head_s):
                    response = await self._session.request(method, url, headers=headers, allow_redirects=False)
            except TimeoutError:
                raise FetchError(f"{name}: the server does not answer within {self._pace.head_s:g} s") from None
            try:
                if response.status not in _REDIRECTS:
                    if response.headers.get("Content-Encoding", "identity") != "identity":
                        raise FetchError(f"{name}: the server sends it compressed; serve the file as it is")
                    yield response
                    return
                url = self._redirected(name, url, response.headers.get("Location", ""))
            finally:
                response.close()
        raise FetchError(f"{name}: more than {MAX_REDIRECTS} redirects")

    def _redirected(self, name: str, url: Any, location: str) -> Any:
        """Return the address to which a redirect leads. Raises FetchError if it is not allowed.

        The pattern `*` allows all sources that an operator may name, not the addresses that a server names.
        """
        from yarl import URL

        try:
            to = url.join(URL(location))
            same, shown = to.origin() == self._origin, str(to)[:200]
        except ValueError:  # no http, or no address at all
            raise FetchError(f"{name}: redirected to {location[:200]!r}, which is no http or https address") from None
        patterns = self._allowed if same else [pattern for pattern in self._allowed if pattern.strip("*")]
        if to.scheme not in ("http", "https") or (url.scheme == "https" and to.scheme == "http"):
            raise FetchError(
                f"{name}: redirected to {shown}; only redirects to https, or from http to http, are followed"
            )
        if not is_allowed_source(str(to), patterns):
            raise FetchError(
                f"{name}: redirected to {shown}, which weights.allow.sources does not allow; name that address as the "
                "source, or add a pattern for it (`*` allows no redirect to another server)"
            )
        return to

    async def _stat(self, name: str) -> RemoteFile | None:
        for method in ("HEAD", "GET"):
            async with self._open(method, name) as response:
                if method == "HEAD" and (response.status in _NO_HEAD or response.content_length is None):
                    continue
                if response.status in _ABSENT:
                    return None
                _require_ok(name, response.status, 200)
                if response.content_length is None:
                    raise FetchError(f"the server does not report the size of {name}")
                return RemoteFile(name, response.content_length, _version(response.headers))
        raise AssertionError("GET ends the loop")

    async def _read(self, name: str, most: int) -> bytes | None:
        async with self._open("GET", name) as response:
            if response.status in _ABSENT:
                return None
            _require_ok(name, response.status, 200)
            content = b"".join([piece async for piece in self._pieces(name, response, most + 1)])
        if len(content) > most:
            raise FetchError(f"{name} has more than {most} bytes")
        return content

    async def _copy(self, name: str, file: RemoteFile, part: Path, fetched: int, report: Callable[[int], None]) -> None:
        headers = {"Range": f"bytes={fetched}-{file.size - 1}"} if fetched else None
        async with self._open("GET", name, headers) as response:
            if response.status == 200:
                fetched = 0  # the server sends the whole file, whether or not it supports ranges
            else:
                _require_ok(name, response.status, 206)
                wanted = f"bytes {fetched}-{file.size - 1}/{file.size}"
                if not fetched or response.headers.get("Content-Range") != wanted:
                    raise FetchError(f"{name}: the server sends another range than {wanted}; {_CHANGED}")
            if file.version != _version(response.headers) or response.content_length not in (None, file.size - fetched):
                raise FetchError(f"{name} {_CHANGED}")
            with part.open("r+b" if fetched else "wb") as out:
                out.seek(fetched)
                async for piece in self._pieces(name, response, file.size - fetched + 1):
                    if fetched + len(piece) > file.size:
                        raise FetchError(f"{name}: the server sends more than the {file.size} bytes that it reported")
                    out.write(piece)
                    fetched += len(piece)
                    report(fetched)
        if fetched < file.size:
            raise OSError(f"it ended after {fetched} of {file.size} bytes")

    async def _pieces(self, name: str, response: Any, most: int) -> AsyncIterator[bytes]:
        """Yield at most `most` bytes of a body in pieces. Raises FetchError if the transfer is slower than the pace."""
        clock, pace = asyncio.get_running_loop().time, self._pace
        since, in_window = clock(), 0
        while most > 0:
            try:
                async with asyncio.timeout_at(since + pace.window_s):
                    piece = await response.content.read(min(most, READ_BYTES))
            except TimeoutError:
                if in_window < pace.least_bytes:
                    raise FetchError(
                        f"{name}: the server sent {in_window} bytes in {pace.window_s:g} s, at least "
                        f"{pace.least_bytes} are required"
                    ) from None
                since, in_window = clock(), 0
                continue
            if not piece:
                return
            yield piece
            most -= len(piece)
            in_window += len(piece)
            if in_window >= pace.least_bytes:
                since, in_window = clock(), 0


_CHANGED: Final = "has changed since it was listed; try again when its upload is complete"


def _require_ok(name: str, status: int, expected: int) -> None:
    """Raise an error if an answer has another status than expected: OSError if a new attempt may succeed."""
    if status >= 500 or status in (408, 429):
        raise OSError(f"the server answers {status} for {name}")
    if status != expected:
        raise FetchError(f"{name}: the server answers {status} where {expected} is expected")


def _version(headers: Mapping[str, str]) -> str:
    """Return what identifies the content of a file. A weak ETag does not stand for equal bytes."""
    tag = headers.get("ETag", "")
    return headers.get("Last-Modified", "") if tag.startswith("W/") or not tag else tag
