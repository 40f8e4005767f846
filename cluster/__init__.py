"""Headrace: a serving cluster for open models. docs/architecture.md has the map of the packages."""

from __future__ import annotations

UNKNOWN_VERSION = "0+unknown"
"""Version of a source tree that no build or installation has given one."""


def __getattr__(name: str) -> str:
    """Return `__version__`, from the metadata of the installed package, when it is first asked for."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import metadata

    try:
        found = metadata.version("headrace")
    except metadata.PackageNotFoundError:
        found = UNKNOWN_VERSION
    globals()[name] = found
    return found
