"""Compiler stub of the backend `cpu`. The stub compiles nothing."""

from __future__ import annotations

from triton.backends.compiler import BaseBackend


class CpuStubCompiler(BaseBackend):  # type: ignore[misc] # Triton is not there where types are checked
    """Stub of Triton's compiler backend. Triton's interpreter never calls it."""


CpuStubCompiler.__abstractmethods__ = frozenset()
