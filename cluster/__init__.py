"""Headrace: a serving cluster for open models. docs/design.md has the map of the packages."""

__version__ = "0.1.0"
