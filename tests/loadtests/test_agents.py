"""Tests of the load-test scenario `agents`: its cases, its scripts, the engine that emits the scripts, and the
comparison of answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.ports import EngineRefused
from cluster.api.types import EngineRequest, FinishReason, Sampling
from cluster.process.ports import free_port
from cluster.worker.parsing.kit import load_kit
from loadtests.agents import bfcl, cases, compare, formats, prepare, scripted, servers, worker
from loadtests.agents.compare import Answer, ToolCall, differences, read_answer
from loadtests.agents.trials import Trial, plan, texts
from loadtests.traces import NoData
from tests.loadtests.agent_cases import FUNCTION, made_cases
from tests.support.cluster import LOOPBACK, running_cluster
from tests.worker.parsing.hosts import thread_host

FAMILY = formats.BY_NAME["hermes"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
CALLS = st.builds(ToolCall, TEXT.filter(bool), TEXT)
ANSWERS = st.builds(
    Answer, st.sampled_from(("stop", "length", "tool_calls")), TEXT, TEXT, st.lists(CALLS, max_size=3).map(tuple)
)


@pytest.fixture(scope="session")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> scripted.Scripts:
    """Return the scripts of thirty cases in one family."""
    folder = tmp_path_factory.mktemp("scripted")
    tokenizer = prepare.write_model(FAMILY, folder)
    texts_of_family = texts(plan(made_cases(30), [FAMILY]))[FAMILY.name]
    return scripted.Scripts(tokenizer, prepare.script_ids(tokenizer, texts_of_family))


# -- cases


def test_a_case_has_json_schema_types_and_the_first_allowed_values() -> None:
    """A case made from BFCL's data has JSON schema's types instead of BFCL's, and underscores instead of dots in names.
    Each argument of an expected call has the first of its allowed values; optional arguments are left out."""
    one, two = made_cases(3)[1:]
    assert [(call.name, call.arguments) for call in one.calls] == [
        ("geo_find", {"days": -1, "box": [1.5, -2], "deep": True, "who": {"name": "Ann"}}),
    ]
    assert two.calls[0].arguments == {"city": 'a "quoted" name\\', "days": 12345678, "box": []}
    function = one.tools[0]["function"]
    assert function["name"] == "geo_find"
    kinds = {name: schema.get("type") for name, schema in function["parameters"]["properties"].items()}
    assert kinds == {
        "city": "string", "days": "integer", "box": "array", "who": "object", "deep": "boolean", "note": None,
    }  # fmt: skip
    assert function["parameters"]["properties"]["box"]["items"] == {"type": "number"}
    assert function["parameters"]["properties"]["city"] == {"type": "string"}
    assert FUNCTION["parameters"]["type"] == "dict"


def test_missing_data_names_the_remedy(tmp_path: Path) -> None:
    """Without BFCL's data, the error names the command that fetches the data."""
    with pytest.raises(NoData, match="make bench-agents"):
        cases.load(tmp_path)


def test_every_family_and_category_has_its_turn() -> None:
    """A plan for a mixed sample of cases contains every format family, every kind of tool choice and every request
    option."""
    trials = plan(bfcl.mixed(made_cases(240), 220, seed=1))
    assert {trial.family.name for trial in trials} == formats.BY_NAME.keys()
    assert {trial.choice for trial in trials} == {"auto", "required", "named", "none"}
    options = {"parallel_tool_calls", "include_reasoning", "chat_template_kwargs", "max_tokens", "stop"}
    assert {name for trial in trials for name in trial.options} == options
    assert any(trial.history for trial in trials)
    assert len({trial.key for trial in trials}) == 220


# -- the engine


@pytest.mark.slow
@given(st.lists(st.integers(0, 9), max_size=40), st.text(max_size=3))
def test_steps_join_to_the_tokens(token_ids: Sequence[int], seed: str) -> None:
    """A script's tokens are divided into steps of 1 to 5 tokens, without loss and in order. Equal seeds give equal
    steps."""
    made = list(scripted.steps(token_ids, seed))
    assert [token for step in made for token in step] == token_ids
    assert all(1 <= len(step) <= scripted.LARGEST_STEP for step in made)
    assert made == list(scripted.steps(token_ids, seed))


