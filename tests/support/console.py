"""A fake browser for tests of the console. It keeps cookies and sends the CSRF token."""

from __future__ import annotations

import json
from typing import Any

from tests.support.cluster import TestCluster
from tests.support.http import Reply, Wire

HOST = "127.0.0.1:8000"


class Browser:
    """A browser with its cookies. Each request has a connection of its own."""

    def __init__(self, cluster: TestCluster, host: str = HOST) -> None:
        self._cluster = cluster
        self.host = host
        self.cookies: dict[str, str] = {}
        self.csrf = ""

    async def fetch(self, path: str, body: Any = None, *, method: str = "", **headers: str) -> Reply:
        """Send a request with the cookies, and with the CSRF token if there is a body.

        `headers`: further headers, which may replace the cookies and the token.
        """
        own = {"host": self.host}
        if self.cookies:
            own["cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        if body is not None or method == "POST":
            own |= {"x_csrf_token": self.csrf, "origin": f"http://{self.host}"}
        wire = await Wire.open(self._cluster)
        try:
            wire.ask(path, body, method=method, **{**own, **headers})
            reply = await wire.reply()
        finally:
            await wire.close()
        self._keep(reply)
        return reply

    def _keep(self, reply: Reply) -> None:
        for header in reply.headers.get("set-cookie", "").splitlines():
            pair, *attributes = header.split("; ")
            name, _, value = pair.partition("=")
            if "Max-Age=0" in attributes:
                self.cookies.pop(name, None)
            else:
                self.cookies[name] = value

    async def session(self) -> Any:
        """Return the console session, and keep its CSRF token."""
        found = (await self.fetch("/console/session")).json
        self.csrf = found["csrf"]
        return found

    async def sign_in(self, key: str) -> Reply:
        """Sign in with a key."""
        reply = await self.fetch("/console/sign-in", {"key": key})
        if reply.status == 204:
            await self.session()
        return reply

    async def admin(self, verb: str, **request: Any) -> Reply:
        """Send a request to the admin API of the console. `verb`: `Service.Method`."""
        return await self.fetch(f"/console/api/{verb}", request)

    async def code(self, verb: str, request: Any) -> str:
        """Send an admin request and return the code of the answer, such as `OK`. `request`: a protobuf message."""
        from google.protobuf import json_format

        body = json_format.MessageToDict(request, preserving_proto_field_name=True)
        reply = await self.fetch(f"/console/api/{verb}", body)
        if reply.status == 200:
            return "OK"
        return str(json.loads(reply.body)["error"]["code"])
