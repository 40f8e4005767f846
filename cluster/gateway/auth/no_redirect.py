"""HTTP requests to addresses that an operator has configured. Redirects are refused."""

from __future__ import annotations

import urllib.request
from typing import Any


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Handler that refuses redirects, because a redirect could lead from an operator's https URL to any host."""

    def redirect_request(self, *_arguments: Any, **_options: Any) -> None:
        """Refuse the redirect: no new request is made."""
        return


def open_no_redirect(request: urllib.request.Request | str, timeout_s: float) -> Any:
    """Send a request and return the response as a context manager. Blocks until the response arrives.

    Raises OSError or HTTPException. A redirect raises HTTPError, which is an OSError."""
    return urllib.request.build_opener(_NoRedirects).open(request, timeout=timeout_s)
