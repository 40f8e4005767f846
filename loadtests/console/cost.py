"""The part `cost`: CPU time of a gateway with 20 open consoles, compared with the same gateway without consoles, in
paired rounds.

Each round runs the same calls twice, once with the consoles open and once without; the order alternates. The consoles
are read by this process, whose CPU is not counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from loadtests.console import bed as beds
from loadtests.datasets import fixed
from loadtests.driver import Limits
from loadtests.faces.grpc_stream import GrpcStream
from loadtests.figures import Bound, Figure, mean, missing, plain_figure, ratio_figure
from loadtests.report import Round
from loadtests.scenarios.common import Contestant, Stage, first_call, per_round, run_round
from loadtests.scenarios.relay import bind, relay_cpu
from loadtests.serving import ours as serving

CONSOLES, WORKERS, STREAMS, TOKENS, PROMPT_WORDS = 20, 20, 256, 128, 24
ROUNDS = 20
LIMITS = Limits(call_s=60.0, run_s=120.0)
RATIO = "gateway CPU per token with them against without"
SHARE = f"gateway CPU of {CONSOLES} open consoles, {STREAMS} streams and {WORKERS} workers, % of a core"
ROWS: Mapping[str, Bound | None] = {SHARE: Bound("<=", 3.0), RATIO: None}
"""Only the share has a bound, because the ratio depends on how much else the gateway does."""


async def measure(stage: Stage) -> list[Figure]:
    """Run the rounds, and return the report's rows. Raises DidNotStart, RuntimeError."""
    options = stage.options
    bed = await beds.start(stage, "cost", WORKERS, STREAMS)
    stage.report.settings["cores of cost"] = bind(options.pin, [bed.gateway.pid], [bed.pool.pid])
    cookie = await asyncio.to_thread(beds.sign_in, bed.origin, bed.operator)
    face = GrpcStream(bed.endpoints["grpc"], serving.MODEL, metadata=serving.authorization(bed.caller))
    roots = [(bed.gateway.pid, serving.GATEWAY)]
    arms = {
        name: Contestant(stage.arm(f"cost, {name}", f"{count} open consoles"), face, roots)
        for name, count in (("on", CONSOLES), ("off", 0))
    }
    deltas = 0
    try:
        if not await first_call(arms["off"], fixed(1, PROMPT_WORDS, 4, options.seed)[0]):
            return [missing(row, bound, "the gateway answered no call") for row, bound in ROWS.items()]
        for number in range((options.rounds or ROUNDS) + 1):
            requests = fixed(STREAMS, PROMPT_WORDS, options.tokens or TOKENS, options.seed * 1000 + number)
            concurrency, keep = options.concurrency or STREAMS, number > 0
            for name in ("on", "off") if number % 2 else ("off", "on"):
                count = CONSOLES if name == "on" else 0
                async with beds.open_consoles(bed, cookie, count) as readers:
                    await run_round(
                        arms[name], stage.screen, number, requests, concurrency=concurrency, limits=LIMITS, keep=keep
                    )
                deltas += sum(reader.deltas for reader in readers)
    finally:
        await face.close()
    on, off = per_round(arms["on"], arms["off"], relay_cpu)
    shares = _core_shares(arms["on"].arm.rounds, arms["off"].arm.rounds)
    if not shares or not deltas:
        return [missing(row, bound, "no round ran with consoles") for row, bound in ROWS.items()]
    note = f"{deltas} events were read"
    return [
        plain_figure(SHARE, mean(shares), "%", ROWS[SHARE], len(shares), note=note),
        ratio_figure(RATIO, on, off, ROWS[RATIO], scale=1e6, difference_unit="µs/token"),
    ]


def _core_shares(on: Sequence[Round], off: Sequence[Round]) -> list[float]:
    """Return the CPU use of the consoles in percent of one core, one value for each pair of rounds.

    A value is the CPU time of the round with consoles minus the CPU time of the round without consoles, divided by the
    duration of the round with consoles.
    """
    without = {each.number: each for each in off}
    pairs = [(each, without[each.number]) for each in on if each.number in without and each.run.duration_s]
    return [(a.usage.front_end_s() - b.usage.front_end_s()) / a.run.duration_s * 100 for a, b in pairs]
