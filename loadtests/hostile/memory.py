"""Memory held by unfinished gRPC requests of one anonymous client, of a thousand clients, and of a tenant with a key.

The attacks run in a separate program (loadtests/hostile/uploads.py). Each attack hits a gateway that has just started.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

from loadtests.figures import Bound, Figure
from loadtests.hostile.ports import ATTACKER, attacked, peak_memory, quiet_calls
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact

ONE = "resident memory that one gRPC connection without a credential takes"
MANY = "resident memory that 1,000 of them take together"
TENANT = "resident memory of one tenant's 20 unfinished gRPC requests of 16 MB"
ROWS: Mapping[str, Bound] = {ONE: Bound("<=", 8), MANY: Bound("<=", 256), TENANT: Bound("<=", 64)}
ATTACK_S = 60.0
STRANGE = ("--strange", "--calls", "40")


async def attack(
    stage: Stage, name: str, arguments: Sequence[str], *, with_key: bool = False, tls: bool = False
) -> tuple[float, str]:
    """Run an attack. Return the peak growth of the gateway's memory in MiB, and a description of the sent data."""
    gateway = await attacked(stage, f"memory-{name}-gateway", tls=tls)
    async with quiet_calls(gateway):  # imports of a first call do not count as memory of the attack
        pass
    report = stage.folder / f"memory-{name}.json"
    key = ("--key", gateway.keys[ATTACKER]) if with_key else ()
    command = [sys.executable, "-m", "loadtests.hostile.uploads", gateway.address, "--report", str(report)]
    command += ["--tls"] if tls else []

    async def done() -> bool:
        return report.exists()

    async with peak_memory(gateway) as peak:
        child = stage.children.start(f"memory-{name}", "attacker", [*command, *arguments, *key])
        await child.until(done, "the server lets in no more", ATTACK_S)
    await child.stop()
    await gateway.gateway.stop()
    totals = json.loads(report.read_text())
    sent = f"{totals['sent_bytes'] / (1 << 20):.1f} MiB of bodies sent, {totals['open']} connections stayed"
    return peak.mib, f"{peak.mib:.1f}{' with TLS' if tls else ''}: {sent}"


async def measure(stage: Stage) -> list[Figure]:
    """Measure these attacks with unfinished requests: anonymous requests with large and with small bodies over one
    connection, anonymous requests with small bodies over a thousand connections, and requests of one tenant over one
    connection and over twenty connections."""
    large = await attack(stage, "one-large", ["--calls", "40"])
    strange = await attack(stage, "one-strange", [*STRANGE, "--bytes", "60000"])
    many = await attack(stage, "many", [*STRANGE, "--bytes", "60000", "--connections", "1000"])
    many_tls = await attack(stage, "many-tls", [*STRANGE, "--bytes", "60000", "--connections", "1000"], tls=True)
    over_one = await attack(stage, "tenant-one", ["--calls", "20"], with_key=True)
    over_many = await attack(stage, "tenant-many", ["--connections", "20"], with_key=True)
    return [
        exact(ONE, max(large[0], strange[0]), ROWS[ONE], "MiB", f"{large[1]}; {strange[1]}"),
        exact(MANY, max(many[0], many_tls[0]), ROWS[MANY], "MiB", f"{many[1]}; {many_tls[1]}"),
        exact(TENANT, max(over_one[0], over_many[0]), ROWS[TENANT], "MiB", f"{over_one[1]}; {over_many[1]}"),
    ]
