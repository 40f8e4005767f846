"""Conversion of prompts into token ids, for calls and for the methods Tokenize and Detokenize."""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.gateway.apis.json_values import MAX_IDS
from cluster.gateway.calls import request as requests
from cluster.gateway.calls.meta import CallMeta
from cluster.gateway.calls.pooling.pooling_request import IdsInputs, PackedIds
from cluster.gateway.calls.pooling.pooling_request import too_long as input_too_long
from cluster.gateway.links.link_renders import RenderedPrompt
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.models.known_model import KnownModel
from cluster.gateway.quotas.reservations import QuotaReservations
from cluster.gateway.scheduling.chat_renders import ChatRenders, ChatToRender, ids_in_vocabulary, needs_worker
from cluster.gateway.text.text_codec import ANY_LENGTH
from cluster.gateway.text.tokenizer import TextModel
from cluster.policy.tenants.identity import Principal

FEW_IDS = 4096
"""Maximum number of token ids that are checked without numpy. Longer prompts are checked as a numpy array."""
READ_CHARS = 32_768
READ_CHARS_PER_TOKEN = 64
"""A request with more than READ_CHARS characters counts at least one token for each READ_CHARS_PER_TOKEN characters,
however few tokens are left of its texts. These tokens are charged before the texts are read."""


RenderChat = Callable[[bytes, int], Awaitable[RenderedPrompt]]
"""Function that lets a worker render a chat. Its arguments are the chat as JSON (text/chat/chat_json.py), and the
maximum prompt length in tokens; 0 for the model's context length. A longer prompt is returned without its token ids.
Raises CallError."""


class RendererOf(Protocol):
    """Function that chooses where a call's chats are rendered: in a worker or in the gateway."""

    def __call__(
        self, model: KnownModel, text: TextModel, meta: CallMeta, bundle_digest: str, priority_class: str
    ) -> RenderChat | None:
        """Return the function that lets a worker render a chat; None if the gateway renders the chats with the chat
        template.

        `text`: the tokenizer of the bundle `bundle_digest`. `priority_class`: the class that the request names; "" for
        the tenant's class.
        """


def worker_renderer(
    renders: ChatRenders,
    rank_of: Callable[[str], int],
    model: KnownModel,
    text: TextModel,
    meta: CallMeta,
    bundle_digest: str,
    priority_class: str,
) -> RenderChat | None:
    """Return the function that lets a worker render a call's chats; None if the gateway renders the chats itself.

    `renders`: decides in which order waiting chats get a worker. `rank_of`: returns the rank of a priority class. The
    other parameters have the same meaning as in the function type RendererOf.
    """
    if not needs_worker(model, bundle_digest, text.renderer, has_template=text.has_chat_template):
        return None
    policy = meta.principal.tenant
    rank = rank_of(priority_class or policy.priority_class)

    async def render(chat: bytes, max_tokens: int) -> RenderedPrompt:
        return await renders.render(ChatToRender(model, bundle_digest, policy, rank, chat, max_tokens, meta.deadline))

    return render


class Tokenization:
    """A gateway's RPCs Tokenize and Detokenize, and the token count of the Anthropic API. These requests use the
    models' tokenizers without opening a call."""

    def __init__(
        self,
        directory: ModelDirectory,
        reservations: QuotaReservations,
        renderer_of: RendererOf,
    ) -> None:
        """`renderer_of`: chooses where chats are rendered (see RendererOf)."""
        self._directory = directory
        self._reservations = reservations
        self._renderer_of = renderer_of

    def longest_context(self, principal: Principal) -> int:
        """Return the greatest context length, in tokens, of the models that a caller may use; MAX_IDS if the context
        length of one of these models is unknown."""
        lengths = [model.capabilities.max_model_len for model in self._directory.lookup.models_of(principal)]
        return max(lengths) if lengths and all(lengths) else MAX_IDS

    async def tokenize(self, name: str, prompt: requests.Prompt, meta: CallMeta) -> tuple[array[int], int]:
        """Encode a prompt and charge its tokens to the tenant. Returns the token ids and the model's context length.
        Raises CallError."""
        model = self._directory.lookup.resolve(name, meta.principal)
        text = await self._directory.text_model(model)
        render = self._renderer_of(model, text, meta, model.versions.bundle_digest(), "")
        prepaid = tokens_to_read(_chars(prompt))
        await self._reservations.charge(meta.principal.tenant, prepaid)
        ids = await encode(prompt, text, meta.tenant, model.capabilities.max_model_len, render=render)
        await self._reservations.charge(meta.principal.tenant, max(len(ids) - prepaid, 0))
        return ids, model.capabilities.max_model_len

    async def detokenize(self, name: str, token_ids: Sequence[int], meta: CallMeta) -> str:
        """Decode token ids into text and charge the ids to the tenant. Raises CallError."""
        model = self._directory.lookup.resolve(name, meta.principal)
        text = await self._directory.text_model(model)
        if model.capabilities.max_model_len and len(token_ids) > model.capabilities.max_model_len:
            raise invalid(
                "token_ids", f"at most {model.capabilities.max_model_len} (the model's context), got {len(token_ids)}"
            )
        ids = _in_vocabulary(token_ids, text.vocab_size, "token_ids") if len(token_ids) else array("I")
        await self._reservations.charge(meta.principal.tenant, len(ids))
        return await text.decode_async(meta.tenant, ids, "token_ids")


