"""Bound of the operator state on links."""

MAX_BYTES = 1 << 20
"""Longest document of an OperatorState. A hundred models of which each has fifty adapters fit."""
