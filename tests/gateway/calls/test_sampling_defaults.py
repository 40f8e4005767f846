"""Sampling defaults of a model: each API applies them as vLLM's server does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.api.types import EngineRequest, Sampling
from cluster.gateway.apis.anthropic.requests import parse_messages
from cluster.gateway.apis.grpc.requests import parse_chat as parse_grpc
from cluster.gateway.apis.openai.fields import Fields
from cluster.gateway.apis.openai.requests import parse_chat, parse_completion
from cluster.gateway.calls.request import GenerationRequest, RequestOptions, TextPrompt, sampling
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import MAX_TOKENS_LIMIT, PLAIN_SAMPLING, sampling_defaults

CONTEXT, PROMPT = 200, 10
OTHER = {"repetition_penalty": 1.3, "top_k": 7, "top_p": 0.7, "temperature": 0.4, "min_p": 0.2}
SET = {name: OTHER.get(name, 0.5) for name in PLAIN_SAMPLING}
"""A default for each field, none of which is the neutral value."""


def applied(request: GenerationRequest, defaults: Mapping[str, object]) -> Sampling:
    """Return the sampling parameters of a request to a model with these defaults."""
    return sampling(request, json.loads(json.dumps(dict(defaults))), PROMPT, CONTEXT, 1000)


def test_each_default_applies_unless_the_caller_sets_the_field() -> None:
    """Each field that a generation config can set has the caller's value, 0 included, else the model's default, else
    the neutral value. Each is a field of Sampling."""
    assert set(PLAIN_SAMPLING) <= {field.name for field in fields(Sampling)}
    for name, plain in PLAIN_SAMPLING.items():
        cases: tuple[tuple[dict[str, Any], Mapping[str, object], object], ...] = (
            ({}, {}, plain),
            ({}, SET, SET[name]),
            ({name: 0}, SET, 0),
            ({name: 1}, SET, 1),
        )
        for options, defaults, expected in cases:
            request = GenerationRequest("m", TextPrompt("x"), RequestOptions(**options))
            assert getattr(applied(request, defaults), name) == expected, name


def test_all_apis_leave_unset_fields_to_the_model() -> None:
    """A chat without sampling fields gets the model's defaults on every API. A field that is set to 0 gets 0."""
    chat = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    message = pb.Message(role="user", content="x")
    requests = {
        "chat": parse_chat(Fields(chat)).requests[0],
        "completion": parse_completion(Fields({"model": "m", "prompt": "x"})).requests[0],
        "messages": parse_messages(Fields({**chat, "max_tokens": 5})).requests[0],
        "grpc": parse_grpc(pb.ChatRequest(model="m", messages=[message])),
    }
    for api, request in requests.items():
        made = applied(request, SET)
        assert {name: getattr(made, name) for name in SET} == SET, api
    for penalty in ("presence_penalty", "frequency_penalty"):
        zero: dict[str, Any] = {penalty: 0.0}
        for request in (
            parse_chat(Fields({**chat, **zero})).requests[0],
            parse_grpc(pb.ChatRequest(model="m", messages=[message], **zero)),
        ):
            assert getattr(applied(request, SET), penalty) == 0


def test_the_operators_limit_cuts_what_a_caller_asks_for() -> None:
    """A call generates no more tokens than the limit among the model's defaults, whether it sets max_tokens or not."""
    for asked, expected in ((None, 5), (3, 3), (50, 5)):
        request = GenerationRequest("m", TextPrompt("x"), RequestOptions(max_tokens=asked))
        assert applied(request, {"max_tokens": 5, MAX_TOKENS_LIMIT: 5}).max_tokens == expected


CONFIGS: Sequence[tuple[Mapping[str, object], Mapping[str, object]]] = (
    *(({name: value}, {}) for name, value in SET.items()),
    *(({}, {name: value}) for name, value in SET.items()),
    *(({name: plain}, {}) for name, plain in PLAIN_SAMPLING.items()),
    ({}, {}),
    (SET, {}),
    (SET, {"presence_penalty": -1.0, "temperature": 1.0}),
    ({"max_new_tokens": 7}, {}),
    ({"max_new_tokens": 7}, {"max_new_tokens": 5}),
    ({}, {"max_new_tokens": 5, "top_k": 3}),
    ({"do_sample": True, "eos_token_id": 2, "temperature": 0.0}, {}),
)
"""Generation configs, each with the operator's `override_generation_config`."""
REQUESTS: Sequence[Mapping[str, object]] = (
    {},
    {"temperature": 0, "top_p": 1},
    {"presence_penalty": 0, "frequency_penalty": 0},
    {"presence_penalty": -0.5, "max_tokens": 50},
    {"top_k": 0, "min_p": 0, "repetition_penalty": 1},
    {"temperature": 1.5, "frequency_penalty": 2, "max_tokens": 3},
    {"max_tokens": 500, "top_p": 0.5},
)


@pytest.mark.engine
@pytest.mark.parametrize(("config", "override"), CONFIGS, ids=str)
def test_parameters_equal_those_of_vllms_server(
    tmp_path: Path, config: Mapping[str, object], override: Mapping[str, object]
) -> None:
    """For every generation config and request, the engine gets the parameters that vLLM's server would give it. One
    difference is documented: a completion without max_tokens takes the model's default, if there is one, and not 16."""
    from vllm.config import ModelConfig
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
    from vllm.transformers_utils.config import try_get_generation_config

    from cluster.worker.engine.vllm import arguments, requests

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    read = try_get_generation_config(str(tmp_path), trust_remote_code=False)
    assert read is not None
    model: Any = SimpleNamespace(
        generation_config="auto",
        override_generation_config=dict(override),
        try_get_generation_config=read.to_diff_dict,
    )
    defaults = ModelConfig.get_diff_sampling_param(model)
    model.get_diff_sampling_param = lambda: dict(defaults)
    if not override:
        changed = {name: value for name, value in defaults.items() if value != PLAIN_SAMPLING.get(name)}
        assert sampling_defaults(config) == changed
    bounds = requests.RequestBounds(CONTEXT, 1000, 20)
    for asked in REQUESTS:
        chat = {"model": "m", "messages": [{"role": "user", "content": "x"}], **asked}
        text = {"model": "m", "prompt": "x", **asked}
        for theirs, parsed in (
            (ChatCompletionRequest(**chat), parse_chat(Fields(chat))),
            (CompletionRequest(**text), parse_completion(Fields(text))),
        ):
            own = applied(parsed.requests[0], arguments.sampling_defaults(model))
            ours = requests.sampling_params(EngineRequest("r", [5] * PROMPT, own), bounds)
            length = asked.get("max_tokens")
            if length is None and isinstance(theirs, CompletionRequest):
                length = defaults.get("max_tokens", 16)
            most = get_max_tokens(CONTEXT, length, PROMPT, defaults, override.get("max_new_tokens"))
            wanted = theirs.to_sampling_params(most, defaults)
            for name in (*PLAIN_SAMPLING, "max_tokens"):
                assert getattr(ours, name) == getattr(wanted, name), (name, asked, type(theirs).__name__)
