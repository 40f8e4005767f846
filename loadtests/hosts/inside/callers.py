"""Program that keeps a number of streams running through the SDK: `python -m loadtests.hosts.inside.callers F`.

F is a JSON file (`Plan`). The program writes events, one a line, to the file `out` of the plan: each call when it
ends, the number of running streams every half second, and each connection that ends. After SIGTERM no new streams
begin, and the running streams complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import grpc

from cluster.client.aio import AsyncClient
from cluster.client.errors import HeadraceError

LIVE_S = 0.5
PAUSE_S = 0.5
"""Pause in seconds after a failed call."""
_WORDS = ("river", "stone", "lantern", "orchard", "copper", "velvet", "harbour", "meadow", "thunder", "willow", "amber")


@dataclass(frozen=True, slots=True)
class Plan:
    """The settings of the callers: where they connect, how many streams they keep running, and how long the streams
    are. `out`: the file for the events."""

    out: str
    endpoint: str
    ca_file: str
    api_key: str
    model: str
    streams: int
    clients: int
    tokens: tuple[int, int]
    """Fewest and most tokens of a stream; lengths are log-uniform."""
    words: int = 100
    prompts: int = 16
    seed: int = 1
    ramp_s: float = 5.0
    """Time in seconds over which the streams begin, so that they do not end together."""
    gap_s: float = 0.12
    """Shortest silence that is recorded, in seconds."""


class Callers:
    """All callers of a plan."""

    def __init__(self, plan: Plan, out: TextIO) -> None:
        self._plan = plan
        self._out = out
        self._rng = random.Random(plan.seed)
        self._clients: list[AsyncClient] = []
        self._prompts = [
            " ".join([f"prompt {number}:", *(self._rng.choice(_WORDS) for _ in range(plan.words))])
            for number in range(plan.prompts)
        ]
        self._longest = [""] * plan.prompts
        self._made = 0
        self._running = 0
        self._chunks = 0
        self.over = asyncio.Event()

    async def run(self) -> None:
        """Run until `over` is set, then until the last stream has ended."""
        plan = self._plan
        self._clients = [
            AsyncClient(plan.endpoint, api_key=plan.api_key, tls_ca_file=plan.ca_file, timeout_s=900.0)
            for _ in range(plan.clients)
        ]
        beside = [asyncio.create_task(self._live())]
        beside += [asyncio.create_task(self._watch(*one)) for one in enumerate(self._clients)]
        async with asyncio.TaskGroup() as group:
            for number in range(plan.streams):
                group.create_task(self._caller(number))
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        await asyncio.gather(*(client.close() for client in self._clients))

    async def _caller(self, number: int) -> None:
        plan = self._plan
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.over.wait(), plan.ramp_s * number / plan.streams)
        client = self._clients[number % len(self._clients)]
        low, high = map(math.log, plan.tokens)
        while not self.over.is_set():
            tokens = round(math.exp(self._rng.uniform(low, high)))
            if not await self._call(client, tokens, self._rng.randrange(plan.prompts)):
                await asyncio.sleep(PAUSE_S)

    async def _call(self, client: AsyncClient, tokens: int, prompt: int) -> bool:
        self._made += 1
        record: dict[str, Any] = {"t": "call", "id": f"h{self._plan.seed}-{self._made}", "asked": tokens, "error": ""}
        record["sent"] = last = time.time()
        self._write({"t": "begun", "id": record["id"], "asked": tokens, "sent": last})
        first, gaps, pieces = 0.0, [], 0
        self._running += 1
        stream = client.stream_chat(
            self._plan.model, self._prompts[prompt], max_tokens=tokens, temperature=0.0, ignore_eos=True,
            request_id=record["id"],
        )  # fmt: skip
        try:
            async for _ in stream:
                now = time.time()
                pieces += 1
                self._chunks += 1
                if not first:
                    first = now
                elif now - last > self._plan.gap_s:
                    gaps.append((round(now, 3), round(now - last, 4)))
                last = now
        except HeadraceError as error:
            record["error"] = f"{error.code} {error.reason}: {error}"
        finally:
            self._running -= 1
        record |= {"first": first, "last": last, "ended": time.time(), "gaps": gaps, "pieces": pieces}
        usage = stream.usage
        if usage is not None:
            record |= {"completion": usage.completion_tokens, "resumed": usage.resumed, "prompt": usage.prompt_tokens}
        elif not record["error"]:
            record["error"] = "the stream ended without usage"
        record["text"] = self.compare(prompt, stream.text)
        self._write(record)
        return not record["error"]

    def compare(self, prompt: int, text: str) -> str:
        """Compare the greedy answers to one prompt. One answer must be a prefix of the other: return "" if so, else a
        description of the difference.
        """
        longest = self._longest[prompt]
        shorter, longer = sorted((text, longest), key=len)
        self._longest[prompt] = longer
        if longer.startswith(shorter.rstrip("�")):
            return ""
        at = next(i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b)
        return f"differs at {at} of {len(text)}: {text[at : at + 30]!r} for {longest[at : at + 30]!r}"

    async def _live(self) -> None:
        while True:
            before = self._chunks
            await asyncio.sleep(LIVE_S)
            self._write({"t": "live", "at": time.time(), "running": self._running, "chunks": self._chunks - before})

    async def _watch(self, number: int, client: AsyncClient) -> None:
        """Record when a client's connection ends. From this moment the client's streams know that they must resume on
        another gateway."""
        while not client._calls.gateways.channels:  # noqa: ASYNC110 - made with the first call
            await asyncio.sleep(LIVE_S)
        channel = client._calls.gateways.channels[0]
        while True:
            state = channel.get_state()
            await channel.wait_for_state_change(state)
            if state is grpc.ChannelConnectivity.READY:
                self._write({"t": "broke", "at": time.time(), "client": number})

    def _write(self, line: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()


async def main(arguments: Sequence[str]) -> None:
    """Read the plan and run the callers."""
    data = json.loads(Path(arguments[0]).read_text())
    plan = Plan(**{**data, "tokens": tuple(data["tokens"])})
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with Path(plan.out).open("w") as out:  # noqa: ASYNC230
        callers = Callers(plan, out)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, callers.over.set)
        await callers.run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
