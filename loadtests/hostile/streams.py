"""An attack with thousands of requests in one read of a socket.

Two things are measured: the cost compared with the same number of requests in small reads, and how long other callers
wait meanwhile.

All requests are refused: they call an unknown method, on a tenant's connection and on an anonymous connection.
Anonymous connections are cut long before the end, so only the costs on the tenant's connection are compared.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor

import psutil

from loadtests.figures import Bound, Figure
from loadtests.hostile.attacker import HEADERS, Attacker
from loadtests.hostile.ports import ATTACKER, attacked, quiet_calls
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact

CPU = "CPU of 4,000 requests in one read against sixteen times 250"
WAIT = "longest wait of a quiet tenant's call meanwhile"
ROWS: Mapping[str, Bound] = {CPU: Bound("<=", 1.2), WAIT: Bound("<=", 100)}
TOGETHER, TIMES, ROUNDS, STRANGERS = 4_000, 16, 6, 10
ANSWER_S = 60.0


def cpu_s(pid: int) -> float:
    """Return the CPU time that a process has used, in seconds."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def requests(address: str, key: str, pid: int, size: int, times: int) -> float:
    """Send `times` bursts of `size` requests each, over one connection. Return the CPU time that the process `pid`
    used."""
    attacker = Attacker(address, key)
    try:
        before, answered = cpu_s(pid), attacker.received.get(HEADERS, 0)
        for _ in range(times):
            attacker.send(b"".join([attacker.open("None") for _ in range(size)]))
            answered += size
            attacker.wait(lambda most=answered: attacker.received.get(HEADERS, 0) >= most, ANSWER_S)  # type: ignore[misc]
        return cpu_s(pid) - before
    finally:
        attacker.close()


def strangers(address: str, pid: int) -> float:
    """Open connections without a key, one after the other, and send a burst of calls on each. Returns the CPU time that
    the process has used for them."""
    before = cpu_s(pid)
    for _ in range(STRANGERS):
        attacker = Attacker(address)
        attacker.send(b"".join([attacker.open("None") for _ in range(TOGETHER)]))
        deadline = time.monotonic() + ANSWER_S
        while not attacker.ended and time.monotonic() < deadline:
            attacker.read(0.1)
        attacker.close()
    return cpu_s(pid) - before


async def measure(stage: Stage) -> list[Figure]:
    """Measure the cases in turn while a quiet tenant calls; return the report's rows. The attacker runs in a separate
    process, so that the attacker delays no caller.
    """
    gateway = await attacked(stage, "streams-gateway")
    loop, pid = asyncio.get_running_loop(), gateway.process.pid
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as attackers:

        async def attack(size: int, times: int) -> float:
            arguments = (gateway.address, gateway.keys[ATTACKER], pid, size, times)
            return await loop.run_in_executor(attackers, requests, *arguments)

        await attack(TOGETHER, 1)
        async with quiet_calls(gateway) as alone:
            await asyncio.sleep(1.0)
        together = apart = 0.0
        async with quiet_calls(gateway) as beside:
            for _ in range(ROUNDS):
                together += await attack(TOGETHER, 1)
                apart += await attack(TOGETHER // TIMES, TIMES)
            strange = await loop.run_in_executor(attackers, strangers, gateway.address, pid)
    count = ROUNDS * TOGETHER
    note = (
        f"{1e6 * together / count:.0f} µs of CPU a request together, {1e6 * apart / count:.0f} apart, the quiet "
        f"tenant's calls included; a stranger's burst {1000 * strange / STRANGERS:.0f} ms"
    )
    waits = f"{len(beside.waits_s)} calls; alone the longest of {len(alone.waits_s)} took {alone.longest_ms:.0f} ms"
    return [
        exact(CPU, together / apart, ROWS[CPU], "ratio", note),
        exact(WAIT, beside.longest_ms, ROWS[WAIT], "ms", waits),
    ]
