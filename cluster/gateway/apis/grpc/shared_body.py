"""The bytes of one message that starts several calls, as they count against the budget of request bytes."""

from __future__ import annotations

from collections.abc import Callable


class SharedBody:
    """The bytes of a message. They are returned to the budget when the reader of the message and all calls of the
    message have released their shares."""

    def __init__(self, release: Callable[[], None]) -> None:
        """`release`: returns the bytes to the budget. The reader has the first share."""
        self._release = release
        self._shares = 1

    def share(self) -> Callable[[], None]:
        """Add a share for a call. Returns the function that releases it, which is idempotent."""
        self._shares += 1
        released = False

        def release() -> None:
            nonlocal released
            if not released:
                released = True
                self.release_share()

        return release

    def release_share(self) -> None:
        """Release one share. Each holder calls this once."""
        self._shares -= 1
        if not self._shares:
            self._release()

    def __repr__(self) -> str:
        return f"SharedBody({self._shares} shares)"
