"""Headrace: a serving cluster for open models. docs/architecture.md has the map of the packages."""

__version__ = "0.1.0"
