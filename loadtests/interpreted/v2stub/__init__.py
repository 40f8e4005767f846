"""Stub with which vLLM's V2 model runner runs on CPUs: the runner's Triton kernels run in Triton's interpreter, which
needs no compiler or driver.

This folder goes on PYTHONPATH together with a folder that holds the package `triton`. vLLM asks Triton for a backend
named `cpu`. Triton finds backends by entry points, so a distribution that names this package is enough.
"""
