"""A cluster in this process, with a console whose pages have tenants, calls and usage to show."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
from playwright.async_api import Browser

from cluster.ledger.usage.records import UsageRecord
from loadtests.scenarios.common import Stage
from tests.support.calls import chat
from tests.support.checkpoints import build_checkpoint
from tests.support.cluster import bundle_of
from tests.support.console_pages import OTHER, TENANT, ConsolePages, add_workers, console_pages
from tests.support.keyed import bearer

WORKERS = 4
DAY_S = 86400.0
LONG_WORDS = 400
MOST_TOKENS = 5000


def log_warnings_only() -> None:
    """Let gateways and workers in this process log warnings and errors only."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


@dataclass(frozen=True, slots=True)
class FilledConsole:
    """The console, and two ids that its pages show: the id of an answered call, and the id of a key of the tenant
    TENANT."""

    console: ConsolePages
    call: str
    key_id: str


@asynccontextmanager
async def filled(stage: Stage, browser: Browser) -> AsyncIterator[FilledConsole]:
    """Run a gateway with workers on four nodes. The first tokens come fast for TENANT's calls and slowly for OTHER's
    calls. OTHER used the most tokens yesterday."""
    log_warnings_only()
    folder = stage.folder / f"console-{time.monotonic_ns()}"
    folder.mkdir()
    checkpoint = await asyncio.to_thread(build_checkpoint, "llama", folder / "checkpoint")
    bundle = bundle_of(checkpoint)
    async with console_pages(folder / "gateway", browser) as console:
        await add_workers(console.cluster, checkpoint, bundle, WORKERS, decode_ms=2, prefill_tokens_per_s=2000)
        ledger, keyed = console.keyed.ledger, console.keyed
        key, other = await keyed.another_key(TENANT), await keyed.another_key(OTHER)
        await keyed.until_known(TENANT, key)
        await keyed.until_known(OTHER, other)
        stub = console.cluster.stub
        answer = None
        for _ in range(3):
            answer = await stub.Chat(chat("Hi", max_tokens=4), metadata=bearer(key))
            await stub.Chat(chat("word " * LONG_WORDS, max_tokens=4), metadata=bearer(other))
        assert answer is not None
        yesterday_s = time.time() - DAY_S
        records = [_record(TENANT, 10, yesterday_s), _record(OTHER, MOST_TOKENS, yesterday_s)]
        await asyncio.to_thread(ledger.usage.insert, records)
        keys = await asyncio.to_thread(ledger.keys.list, TENANT)
        yield FilledConsole(console, answer.id, keys[-1].id)


def _record(tenant: str, tokens: int, at_s: float) -> UsageRecord:
    return UsageRecord(
        f"yesterday-{tenant}", tenant, "k", "sim", "v1", "r", at_s, "ok", prompt_tokens=tokens,
        completion_tokens=tokens, generated_tokens=tokens, ttft_s=0.1, duration_s=1.0,
    )  # fmt: skip
