"""States of a local cluster's models, as the admin API of the first gateway reports them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection

import grpc

from cluster.admin.v1 import admin_pb2
from cluster.cli.target.admin_client import Admin

POLL_S = 0.1
WATCH_S = 1.0
SERVED = ("READY", "IDLE")
"""States of a model that answers calls. For an IDLE model, the first call starts a replica."""
PASSING = re.compile(r"|waiting for Ray to place it|\d+ of \d+ replicas serve|being replaced")
"""Pattern of state reasons that are not reported, since the user need not act."""


async def wait_until_settled(
    admin: Admin, models: Collection[str], show: Callable[[str], None]
) -> list[admin_pb2.CatalogEntry]:
    """Wait until each model is READY, IDLE or FAILED in the catalog. Returns the catalog's entries.

    `show` is called with the models' states while the command waits. An error of `show` ends the wait.
    """
    while True:
        entries = await _catalog(admin)
        if set(models) <= {entry.name for entry in entries if entry.state in (*SERVED, "FAILED")}:
            return entries
        show("   ".join(f"{entry.name} {entry.state.lower()}" for entry in entries) or "waiting for the controller")
        await asyncio.sleep(POLL_S)


async def report_reasons(admin: Admin, report: Callable[[str], None]) -> None:
    """Report new state reasons of models in the catalog. Runs until cancelled.

    A state reason says why a model failed or how a replica's engine ended. Reasons that a model already has when it
    first appears in the catalog are not reported.
    """
    reported: dict[str, frozenset[str]] = {}
    while True:
        for entry in await _catalog(admin):
            parts = entry.state_reason.split("; ")
            reasons = frozenset(part for part in parts if not PASSING.fullmatch(part))
            for reason in sorted(reasons - reported.get(entry.name, reasons)):
                report(f"{entry.name} is {entry.state.lower()}: {reason}")
            reported[entry.name] = reasons
        await asyncio.sleep(WATCH_S)


async def has_no_workers(admin: Admin) -> bool:
    """Return True if the gateway answers and no worker is linked to it."""
    try:
        return not await asyncio.to_thread(admin.workers)
    except grpc.RpcError:
        return False


async def _catalog(admin: Admin) -> list[admin_pb2.CatalogEntry]:
    try:
        entries, age_s = await asyncio.to_thread(admin.catalog)
    except grpc.RpcError:  # the gateway is restarting
        return []
    return entries if age_s >= 0 else []  # before the controller's first report, the entries are those of the last run
