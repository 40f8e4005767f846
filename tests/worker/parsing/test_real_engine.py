"""A real engine with parsers: forced tool calls are valid, begin after the reasoning, and are resumed exactly."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from cluster.api.output_parts import PartKind
from cluster.api.types import EngineRequest, FinishReason, Grammar, Sampling
from tests.worker.parsing.formats import FORMATS, encode, tokenizer_of
from tests.worker.parsing.hosts import parser_of, request_of
from tests.worker.parsing.real_engines import parsed, started
from tests.worker.parsing.test_output_parser import running

pytestmark = [pytest.mark.engine, pytest.mark.slow]

HERMES = next(form for form in FORMATS if form.name == "hermes+qwen3")
BUDGET = 6
STRICT = {
    "type": "function",
    "function": {
        "name": "book",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "pattern": "^[A-Z][a-z]{2,6}$"},
                "stars": {"enum": [3, 4, 5]},
                "late": {"type": "boolean"},
            },
            "required": ["city", "stars", "late"],
            "additionalProperties": False,
        },
    },
}


async def test_forced_calls_are_valid_after_the_reasoning_and_resume_exactly(folder: Path, checkpoint: Path) -> None:
    """With tool_choice `required` and a strict tool, the engine ends its reasoning within the budget and then makes a
    valid tool call. A request that is cut and resumed has the same tokens and parts."""
    parser, _ = parser_of(folder, HERMES)
    prompt = encode(folder, "<|im_start|>user\nBook it.<|im_end|>\n<|im_start|>assistant\n<think>\n")
    async with started(checkpoint, HERMES.reasoning) as driver, running(parser):
        for seed in range(3):
            sampling = Sampling(max_tokens=400, temperature=1.0, seed=seed, max_reasoning_tokens=BUDGET)
            asked = request_of(
                HERMES, f"r{seed}", prompt, tools=[STRICT], tool_choice="required", parallel_tool_calls=False,
                sampling=sampling,
            )  # fmt: skip
            request = await parser.open(asked)
            parser.close(request.request_id)
            (whole,) = await driver.run(request)
            parts = await parsed(parser, asked, whole, ())
            assert whole.finish is FinishReason.STOP
            assert [part[0] for part in parts] == [PartKind.REASONING, PartKind.TOOL_NAME, PartKind.TOOL_ARGUMENTS]
            end = whole.token_ids.index(encode(folder, "</think>")[0])
            assert end <= BUDGET
            arguments = json.loads(parts[-1][1])
            assert arguments.keys() == {"city", "stars", "late"}
            assert re.fullmatch("[A-Z][a-z]{2,6}", arguments["city"])
            assert arguments["stars"] in (3, 4, 5)
            assert isinstance(arguments["late"], bool)
            for cut in (1, end, end + 1, end + 2, end + 9, len(whole.token_ids) - 1):
                emitted = whole.token_ids[:cut]
                again = dataclasses.replace(request, request_id=f"r{seed}-{cut}", emitted_token_ids=emitted)
                (rest,) = await driver.run(again)
                assert (*emitted, *rest.token_ids) == whole.token_ids
                assert await parsed(parser, asked, rest, emitted) == parts


CONSTRAINTS = {
    Grammar("regex", "[0-9]{5}"): r"[0-9]{5}",
    Grammar("choice", ("yes", "no")): r"yes|no",
    Grammar("json_schema", '{"type": "boolean"}'): r"true|false",
    Grammar("json_object", ""): r"\{.*",
    Grammar("grammar", 'root ::= "a" "b"+'): r"ab*",
    Grammar("grammar", 'start: "c" /[de]+/'): r"c[de]*",
}


async def test_the_grammar_of_a_completion_applies_from_the_first_token(folder: Path, checkpoint: Path) -> None:
    """On a model with a reasoning parser, a request whose output is not parsed follows its grammar from the first
    token, in every form, and so it does when it is cut and resumed."""
    parser, _ = parser_of(folder, HERMES)
    tokenizer = tokenizer_of(folder)
    prompt = encode(folder, "What is 12345?")
    async with started(checkpoint, HERMES.reasoning) as driver:
        for number, (grammar, expression) in enumerate(CONSTRAINTS.items()):
            sampling = Sampling(max_tokens=8, temperature=0.0, grammar=grammar)
            request = await parser.open(EngineRequest(f"c{number}", prompt, sampling))
            (whole,) = await driver.run(request)
            assert re.fullmatch(
                expression, tokenizer.decode(list(whole.token_ids), skip_special_tokens=True), re.DOTALL
            ), grammar
            again = dataclasses.replace(request, request_id=f"again{number}", emitted_token_ids=whole.token_ids[:1])
            (rest,) = await driver.run(again)
            assert (*whole.token_ids[:1], *rest.token_ids) == whole.token_ids
    assert parser.open_sessions == 0
