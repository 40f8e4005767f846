"""Memory held by unfinished HTTP/1 requests of one anonymous client, of a thousand clients, and of a tenant with a key.

The attacks run in a separate program (loadtests/hostile/http_uploads.py). Each attack hits a gateway that has just
started.
"""

from __future__ import annotations

import asyncio
import json
import sys
import urllib.request
from collections.abc import Mapping, Sequence

from loadtests.figures import Bound, Figure
from loadtests.hostile.ports import ATTACKER, Attacked, attacked, peak_memory, quiet_calls
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact

ONE = "resident memory that one HTTP connection without a credential takes"
MANY = "resident memory that 1,000 of them take together, HTTP"
TENANT = "resident memory of one tenant's 20 unfinished HTTP bodies of 16 MB"
ROWS: Mapping[str, Bound] = {ONE: Bound("<=", 8), MANY: Bound("<=", 256), TENANT: Bound("<=", 64)}
ATTACK_S = 60.0
KINDS = {"body": "0", "pipelined": "1", "head": "2"}


def first_request(gateway: Attacked) -> None:
    """Make one request before the attack, so that the modules which the gateway imports for its first request do not
    count as memory of the attack."""
    with urllib.request.urlopen(f"http://{gateway.endpoints['http']}/health", timeout=10) as answer:
        answer.read()


async def attack(stage: Stage, name: str, arguments: Sequence[str], *, with_key: bool = False) -> tuple[float, str]:
    """Run an attack. Return the peak growth of the gateway's memory in MiB, and a description of the sent data."""
    gateway = await attacked(stage, f"http-memory-{name}-gateway")
    async with quiet_calls(gateway):
        await asyncio.to_thread(first_request, gateway)
    report = stage.folder / f"http-memory-{name}.json"
    key = ("--key", gateway.keys[ATTACKER]) if with_key else ()
    command = [sys.executable, "-m", "loadtests.hostile.http_uploads", gateway.endpoints["http"]]

    async def done() -> bool:
        return report.exists()

    async with peak_memory(gateway) as peak:
        child = stage.children.start(
            f"http-memory-{name}", "attacker", [*command, "--report", str(report), *arguments, *key]
        )
        await child.until(done, "the server reads no more", ATTACK_S)
    await child.stop()
    await gateway.gateway.stop()
    sent = json.loads(report.read_text())
    return peak.mib, f"{sent['sent_bytes'] / (1 << 20):.1f} MiB sent, {sent['open']} connections stayed"


async def measure(stage: Stage) -> list[Figure]:
    """Run the attacks on the memory for HTTP bodies, and return the report's rows.

    Each kind of attack by callers without an API key runs alone. Then all kinds run together. The last attack uses the
    API key of a tenant.
    """
    alone = {kind: await attack(stage, kind, ["--first", first]) for kind, first in KINDS.items()}
    many = await attack(stage, "many", ["--connections", "1000"])
    tenant = await attack(stage, "tenant", ["--connections", "20"], with_key=True)
    worst_alone = max(mib for mib, _ in alone.values())
    return [
        exact(ONE, worst_alone, ROWS[ONE], "MiB", "; ".join(f"{kind}: {note}" for kind, (_, note) in alone.items())),
        exact(MANY, many[0], ROWS[MANY], "MiB", many[1]),
        exact(TENANT, tenant[0], ROWS[TENANT], "MiB", tenant[1]),
    ]