async def _generate(scripts: scripted.Scripts, requests: Sequence[EngineRequest]) -> dict[str, Any]:
    engine = scripted.ScriptedEngine(scripts)
    await engine.start()
    for request in requests:
        await engine.submit(request)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    ends: dict[str, FinishReason] = {}
    while len(ends) < len(requests):
        for output in await engine.step():
            assert output.request_id not in ends
            tokens[output.request_id] += output.token_ids
            if output.finish is not None:
                ends[output.request_id] = output.finish
    return {name: (ids, ends[name]) for name, ids in tokens.items()}


def _request(scripts: scripted.Scripts, key: str, emitted: Sequence[int] = (), max_tokens: int = 9999) -> EngineRequest:
    prompt = scripts.tokenizer.encode(f"question\n{scripted.MARK.format(key)}<|im_end|>\n").ids
    return EngineRequest(f"{key}/{len(emitted)}/{max_tokens}", prompt, Sampling(max_tokens), emitted)


async def test_the_engine_emits_each_script_from_any_cut_to_its_end(scripts: scripted.Scripts) -> None:
    """The engine emits the script of each request. A resumed request gets the rest of its script. A request with a
    small `max_tokens` gets the beginning, with the finish reason LENGTH."""
    keys = list(scripts.answers)[:6]
    requests = []
    for key in keys:
        ids = scripts.answers[key]
        requests += [_request(scripts, key), _request(scripts, key, ids[:5]), _request(scripts, key, max_tokens=7)]
    made = await _generate(scripts, requests)
    for key, whole, rest, cut in zip(keys, *(list(made.values())[at::3] for at in range(3)), strict=True):
        ids = scripts.answers[key]
        assert whole == (ids, FinishReason.STOP)
        assert rest == (ids[5:], FinishReason.STOP)
        assert cut == (ids[:7], FinishReason.LENGTH)


async def test_the_engine_refuses_a_prompt_without_a_script(scripts: scripted.Scripts) -> None:
    """The scripted engine looks up the script of a prompt by a mark in the prompt. It refuses a prompt with an unknown
    mark."""
    with pytest.raises(EngineRefused, match="no script"):
        await _generate(scripts, [_request(scripts, "unknown-1")])


# -- the comparison


@given(ANSWERS, st.data())
def test_a_stream_in_any_pieces_reads_as_the_whole_answer(answer: Answer, data: st.DataObject) -> None:
    """A streamed answer is read as the same Answer as an answer in one message, wherever the deltas cut its texts."""
    message: dict[str, Any] = {"content": answer.content or None, "reasoning_content": answer.reasoning}
    message["tool_calls"] = [{"function": {"name": c.name, "arguments": c.arguments}} for c in answer.calls]
    body = {"choices": [{"message": message, "finish_reason": answer.finish}]}
    assert read_answer(200, json.dumps(body).encode()) == answer
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"reasoning": piece} for piece in _pieces(answer.reasoning, data)]
    deltas += [{"content": piece} for piece in _pieces(answer.content, data)]
    for index, call in enumerate(answer.calls):
        fields = [{"name": call.name}, *({"arguments": piece} for piece in _pieces(call.arguments, data))]
        deltas += [{"tool_calls": [{"index": index, "function": field}]} for field in fields]
    events: list[dict[str, Any]] = [{"choices": [{"delta": delta}]} for delta in deltas]
    events.append({"choices": [{"delta": {}, "finish_reason": answer.finish}]})
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    assert read_answer(200, stream.encode()) == answer


def _pieces(text: str, data: st.DataObject) -> list[str]:
    at = data.draw(st.integers(0, len(text)))
    return [text[:at], text[at:]]


@given(ANSWERS, ANSWERS)
def test_answers_differ_exactly_if_a_difference_is_found(one: Answer, other: Answer) -> None:
    """Two answers have differences if and only if they are not equal."""
    assert bool(differences(one, other)) == (one != other)
    assert not differences(one, replace(one))


@given(ANSWERS, ANSWERS, st.booleans(), st.booleans())
def test_a_finish_reason_is_known_only_where_it_differs(
    one: Answer, other: Answer, is_cut: bool, is_named: bool
) -> None:
    """`known_finish` reports a known difference only if vLLM's finish reason differs from Headrace's finish reason and
    is not `length`.

    It returns CUT only if the answer was cut, and NAMED_END only if the caller named the tool.
    """
    known = compare.known_finish(one, other, is_cut=is_cut, is_named=is_named)
    if known:
        assert one.finish != other.finish
        assert one.finish != "length"
        assert is_cut if known == compare.CUT else is_named


