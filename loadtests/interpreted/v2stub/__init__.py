"""Stub of a Triton driver, so that vLLM's V2 model runner runs on CPUs. The runner's Triton kernels then run in
Triton's interpreter, which needs no compiler or driver.

This folder goes on PYTHONPATH together with a folder that holds the package `triton`. vLLM asks Triton for a backend
named `cpu`. Triton finds its backends by the entry points of installed distributions; the entry point of
`triton_cpu_stub` names this package.
"""
