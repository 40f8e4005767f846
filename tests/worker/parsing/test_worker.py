"""Tests of a worker with a parser: the gateway gets the parsed parts of an output together with the output's tokens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.api.output_parts import OutputPart, ParsedOutput
from cluster.api.types import REASONING_PARSER, TOOL_PARSER, FinishReason, Sampling, TokenOutput, WorkerIdentity
from cluster.gateway.links.worker_link import SubmittedRequest, WorkerLink
from cluster.wire.bundle import Bundle
from cluster.worker.engine.simulated.engine import SimConfig, SimEngine
from cluster.worker.parsing.model_parser import with_parsers
from cluster.worker.parsing.output_parser import OutputParser
from cluster.worker.session import WorkerSession
from tests.support.serving import Door, eventually
from tests.worker.parsing.formats import FORMATS, as_parts, tokenizer_of
from tests.worker.parsing.hosts import RAISE, parser_of, request_of

pytestmark = pytest.mark.engine

HERMES = FORMATS[0]
PROMPT = [300, 301, 302]


@dataclass
class Answer:
    """Sink that collects the outputs of one request."""

    outputs: list[TokenOutput] = field(default_factory=list)
    refusal: tuple[str, str] = ("", "")
    slot: int = -1
    last_token_at: float = 0.0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def accepted(self) -> None:
        """Do nothing."""

    def refused(self, reason: str, message: str, field: str) -> None:
        """Record the reason and the field."""
        self.refusal = reason, field
        self.ended.set()

    def token(self, token_id: int, now: float) -> None:
        """Record a token without parts."""
        self.output(TokenOutput("", (token_id,)))

    def parsed_token(self, token_id: int, parts: Sequence[OutputPart], now: float) -> None:
        """Record a token with its parts."""
        self.output(TokenOutput("", (token_id,), parsed=ParsedOutput(parts)))

    def output(self, output: TokenOutput) -> None:
        """Record an output."""
        self.outputs.append(output)
        if output.finish is not None:
            self.ended.set()

    def lost(self, why: str) -> None:
        """Record the loss of the worker as the refusal LOST."""
        self.refused("LOST", why, "")

    def failed(self, error: BaseException) -> None:
        """Record the failure as the refusal FAILED."""
        self.refused("FAILED", str(error), "")

    @property
    def tokens(self) -> list[int]:
        """The tokens of all outputs."""
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def parts(self) -> list[Any]:
        """The parts of all outputs, with adjacent parts joined."""
        return as_parts([part for output in self.outputs if output.parsed for part in output.parsed.parts])


@dataclass
class Served:
    """A worker with a simulated engine, and a gateway's link to it."""

    link: WorkerLink
    engine: SimEngine
    end: WorkerSession
    parser: OutputParser

    def work(self) -> tuple[int, int]:
        """Return the number of prefilled tokens and of decoded tokens."""
        outputs = self.end._requests.outputs
        return outputs.prefilled_tokens, outputs.decoded_tokens

    async def ask(self, **changes: Any) -> Answer:
        """Run a request to its end and return the answer."""
        answer = self.submit(**changes)
        async with asyncio.timeout(60):
            await answer.ended.wait()
        return answer

    def submit(self, **changes: Any) -> Answer:
        """Submit a request whose output is parsed."""
        answer = Answer()
        sampling = changes.pop("sampling", Sampling(max_tokens=40, temperature=0.0, ignore_eos=True))
        emitted = changes.pop("emitted", ())
        request = request_of(HERMES, "", PROMPT, emitted, sampling=sampling, **changes)
        answer.slot = self.link.submit(SubmittedRequest(request), answer)
        return answer


@contextlib.asynccontextmanager
async def serving(door: Door, folder: Path) -> AsyncIterator[Served]:
    """Serve a simulated engine with a parser."""
    parser, _ = parser_of(folder, HERMES)
    engine = SimEngine(SimConfig.from_source(f"sim://{folder}?decode_ms=1"))
    end = WorkerSession(
        identity=WorkerIdentity("w", "i", "sim"),
        engine=engine,
        info=with_parsers(await engine.start(), parser),
        bundle=Bundle({}),
        gateways=[door.address],
        parser=parser,
    )
    task = asyncio.create_task(end.run())
    try:
        served = Served(await door.worker("sim"), engine, end, parser)
        yield served
        await eventually(lambda: not end.statistics().running, "the worker is free")
        assert end.statistics().tokens == 0
        assert not parser.open_sessions
    finally:
        await end.close()
        await asyncio.gather(task, return_exceptions=True)


