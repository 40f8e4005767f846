"""The worker's side of the parser process: outputs are parsed, even after the process has died or hung."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.api.outcomes import Outcome
from cluster.api.output_parts import ParsedOutput
from cluster.api.ports import EngineRefused
from cluster.api.types import FinishReason, Grammar, Sampling, TokenOutput
from cluster.worker.parsing.hangs import HangWatch
from cluster.worker.parsing.kit import ParserKit
from cluster.worker.parsing.output_parser import OutputParser
from cluster.worker.parsing.parser_process import ParserHost
from cluster.worker.parsing.port import NoParsers, ParserNames
from tests.worker.parsing.formats import FORMATS, Format, as_parts, encode
from tests.worker.parsing.hosts import (
    DIE,
    HANG,
    RAISE,
    Hosts,
    fork_host,
    outputs_of,
    parser_of,
    request_of,
    thread_host,
)
from tests.worker.parsing.test_sessions import prompt_ids

pytestmark = pytest.mark.engine

HERMES = next(form for form in FORMATS if form.name == "hermes+qwen3")
ONLY_TOOLS = next(form for form in FORMATS if form.name == "hermes")


@contextlib.asynccontextmanager
async def running(parser: OutputParser) -> AsyncIterator[OutputParser]:
    """Run a parser in the background."""
    task = asyncio.create_task(parser.run())
    try:
        yield parser
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def collect(parser: OutputParser, ids: set[str]) -> dict[str, list[TokenOutput]]:
    """Return the parsed outputs of each request once all requests have ended; close their sessions."""
    got: dict[str, list[TokenOutput]] = {request_id: [] for request_id in ids}
    async with asyncio.timeout(60):
        while ids:
            for output in await parser.parsed():
                got[output.request_id].append(output)
                if output.finish is not None:
                    ids = ids - {output.request_id}
                    parser.close(output.request_id)
    return got


def parts_of(outputs: Sequence[TokenOutput]) -> list[Any]:
    """Return the joined parts of outputs, all of which must be parsed."""
    return as_parts([part for output in outputs for part in (output.parsed or ParsedOutput()).parts])


async def parse(parser: OutputParser, form: Format, folder: Path, size: int = 3, **changes: Any) -> list[TokenOutput]:
    """Parse the output of a format in steps of `size` tokens; return the parsed outputs."""
    request = request_of(form, "r", prompt_ids(folder, form), **changes)
    await parser.open(request)
    passed: list[TokenOutput] = []
    for output in outputs_of("r", encode(folder, form.output), size):
        more, taken = parser.divert([output])
        assert len(more) + len(taken) == 1
        passed += more
    return [*passed, *(await collect(parser, {"r"}))["r"]]


async def test_outputs_come_back_parsed_with_their_tokens(folder: Path) -> None:
    """An output that is diverted to the parser is returned with its tokens and its parts. The output of a request
    without a parser session is not diverted."""
    parser, _ = parser_of(folder, HERMES)
    async with running(parser):
        outputs = await parse(parser, HERMES, folder)
        assert [t for output in outputs for t in output.token_ids] == encode(folder, HERMES.output)
        assert all(output.parsed is not None for output in outputs)
        assert [part[0] for part in parts_of(outputs)] == [2, 1, 3, 4, 3, 4]
        assert outputs[-1].finish is FinishReason.LENGTH
        other = [TokenOutput("other", [1])]
        assert parser.divert(other) == (other, ())


async def test_a_request_without_tools_needs_no_session_where_its_text_is_its_content(folder: Path) -> None:
    """If a request has no tools and the model has no reasoning parser, the output is not parsed, since parsing would
    not change it. With a reasoning parser, it is parsed."""
    parser, hosts = parser_of(folder, ONLY_TOOLS)
    plain = request_of(ONLY_TOOLS, "r", [1], tool_choice="none")
    assert await parser.open(plain) == replace(plain, parsing=None)
    assert not parser.open_sessions
    assert not hosts.started
    reasoning, _ = parser_of(folder, HERMES)
    async with running(reasoning):
        assert (await reasoning.open(request_of(HERMES, "r", [1], tool_choice="none"))).parsing is not None
        assert reasoning.open_sessions == 1


async def test_a_whole_answer_costs_nothing_before_its_end(folder: Path) -> None:
    """If an answer is not streamed and has no stop strings, its parts are made only with the last output."""
    parser, _ = parser_of(folder, HERMES)
    async with running(parser):
        *earlier, last = await parse(parser, HERMES, folder, is_whole=True)
        assert all(output.parsed == ParsedOutput() for output in earlier)
        assert last.parsed is not None
        assert parts_of([last]) == parts_of(await parse(parser, HERMES, folder))
        stopped = await parse(parser, HERMES, folder, is_whole=True, stop=("hotel",))
        assert stopped[-1].parsed is not None
        assert stopped[-1].parsed.stop_string == "hotel"


@pytest.mark.parametrize("is_whole", [False, True])
async def test_a_killed_process_changes_no_parts(folder: Path, is_whole: bool) -> None:
    """If the parser process is killed at any point, the requests go on, and their joined parts do not change."""
    forms = {"a": HERMES.output, "b": HERMES.short, "c": "Only text. " * 9}
    parser, hosts = parser_of(folder, HERMES, fork_host)
    async with running(parser):
        expected = await _parse_together(parser, folder, forms, is_whole)
        for kills in ((5,), (0, 20), (11, 12, 13)):
            got = await _parse_together(parser, folder, forms, is_whole, kills=kills, hosts=hosts)
            assert got == expected


async def _parse_together(
    parser: OutputParser,
    folder: Path,
    texts: dict[str, str],
    is_whole: bool,
    kills: Sequence[int] = (),
    hosts: Hosts | None = None,
) -> dict[str, list[Any]]:
    """Parse the outputs of several requests in the same steps. `kills`: steps before which the process is killed."""
    steps = {}
    for name, text in texts.items():
        await parser.open(request_of(HERMES, name, prompt_ids(folder, HERMES), is_whole=is_whole, stop=("never",)))
        steps[name] = outputs_of(name, encode(folder, text), 2)
    collecting = asyncio.create_task(collect(parser, set(texts)))
    for at in range(max(map(len, steps.values()))):
        if at in kills:
            assert hosts is not None
            hosts.started[-1].kill()
        parser.divert([outputs[at] for outputs in steps.values() if at < len(outputs)])
        await asyncio.sleep(0)
    got = await collecting
    for name, outputs in got.items():
        assert [t for output in outputs for t in output.token_ids] == encode(folder, texts[name])
    return {name: parts_of(outputs) for name, outputs in got.items()}


async def test_a_resumed_request_repeats_the_parts_of_its_emitted_tokens(folder: Path) -> None:
    """The first output of a resumed request also has the parts of the emitted tokens."""
    parser, _ = parser_of(folder, HERMES)
    ids = encode(folder, HERMES.output)
    async with running(parser):
        whole = parts_of(await parse(parser, HERMES, folder))
        await parser.open(request_of(HERMES, "s", prompt_ids(folder, HERMES), ids[:20]))
        for output in outputs_of("s", ids[20:], 4):
            parser.divert([output])
        assert parts_of((await collect(parser, {"s"}))["s"]) == whole


async def test_a_stop_string_ends_the_request(folder: Path) -> None:
    """The output with a stop string is the request's last one. It has the finish STOP and no tokens after the string.
    Later outputs of the engine are dropped."""
    parser, _ = parser_of(folder, ONLY_TOOLS)
    ids = encode(folder, "one two STOP three four five")
    async with running(parser):
        await parser.open(request_of(ONLY_TOOLS, "r", [1], stop=("STOP",)))
        outputs = outputs_of("r", ids, 8)
        for output in outputs[:-1]:
            parser.divert([output])
        async with asyncio.timeout(60):
            got = list(await parser.parsed())
            while got[-1].finish is None:
                got += await parser.parsed()
        assert parser.divert(outputs[-1:]) == ([], outputs[-1:])
        assert got[-1].finish is FinishReason.STOP
        assert got[-1].parsed is not None
        assert got[-1].parsed.stop_string == "STOP"
        kept = [t for output in got for t in output.token_ids]
        assert kept == ids[: len(kept)]
        assert parts_of(got) == [(1, "one two ", 0)]


async def test_a_parser_that_raises_ends_its_own_request(folder: Path) -> None:
    """A request whose parser raises an error ends with an error. The other requests are parsed."""
    parser, hosts = parser_of(folder, ONLY_TOOLS)
    async with running(parser):
        await parser.open(request_of(ONLY_TOOLS, "bad", [1], chat_template_kwargs={"x": RAISE}))
        parser.divert([TokenOutput("bad", [300])])
        (failed,) = (await collect(parser, {"bad"}))["bad"]
        assert failed.finish is FinishReason.ERROR
        assert "IndexError" in failed.message
        assert parts_of(await parse(parser, ONLY_TOOLS, folder))
    assert len(hosts.started) == 1


@pytest.mark.parametrize("word", [HANG, DIE])
async def test_a_parse_that_hangs_or_kills_the_process_fails_alone(folder: Path, word: str) -> None:
    """A request whose parse hangs, or ends every process that tries it, fails. The other requests continue in a new
    process."""

    def watch(host: ParserHost) -> HangWatch:
        return HangWatch(host.progress.read, lambda: 0.0, wall_limit_s=0.3)

    parser, hosts = parser_of(folder, ONLY_TOOLS, fork_host, watch=watch)
    ids = encode(folder, ONLY_TOOLS.output)
    async with running(parser):
        expected = parts_of(await parse(parser, ONLY_TOOLS, folder))
        await parser.open(request_of(ONLY_TOOLS, "bad", [1], chat_template_kwargs={"x": word}))
        await parser.open(request_of(ONLY_TOOLS, "good", prompt_ids(folder, ONLY_TOOLS)))
        good = outputs_of("good", ids, 4)
        parser.divert([good[0]])
        parser.divert([TokenOutput("bad", [300]), good[1]])
        for output in good[2:]:
            parser.divert([output])
        got = await collect(parser, {"bad", "good"})
        assert got["bad"][-1].finish is FinishReason.ERROR
        assert parts_of(got["good"]) == expected
    assert len(hosts.started) >= 2


def _raise() -> ParserKit:
    raise ZeroDivisionError("no parsers")


async def test_a_process_that_cannot_load_its_parsers_refuses_and_is_tried_again(folder: Path) -> None:
    """If a parser process cannot load its parsers, the waiting requests are refused with the reason. A new process is
    then started, and serves later requests."""

    def broken(kit: ParserKit) -> ParserHost:
        return thread_host(kit) if hosts.started else thread_host(_raise)

    parser, hosts = parser_of(folder, ONLY_TOOLS, broken)
    async with running(parser):
        with pytest.raises(EngineRefused, match="ZeroDivisionError") as refused:
            await parser.open(request_of(ONLY_TOOLS, "r", [1]))
        assert refused.value.reason == Outcome.INTERNAL.name
        assert parts_of(await parse(parser, ONLY_TOOLS, folder))
    assert len(hosts.started) == 2


async def test_no_process_remains(folder: Path) -> None:
    """The parser process has ended once the parser has stopped."""
    parser, hosts = parser_of(folder, ONLY_TOOLS, fork_host)
    async with running(parser):
        await parser.open(request_of(ONLY_TOOLS, "r", [1]))
    (host,) = hosts.started
    assert host.pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(host.pid, 0)


async def test_a_grammar_of_the_caller_stays_and_begins_after_the_reasoning(folder: Path) -> None:
    """The grammar of a caller's response_format is kept, and applies only after the reasoning. If the caller forces a
    tool call, the parser makes a grammar from the tools."""
    parser, _ = parser_of(folder, HERMES)
    sampling = Sampling(max_tokens=9, grammar=Grammar("json_schema", '{"type": "object"}'))
    async with running(parser):
        request = request_of(HERMES, "r", prompt_ids(folder, HERMES), tools=[], tool_choice="none", sampling=sampling)
        opened = (await parser.open(request)).sampling.grammar
        assert opened is not None
        assert (opened.kind, opened.value, opened.field) == ("json_schema", '{"type": "object"}', "response_format")
        assert opened.reasoning_ended is False
        forced = request_of(HERMES, "s", prompt_ids(folder, HERMES), tool_choice="required")
        made = (await parser.open(forced)).sampling.grammar
        assert made is not None
        assert (made.kind, made.field) == ("structural_tag", "tools")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tools": [{"type": "function", "function": {"name": "x" * (2 << 20)}}]}, "tools"),
        ({"tools": "no list"}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "unknown"}}}, "tool_choice"),
    ],
)
async def test_a_wrong_request_is_refused(folder: Path, changes: dict[str, Any], field: str) -> None:
    """A request that the parser cannot handle is refused with the name of the field, and no session remains."""
    parser, _ = parser_of(folder, ONLY_TOOLS)
    async with running(parser):
        with pytest.raises(EngineRefused) as refused:
            await parser.open(request_of(ONLY_TOOLS, "r", [1], **changes))
        assert (refused.value.reason, refused.value.field) == (Outcome.INVALID_FIELD.name, field)
        await parser.open(request_of(ONLY_TOOLS, "r", [1]))


async def test_a_worker_without_a_parser_of_tools_refuses_tools_only_where_they_are_needed(folder: Path) -> None:
    """A worker without a parser for tool calls refuses only requests that need tools. The error has the field
    `tools`."""
    needs = request_of(ONLY_TOOLS, "r", [1], needs_tools=True)
    only_reasoning = OutputParser(ParserNames("", "qwen3"), lambda: pytest.fail("no process is needed"))
    for parser in (NoParsers(), only_reasoning):
        with pytest.raises(EngineRefused) as refused:
            await parser.open(needs)
        assert (refused.value.reason, refused.value.field) == (Outcome.UNSUPPORTED_FEATURE.name, "tools")
        assert "tool_call_parser" in refused.value.message
    assert (await NoParsers().open(request_of(ONLY_TOOLS, "r", [1], tool_choice="none"))).parsing is None
