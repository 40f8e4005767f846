"""Calls for the scenario `routing`, from recorded traces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loadtests import traces
from loadtests.routing.calls import BLOCK_TOKENS, Prompt
from loadtests.sim.adapters import AdapterMix

Timed = list[tuple[float, Prompt]]
"""Calls with their times in seconds."""
ADAPTER_BLOCKS = 4
"""Number of first blocks that decide which adapter a traced prompt names. So most prompts that begin alike name the
same adapter."""


def mooncake(speed: float = 1.0, most: int | None = None, folder: Path | None = None) -> Timed:
    """Return Mooncake's conversation trace. `speed`: factor of the arrival rate. `most`: largest number of calls, None
    for all. Raises NoData if the trace is absent."""
    return [
        (t.at_s / speed, Prompt("", t.prompt_tokens, t.output_tokens, t.blocks[: t.prompt_tokens // BLOCK_TOKENS]))
        for t in traces.load("mooncake", folder or traces.DEFAULT_FOLDER)[:most]
    ]


def with_adapters(calls: Timed, mix: AdapterMix | None) -> Timed:
    """Return the calls, with adapters assigned to a share of them. Calls whose prompts begin with the same blocks get
    the same adapter."""
    if mix is None:
        return calls
    return [
        (at_s, replace(prompt, adapter=mix.adapter_of(tuple(prompt.blocks[:ADAPTER_BLOCKS]) or number)))
        for number, (at_s, prompt) in enumerate(calls)
    ]


def azure(speed: float = 1.0, most: int | None = None, folder: Path | None = None) -> Timed:
    """Return the first `most` calls of Azure's conversation trace (None: all calls), replayed `speed` times as fast. In
    this trace no two prompts share a block. Raises NoData if the trace is absent."""
    calls, block = Timed(), 1
    for traced in traces.load("azure-conv", folder or traces.DEFAULT_FOLDER)[:most]:
        whole = traced.prompt_tokens // BLOCK_TOKENS
        blocks = tuple(range(block, block + whole))
        block += whole
        calls.append((traced.at_s / speed, Prompt("", traced.prompt_tokens, max(traced.output_tokens, 1), blocks)))
    return calls