async def test_parts_arrive_beside_unchanged_tokens(door: Door, folder: Path) -> None:
    """A parsed request gets the same tokens as a plain request. Its first output shows that it is parsed, and its parts
    add up to the tokens' text."""
    async with serving(door, folder) as served:
        assert {f"{TOOL_PARSER}hermes"} <= set(served.link.info.capabilities)
        assert not any(word.startswith(REASONING_PARSER) for word in served.link.info.capabilities)
        streamed, whole = await served.ask(), await served.ask(is_whole=True)
        text = tokenizer_of(folder).decode(streamed.tokens)
        assert streamed.tokens == whole.tokens
        assert len(streamed.tokens) == 40
        assert streamed.parts == whole.parts == [(1, text, 0)]
        assert streamed.outputs[0].parsed is not None
        assert streamed.outputs[0].prompt_tokens == len(PROMPT)
        assert streamed.outputs[-1].finish is FinishReason.LENGTH


async def test_parsed_tokens_are_counted_like_plain_ones(door: Door, folder: Path) -> None:
    """The worker counts each token of a parsed request once as work, as for a plain request. Tokens that a stop string
    cuts off count too."""
    async with serving(door, folder) as served:
        counts = []
        for changes in ({"tool_choice": "none"}, {}, {"is_whole": True}):
            before = served.work()
            await served.ask(**changes)
            await eventually(lambda before=before: served.work()[1] - before[1] >= 40, "all tokens are counted")  # type: ignore[misc]
            counts.append((served.work()[0] - before[0], served.work()[1] - before[1]))
        assert counts == [(counts[0][0], 40)] * 3


async def test_a_resumed_request_repeats_its_parts(door: Door, folder: Path) -> None:
    """A request that is submitted with emitted tokens gets the remaining tokens and the parts of all tokens."""
    async with serving(door, folder) as served:
        whole = await served.ask()
        again = await served.ask(emitted=whole.tokens[:17])
        assert again.tokens == whole.tokens[17:]
        assert again.parts == whole.parts


async def test_a_stop_string_ends_the_request_in_the_engine(door: Door, folder: Path) -> None:
    """A stop string ends a request with the finish STOP and the tokens up to the string. The request then uses no
    capacity of the engine or the worker."""
    async with serving(door, folder) as served:
        whole = await served.ask()
        text = whole.parts[0][1]
        stop = text[30:34]
        long = Sampling(max_tokens=2000, temperature=0.0, ignore_eos=True)
        stopped = await served.ask(stop=(stop,), sampling=long)
        assert stopped.outputs[-1].finish is FinishReason.STOP
        assert stopped.outputs[-1].parsed is not None
        assert stopped.outputs[-1].parsed.stop_string == stop
        assert stopped.parts == [(1, text[: text.index(stop)], 0)]
        assert stopped.tokens == whole.tokens[: len(stopped.tokens)]
        await eventually(lambda: not served.engine.load().running, "the engine is free")
        assert served.end.statistics().running == 0


async def test_an_abort_and_a_refusal_leave_nothing(door: Door, folder: Path) -> None:
    """Aborted and refused requests leave neither a parser session nor a request in the engine."""
    async with serving(door, folder) as served:
        long = Sampling(max_tokens=2000, temperature=0.0, ignore_eos=True)
        answer = served.submit(sampling=long)
        await eventually(lambda: answer.outputs, "the request runs")
        served.link.abort(answer.slot)
        served.link.abort(served.submit(sampling=long).slot)  # in one message with its Submit
        refused = await served.ask(tools="none")
        assert refused.refusal == ("INVALID_FIELD", "tools")
        too_long = await served.ask(sampling=Sampling(max_tokens=0))
        assert too_long.refusal == ("INVALID_FIELD", "max_tokens")
        await eventually(lambda: not served.engine.load().running, "the engine is free")
        await eventually(lambda: not served.end.statistics().running, "the worker is free")
        assert not served.parser.open_sessions


async def test_a_failed_parse_ends_one_request(door: Door, folder: Path) -> None:
    """A request whose parser raises an error ends with an error, and is aborted in the engine. Other requests go on."""
    async with serving(door, folder) as served:
        long = Sampling(max_tokens=2000, temperature=0.0, ignore_eos=True)
        failed = await served.ask(chat_template_kwargs={"x": RAISE}, sampling=long)
        assert failed.outputs[-1].finish is FinishReason.ERROR
        assert "parsed" in failed.outputs[-1].message
        assert (await served.ask()).parts
        await eventually(lambda: not served.engine.load().running, "the engine is free")
