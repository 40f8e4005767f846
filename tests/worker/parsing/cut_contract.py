"""Parsed answers of a real engine that are cut after every token and resumed.

Run these tests with `make contract-v2`, in the environment of loadtests.interpreted, on both model runners.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import pytest

from cluster.api.output_parts import PartKind
from cluster.api.types import Sampling
from tests.worker.engine.conftest import schedules_asynchronously
from tests.worker.engine.contract import Driver
from tests.worker.parsing.formats import FORMATS, Format, encode
from tests.worker.parsing.hosts import parser_of, request_of
from tests.worker.parsing.real_engines import parsed, started
from tests.worker.parsing.test_output_parser import running

BUDGET, SEEDS = 5, 50
NAMES = ("hermes", "qwen3_coder", "hermes+qwen3", "qwen3_xml+qwen3", "+qwen3", "kimi_k2+kimi_k2")
"""Parsers of tool calls, of both, and of reasoning alone."""
TOOL = {
    "type": "function",
    "function": {
        "name": "book",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"late": {"type": "boolean"}, "stars": {"enum": [3, 4]}},
            "required": ["late", "stars"],
            "additionalProperties": False,
        },
    },
}


def format_of(name: str) -> Format:
    """Return the format whose parsers have this name."""
    if name.startswith("+"):
        whole = next(form for form in FORMATS if form.name == f"hermes{name}")
        return dataclasses.replace(whole, tools="")
    return next(form for form in FORMATS if form.name == name)


async def cut_everywhere(driver: Driver, folder: Path, form: Format, seeds: Iterable[int]) -> set[PartKind]:
    """Resume a parsed answer after each of its tokens, and check that each resumed answer has the tokens and parts of
    the uncut answer. Return the kinds of the parts.

    The answer is the first of those with `seeds` that has a tool call, if the format has one. A random model may write
    the markers of a call in ordinary tokens, which the grammar allows and the parser takes for text.
    """
    parser, _ = parser_of(folder, form)
    prompt = encode(folder, "<|im_start|>user\nBook it.<|im_end|>\n<|im_start|>assistant\n")
    prompt += encode(folder, "<think>\n") if form.reasoning else []
    calls = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    budget = BUDGET if form.reasoning else None
    changes = calls if form.tools else {"tools": [], "tool_choice": "none"}
    sampling = Sampling(max_tokens=80 if form.tools else 24, temperature=1.0, max_reasoning_tokens=budget)
    async with running(parser):
        for seed in seeds:
            chosen = dataclasses.replace(sampling, seed=seed)
            asked = request_of(form, f"{form.name}-{seed}", prompt, sampling=chosen, **changes)
            request = await parser.open(asked)
            parser.close(request.request_id)
            (whole,) = await driver.run(request)
            parts = await parsed(parser, asked, whole, ())
            if not form.tools or any(part[0] == PartKind.TOOL_ARGUMENTS for part in parts):
                break
        cuts = range(1, len(whole.token_ids))
        rests = [
            dataclasses.replace(
                request, request_id=f"{request.request_id}-{cut}", emitted_token_ids=whole.token_ids[:cut]
            )
            for cut in cuts
        ]
        for cut, rest in zip(cuts, await driver.run(*rests), strict=True):
            emitted = whole.token_ids[:cut]
            assert (*emitted, *rest.token_ids) == whole.token_ids, (form.name, cut)
            assert await parsed(parser, asked, rest, emitted) == parts, (form.name, cut)
    return {PartKind(part[0]) for part in parts}


@pytest.mark.parametrize("reasoning", sorted({name.partition("+")[2] for name in NAMES}))
async def test_a_parsed_answer_that_is_cut_anywhere_ends_alike(reasoning: str, folder: Path, checkpoint: Path) -> None:
    """A stream that is cut after any token and resumed has the tokens and parts of the uncut stream.

    This holds for a forced tool call, for a forced tool call after reasoning, and for reasoning alone.
    """
    async with started(checkpoint, reasoning, deadline_s=600.0) as driver:
        assert schedules_asynchronously(driver.subject)
        for form in map(format_of, NAMES):
            if form.reasoning == reasoning:
                kinds = await cut_everywhere(driver, folder, form, range(len(form.name), len(form.name) + SEEDS))
                assert (PartKind.TOOL_ARGUMENTS in kinds) == bool(form.tools), form.name
                assert (PartKind.REASONING in kinds) == bool(reasoning), form.name
        await driver.empty()