def tokens_to_read(chars: int) -> int:
    """Return the number of tokens that are charged before so many characters are read."""
    return chars // READ_CHARS_PER_TOKEN if chars > READ_CHARS else 0


def _chars(prompt: requests.Prompt) -> int:
    """Return the approximate number of characters of a prompt, if it is long and not given as token ids."""
    if isinstance(prompt, requests.PackedPrompt):
        return memoryview(prompt.packed).nbytes
    return len(prompt.text) if isinstance(prompt, requests.TextPrompt) else 0


async def encode(
    prompt: requests.Prompt,
    text: TextModel,
    tenant: str = "default",
    max_model_len: int = 0,
    cache_salt: str = "",
    render: RenderChat | None = None,
) -> array[int]:
    """Encode a prompt. A long prompt is encoded outside the event loop. `max_model_len`: maximum length in tokens; 0
    for any length. `cache_salt`: the ids of text blocks are reused only between prompts of the tenant that have the
    same salt. `render`: the function that lets a worker render a chat; None if chats are rendered with the chat
    template.

    Raises CallError. A text that certainly leaves no room for output is refused before it is tokenized.
    """
    if render is not None and isinstance(prompt, requests.ChatPrompt | requests.PackedPrompt) and prompt.is_chat:
        return await _rendered(prompt, text, tenant, max_model_len, render)
    if requests.is_chat(prompt) and not text.has_chat_template:
        raise CallError(
            Outcome.UNSUPPORTED_FEATURE, "the model has no chat template: use Complete with a formatted prompt"
        )
    most = max_model_len - 1 if max_model_len else ANY_LENGTH
    if isinstance(prompt, requests.PackedPrompt):
        ids = await text.packed_ids_async(tenant, prompt, most, cache_salt)
    elif isinstance(prompt, requests.ChatPrompt):
        return await text.chat_ids_async(tenant, prompt.messages, most, cache_salt, **prompt.template_options)
    elif isinstance(prompt, requests.TextPrompt):
        ids = await text.prompt_ids_async(tenant, prompt.text, most, cache_salt)
    else:
        if len(prompt.token_ids) > most:
            raise requests.too_long(len(prompt.token_ids), max_model_len, chat=False)
        ids = _in_vocabulary(prompt.token_ids, text.vocab_size)
    if not ids and not requests.is_chat(prompt):
        raise invalid("prompt", "must not be empty")
    return ids


def ids_of_inputs(
    inputs: IdsInputs, most: int, keep: int | None, vocab_size: int, *, cuts_left: bool = False
) -> Sequence[array[int]]:
    """Return the token ids of a pooling request that has ids as its inputs. `most`: the number of tokens that the
    model's context holds, 0 if unknown. `keep`: the number of tokens to which a longer input is cut, None for no cut.
    `cuts_left`: whether it is cut on the left. Raises CallError, which names the input."""
    lists = inputs.token_ids
    if isinstance(lists, PackedIds):
        _check_packed_ids(inputs, lists, vocab_size)
    out = []
    for i, ids in enumerate(lists):
        if not len(ids):
            raise invalid(inputs.path(i), "must not be empty")
        kept = ids if keep is None or len(ids) <= keep else ids[len(ids) - keep :] if cuts_left else ids[:keep]
        if len(kept) > most:
            raise input_too_long(inputs.path(i), len(kept), most)
        path = inputs.path(i) + inputs.field.inner
        out.append(kept if isinstance(kept, array) else _in_vocabulary(kept, vocab_size, path))
    return out


def _check_packed_ids(inputs: IdsInputs, lists: PackedIds, vocab_size: int) -> None:
    import numpy as np  # not imported at start: deferred_imports.py

    values = np.frombuffer(lists.ids, np.uint32)
    if values.size and values.max() >= vocab_size:
        at = int(np.argmax(values >= vocab_size))
        i, place = lists.place_of(at)
        raise invalid(f"{inputs.path(i)}{inputs.field.inner}[{place}]", _not_in_vocabulary(vocab_size, int(values[at])))


def _not_in_vocabulary(vocab_size: int, got: int) -> str:
    return f"must be in 0 to {vocab_size - 1} (the vocabulary), got {got}"


async def _rendered(
    prompt: requests.ChatPrompt | requests.PackedPrompt,
    text: TextModel,
    tenant: str,
    max_model_len: int,
    render: RenderChat,
) -> array[int]:
    rendered = await render(await text.chat_json_async(tenant, prompt), max(max_model_len - 1, 0))
    if not rendered.ids:
        raise requests.too_long(rendered.tokens, max_model_len or rendered.max_tokens, chat=True)
    return ids_in_vocabulary(rendered, text.vocab_size)


def _in_vocabulary(ids: Sequence[int], vocab_size: int, field: str = "prompt_token_ids") -> array[int]:
    if 0 < len(ids) <= FEW_IDS and min(ids) >= 0 and max(ids) < vocab_size:
        return array("I", ids)
    import numpy as np  # not imported at start: deferred_imports.py

    values = np.asarray(ids)
    if values.dtype.kind not in "iu":  # integers beyond 64 bits become objects
        values = np.asarray(ids, np.int64)
    wrong = np.flatnonzero((values < 0) | (values >= vocab_size))
    if wrong.size:
        i = int(wrong[0])
        raise invalid(f"{field}[{i}]", _not_in_vocabulary(vocab_size, int(values[i])))
    return array("I", values.astype(np.uint32).tobytes())
