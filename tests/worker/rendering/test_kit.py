"""The renderer's process makes the same prompts as vLLM's server, from the caller's body to the token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.api.outcomes import CallError
from cluster.gateway.apis.openai.fields import read_object
from cluster.gateway.apis.openai.requests import parse_chat
from cluster.gateway.calls.request import ChatPrompt
from cluster.gateway.text.chat.chat_json import chat_json
from cluster.worker.parsing import wire
from cluster.worker.rendering.families import HARMONY, MISTRAL
from cluster.worker.rendering.kit import RendererKit
from tests.gateway.text.test_vllm_prompts import BODIES, CONVERSATIONS

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CONFIG: Any = SimpleNamespace(multimodal_config=None, enable_prompt_embeds=False)
FORMAT = {"deepseek_v32": "string", "deepseek_v4": "openai", "deepseek_v41": "openai"}
"""Content format of each DeepSeek renderer."""


def theirs(renderer: str, tokenizer: Any, body: Mapping[str, Any]) -> list[int] | None:
    """Return the token ids of the prompt that vLLM's server makes of a chat request, or None if it refuses the request.
    `body`: the JSON of the request."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    request = ChatCompletionRequest.model_validate(json.loads(json.dumps(body)))
    try:
        return _rendered(renderer, tokenizer, request)
    except Exception:  # of any kind, which the server answers as an error
        return None


def _rendered(renderer: str, tokenizer: Any, request: Any) -> list[int]:
    from vllm.renderers.chat_utils import parse_chat_messages
    from vllm.renderers.mistral import safe_apply_chat_template
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.utils.mistral import mt

    tools = None if request.tools is None else [tool.model_dump() for tool in request.tools]
    if renderer == HARMONY:
        server: Any = SimpleNamespace(supports_browsing=False, supports_code_interpreter=False, renderer=None)
        _, (prompt,) = OnlineRenderer._make_request_with_harmony(server, request, tools is not None)
        return list(prompt["prompt_token_ids"])
    if renderer == MISTRAL:
        mt.maybe_serialize_tool_calls(request)
        mt.truncate_tool_call_ids(request)
        mt.validate_request_params(request)
    params = request.build_chat_params(None, "auto").with_defaults({"tools": tools, "tokenize": renderer == MISTRAL})
    arguments = params.get_apply_chat_template_kwargs()
    if renderer == MISTRAL:
        return list(safe_apply_chat_template(tokenizer, request.messages, **arguments))
    messages, _, _ = parse_chat_messages(request.messages, CONFIG, FORMAT[renderer])
    text = tokenizer.apply_chat_template(request.messages, conversation=messages, **arguments)
    return list(tokenizer.encode(text, add_special_tokens=False))


def ours(kit: RendererKit, body: Mapping[str, Any]) -> list[int] | None:
    """Parse a chat request's body as the gateway does, then render the prompt as the renderer's process does. Return
    the prompt's token ids, or None if one of the two steps refuses the request."""
    try:
        prompt = parse_chat(read_object(json.dumps(body).encode())).requests[0].prompt
    except CallError:
        return None
    assert isinstance(prompt, ChatPrompt)
    rendered = kit.render(wire.Render(1, chat_json(prompt.messages, **prompt.template_options), 100_000))
    assert rendered.error or rendered.tokens == len(wire.unpack_ids(rendered.ids)) > 0
    return None if rendered.error else wire.unpack_ids(rendered.ids)


def test_conversations(kit: tuple[str, Any, RendererKit]) -> None:
    """Chats with tools, tool results, reasoning, developer messages and continued messages get the same token ids as in
    vLLM. A chat that vLLM refuses is refused here too."""
    renderer, tokenizer, renders = kit
    rendered = 0
    for title, fields in CONVERSATIONS.items():
        body = {"model": "m", **fields}
        expected = theirs(renderer, tokenizer, body)
        assert ours(renders, body) == expected, title
        rendered += expected is not None
    assert rendered >= 3


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES)
def test_any_body(kit: tuple[str, Any, RendererKit], body: dict[str, Any]) -> None:
    """For any body, the token ids are vLLM's, or both sides refuse the body. For Mistral and harmony, bodies have no
    chat_template_kwargs."""
    renderer, tokenizer, renders = kit
    given_arguments = body.get("chat_template_kwargs") or {}
    if renderer in (MISTRAL, HARMONY) and given_arguments:  # the gateway accepts some that vLLM refuses or ignores
        body = {name: value for name, value in body.items() if name != "chat_template_kwargs"}
    assert ours(renders, body) == theirs(renderer, tokenizer, body)


def test_refusals_name_the_field(kit: tuple[str, Any, RendererKit]) -> None:
    """A chat that is invalid, or that vLLM refuses, gives an error with the field and a bounded message."""
    _, _, renders = kit
    for chat in (b"", b"[]", b'{"messages": 1}', b'{"messages": [{"role": "x"}]}', b"\xff"):
        rendered = renders.render(wire.Render(7, chat, 100))
        assert rendered.number == 7
        assert rendered.error, chat
        assert rendered.field
        assert len(rendered.error) <= 600


def test_long_prompts_have_no_ids(kit: tuple[str, Any, RendererKit]) -> None:
    """If a prompt has more tokens than the request allows, the answer has the number of tokens and no ids."""
    _, _, renders = kit
    chat = json.dumps({"messages": [{"role": "user", "content": "Hello there"}]}).encode()
    whole = renders.render(wire.Render(1, chat, 1000))
    assert renders.render(wire.Render(1, chat, whole.tokens)) == whole
    assert renders.render(wire.Render(1, chat, whole.tokens - 1)) == wire.Rendered(1, b"", whole.tokens)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_equal_chats_have_equal_prompts(kit: tuple[str, Any, RendererKit], text: str) -> None:
    """The same chat always gives the same token ids, whatever was rendered before."""
    _, _, renders = kit
    chat = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
    first = renders.render(wire.Render(1, chat, 1000))
    renders.render(wire.Render(2, b'{"messages": [{"role": "user", "content": "other"}]}', 1000))
    assert renders.render(wire.Render(1, chat, 1000)) == first
