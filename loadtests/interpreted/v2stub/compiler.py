"""Compiler stub of the backend `cpu`. The stub compiles nothing."""

from __future__ import annotations

from triton.backends.compiler import BaseBackend


class CpuStubCompiler(BaseBackend):  # type: ignore[misc] # Triton is not there where types are checked
    """Compiler that the interpreter never calls."""


CpuStubCompiler.__abstractmethods__ = frozenset()
