"""Imports that a gateway defers until after its start."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.gateway import deferred_imports


@pytest.mark.slow
def test_a_gateway_starts_without_what_only_large_requests_need() -> None:
    """A gateway's start imports neither numpy nor the modules for large bodies."""
    program = "import sys; import cluster.gateway.server; print(*sys.modules)"
    imported = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"numpy", "msgspec", "orjson", "psutil"} & set(imported)


@pytest.mark.parametrize("busy", [False, True])
async def test_it_is_imported_when_nothing_runs_or_at_the_latest(
    busy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deferred modules are imported at the first idle moment. If the gateway is never idle, they are imported at
    the time limit."""
    name = f"imported_later_{busy}".lower()
    (tmp_path / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(deferred_imports, "MODULES", (name,))
    asked: list[bool] = []

    def idle() -> bool:
        asked.append(name in sys.modules)
        return not busy or len(asked) > 50

    await deferred_imports.import_later(idle, asyncio.Event(), after_s=0.0, at_latest_s=0.25)
    assert name in sys.modules
    assert asked[0] is False, "not before it was asked for"
    assert (len(asked) > 1) is busy


async def test_it_is_imported_at_once_when_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy gateway imports the deferred modules as soon as they are needed: when a worker has reported KV blocks."""
    (tmp_path / "imported_when_needed.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(deferred_imports, "MODULES", ("imported_when_needed",))
    needed = asyncio.Event()
    importing = asyncio.create_task(deferred_imports.import_later(lambda: False, needed, 3600.0, 3600.0))
    needed.set()
    async with asyncio.timeout(60):
        await importing
    assert "imported_when_needed" in sys.modules
