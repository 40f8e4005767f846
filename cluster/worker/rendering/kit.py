"""vLLM's renderer of one model, which turns chats into prompt ids. It is loaded once, in the renderer's process.

A chat takes the same path as in vLLM's server (`OnlineRenderer.render_chat`), so its ids are the same. The renderer
reads only a few fields of vLLM's configuration. `_config` provides only these fields, since vLLM's whole configuration
takes seconds to make and needs the weights.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster.worker.parsing import wire
from cluster.worker.parsing.chat_requests import WrongRequest, chat_error
from cluster.worker.rendering.families import HARMONY, MISTRAL

FIELDS = (
    *("messages", "tools", "chat_template_kwargs", "reasoning_effort", "continue_final_message"),
    *("add_generation_prompt", "documents"),
)
"""Fields of a chat that are passed to vLLM's ChatCompletionRequest, under the same names."""
REFUSALS = (ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError)
"""Exceptions of vLLM's renderers and of the libraries below them, for chats that they cannot render."""
NOT_RENDERED = "the model's renderer cannot render this chat"


class RendererKit:
    """A model's tokenizer and vLLM's renderer for it."""

    def __init__(self, renderer: str, tokenizer: Any, folder: str) -> None:
        """Create vLLM's renderer. Raises ValueError if vLLM cannot render with this tokenizer.

        `renderer`: a name of families.py. `tokenizer`: the model's tokenizer, as `renderer_tokenizer` returns it.
        """
        self._loop = asyncio.new_event_loop()
        self._renderer = _online_renderer(renderer, tokenizer, folder)

    def render(self, request: wire.Render) -> wire.Rendered:
        """Render a chat. If vLLM refuses the chat, the result has `error`."""
        try:
            ids = self._ids(request.chat)
        except WrongRequest as wrong:
            return wire.Rendered(request.number, error=wrong.message, field=wrong.field)
        packed = wire.pack_ids(ids) if len(ids) <= request.max_tokens else b""
        return wire.Rendered(request.number, packed, len(ids))

    def close(self) -> None:
        """Close the event loop that runs vLLM's renderer."""
        self._loop.close()

    def _ids(self, chat: bytes) -> list[int]:
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.exceptions import VLLMError

        request = chat_of(chat)
        try:
            result = self._loop.run_until_complete(self._renderer.render_chat(request))
        except (*REFUSALS, VLLMError) as error:
            raise chat_error(error, "messages", NOT_RENDERED) from error
        if isinstance(result, ErrorResponse):
            raise WrongRequest(result.error.param or "messages", result.error.message[:500])
        _, (prompt,) = result
        ids: list[int] = prompt["prompt_token_ids"]
        return ids


def chat_of(chat: bytes) -> Any:
    """Return vLLM's ChatCompletionRequest for a chat. `chat`: a JSON object with FIELDS. Raises WrongRequest."""
    from pydantic import ValidationError
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.exceptions import VLLMError

    try:
        values: Mapping[str, Any] = json.loads(chat)
        given = {name: values[name] for name in FIELDS if values.get(name) is not None}
        if given.get("tools"):
            given["tool_choice"] = "none"  # the choice changes no prompt, and all other choices need parsers
        return ChatCompletionRequest(**given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = [str(part) for part in first["loc"]]
        field = path[0] if path and path[0] in FIELDS else "messages"
        raise WrongRequest(field, f"{'.'.join(path[1:3])}: {first['msg']}"[:500]) from error
    except (VLLMError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise chat_error(error, "messages", NOT_RENDERED) from error


def load_renderer(renderer: str, folder: str, *, trust_remote_code: bool = False) -> RendererKit:
    """Load a model's tokenizer and renderer. Raises ValueError if that is impossible."""
    return RendererKit(renderer, renderer_tokenizer(renderer, folder, trust_remote_code=trust_remote_code), folder)


def renderer_tokenizer(renderer: str, folder: str, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer that vLLM's server would load for a model with this renderer. Raises ValueError."""
    from cluster.worker.weights.vocabulary import load_tokenizer

    try:
        from vllm.tokenizers.hf import get_cached_tokenizer
        from vllm.tokenizers.registry import get_tokenizer
    except ImportError as error:
        raise ValueError(f"the renderer {renderer} needs vLLM: {error}") from error
    if renderer == HARMONY:
        return get_cached_tokenizer(load_tokenizer(Path(folder), trust_remote_code=trust_remote_code))
    try:
        return get_tokenizer(folder, tokenizer_mode=renderer, trust_remote_code=trust_remote_code)
    except Exception as error:  # mistral-common and transformers raise many kinds
        needs = "tekken.json or tokenizer.model.v*" if renderer == MISTRAL else "tokenizer.json"
        why = f"vLLM cannot load the tokenizer of {folder}, which needs {needs}: {error}"
        raise ValueError(f"engine.tokenizer_mode {renderer}: {why}") from error


def _online_renderer(renderer: str, tokenizer: Any, folder: str) -> Any:
    from vllm.entrypoints.openai.parser.harmony_utils import get_encoding
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.renderers.registry import RENDERER_REGISTRY

    config = _config(renderer, folder)
    mode = "hf" if renderer == HARMONY else renderer
    if renderer == HARMONY:
        try:
            get_encoding()
        except Exception as error:  # HarmonyError: a wrong file in TIKTOKEN_ENCODINGS_BASE
            raise ValueError(f"the harmony vocabulary cannot be loaded: {error}") from error
    return OnlineRenderer(
        config.model_config,
        RENDERER_REGISTRY.load_renderer(mode, config, tokenizer),
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
    )


def _config(renderer: str, folder: str) -> Any:
    """Return those fields of vLLM's configuration that its text renderers read.

    The configured context allows a prompt of any length, since the gateway checks the number of ids.
    """
    hf_config = SimpleNamespace(model_type="gpt_oss" if renderer == HARMONY else "")
    model = SimpleNamespace(
        model=folder,
        max_model_len=1 << 30,
        hf_config=hf_config,
        hf_text_config=hf_config,
        multimodal_config=None,
        is_multimodal_model=False,
        supports_multimodal_inputs=False,
        is_encoder_decoder=False,
        enable_prompt_embeds=False,
        renderer_num_workers=1,
        allowed_local_media_path="",
        allowed_media_domains=None,
        encoder_config=None,
    )
    parallel = SimpleNamespace(_api_process_rank=0, _api_process_count=1)
    return SimpleNamespace(model_config=model, parallel_config=parallel, observability_config=None)
