"""The name of the user that runs this process."""

from __future__ import annotations

import getpass
import os


def user_name() -> str:
    """Return the name of this process's user. A user without a name, as in a container whose image does not know it,
    has the name `uid NUMBER`."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # KeyError up to Python 3.12
        return f"uid {os.getuid()}"
