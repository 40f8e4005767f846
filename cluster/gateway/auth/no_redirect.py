"""Opens an address that an operator has given, and no other: redirects are refused."""

from __future__ import annotations

import urllib.request
from typing import Any


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect could lead from an operator's https to anywhere."""

    def redirect_request(self, *_arguments: Any, **_options: Any) -> None:
        """Follow none."""
        return


def open_straight(request: urllib.request.Request | str, timeout_s: float) -> Any:
    """The answer, for a with statement; blocking. Raises OSError (HTTPError for a redirect too), HTTPException."""
    return urllib.request.build_opener(_NoRedirects).open(request, timeout=timeout_s)