def test_errors_never_compare_as_equal() -> None:
    """The text of an error begins with its HTTP status. Two errors count as a difference, even with equal texts."""
    refused = read_answer(400, b'{"error": {"message": "no"}}')
    assert refused.error.startswith("400 ")
    assert [one.field for one in differences(refused, refused)] == ["error"]


# -- vLLM's own server over scripted tokens


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Trial], list[dict[str, Any]]]:
    """Return thirty trials in three families, and the families' models."""
    folder = tmp_path_factory.mktemp("agents")
    trials = plan(made_cases(30), [formats.BY_NAME[name] for name in ("hermes", "kimi_k2", "qwen3_coder")])
    made = [prepare.write_family(name, answers, folder / name) for name, answers in texts(trials).items()]
    return trials, made


@pytest.fixture(scope="session")
async def vllm_side(
    sample: tuple[list[Trial], list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[servers.Side]:
    """Return vLLM's own servers for the models of `sample`, in this process."""
    from loadtests.agents import vllm_server

    models = [{**model, "port": free_port()} for model in sample[1]]
    prompts = tmp_path_factory.mktemp("vllm") / "prompts"
    async with vllm_server.running(models, scripted.PromptLog(prompts)):
        yield servers.Side({model["name"]: compare.Server(model["port"]) for model in models}, prompts)


@pytest.mark.engine
@pytest.mark.parametrize("mode", list(bfcl.MODES))
async def test_vllms_own_server_reads_the_written_calls(
    sample: tuple[list[Trial], list[dict[str, Any]]], vllm_side: servers.Side, mode: str
) -> None:
    """vLLM's server parses from each scripted answer exactly the tool calls that its script contains."""
    trials = [trial for trial in sample[0] if not trial.is_cut]
    answers = await bfcl.ask_all(vllm_side, [trial.body(stream=bfcl.MODES[mode]) for trial in trials])
    for trial, answer in zip(trials, answers, strict=True):
        assert not answer.error
        assert trial.is_as_written(answer), (trial, answer)
        assert (answer.finish == "tool_calls") == (bool(answer.calls) and trial.choice != formats.NAMED)


# -- Headrace beside vLLM's own server


@pytest.fixture(scope="session")
async def headrace_side(
    sample: tuple[list[Trial], list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[servers.Side]:
    """Return a gateway with a worker for each model of `sample`, in this process. Each parser runs in a thread."""
    folder = tmp_path_factory.mktemp("headrace")
    names = [model["name"] for model in sample[1]]
    config = yaml.safe_load(LOOPBACK) | {"models": [{"name": name, "source": "sim:///nowhere"} for name in names]}
    log = scripted.PromptLog(folder / "prompts")
    async with running_cluster(folder, yaml.safe_dump(config)) as cluster:
        endpoints = cluster.gateway.endpoints
        sessions = [
            await worker.session_of(
                model, worker.engine_of(model, 1, log), endpoints["link"], lambda kit: thread_host(load_kit(kit))
            )
            for model in sample[1]
        ]
        running = [asyncio.create_task(session.run()) for session in sessions]
        server = compare.Server(int(endpoints["http"].rpartition(":")[2]))
        side = servers.Side(dict.fromkeys(names, server), folder / "prompts")
        async with asyncio.timeout(60):
            while not await server.ready_models() >= set(names):  # noqa: ASYNC110 - polls as a client does
                await asyncio.sleep(0.02)
        yield side
        side.close()
        for session in sessions:
            await session.close()
        await asyncio.gather(*running)


@pytest.mark.engine
async def test_headrace_answers_as_vllms_own_server(
    sample: tuple[list[Trial], list[dict[str, Any]]], vllm_side: servers.Side, headrace_side: servers.Side
) -> None:
    """Headrace's prompts and answers equal those of vLLM's server, even if Headrace's engine emits the same tokens in
    steps of other sizes."""
    compared = await bfcl.compare(sample[0], vllm_side, headrace_side)
    assert len(compared) == 60
    assert [one.as_json() for one in compared if one.differences] == []
    assert bfcl.different_prompts(vllm_side, headrace_side) == []
    assert sum(1 for one in compared if one.ours.calls) >= 30
