"""Headrace: a serving cluster for open models. docs/architecture.md has the map of the packages."""

from __future__ import annotations

UNKNOWN_VERSION = "0+unknown"
"""Version to report if the package is not installed, for example in a plain source tree."""


def __getattr__(name: str) -> str:
    """Compute `__version__` from the metadata of the installed package, at the first access."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import metadata

    try:
        found = metadata.version("headrace")
    except metadata.PackageNotFoundError:
        found = UNKNOWN_VERSION
    globals()[name] = found
    return found
