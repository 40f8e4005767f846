"""Loading of the parser class of one model, which comes from vLLM, and of the model's tokenizer.

The parser class and the tokenizer are loaded once, and used by the sessions, each of which parses one output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import structlog

from cluster.config.engine import PARSER_KEYS
from cluster.worker.parsing import wire
from cluster.worker.parsing.chat_requests import (
    WrongRequest,
    adjust,
    changed_grammar,
    chat_request,
    may_call_tools,
    reasoning_ended,
    template_kwargs,
)
from cluster.worker.parsing.coalescing import COALESCED, LONG_CALL, REPLAYED_TOGETHER, Coalescing
from cluster.worker.parsing.port import ParserNames
from cluster.worker.parsing.session import ParserSession
from cluster.worker.rendering.kit import renderer_tokenizer

NOT_STREAMING = ("phi4_mini_json",)
"""Parsers of tool calls that return nothing, not even content, for an incomplete output."""

log = structlog.get_logger("parser")


@dataclass(frozen=True, slots=True)
class KitSettings:
    """Settings of a parser process: the model's folder, which has its tokenizer, and the names of the parsers.

    `plugin`: path of a Python file that registers further reasoning parsers; "" for none. `long_call`: number
    of tokens from which on a tool call is long. A long call is parsed only from time to time, not after every
    token; 0: every call is parsed after every token.
    """

    folder: str
    names: ParserNames
    trust_remote_code: bool = False
    plugin: str = ""
    long_call: int = LONG_CALL
    renderer: str = ""
    """Renderer of the model's chats (rendering/families.py), whose tokenizer the parsers use; "" if gateways render the
    model's chat template."""


@dataclass(frozen=True, slots=True)
class ParserKit:
    """A model's tokenizer and vLLM's parser class for the model."""

    tokenizer: Any
    parser_class: Any
    long_call: int
    replays_together: bool = False
    """Whether several emitted tokens may be replayed in one parse."""
    streams: bool = True
    """Whether the parser can parse an incomplete output. If not, streamed answers with tools are parsed as a whole."""

    def open(
        self, opening: wire.Open, working: Callable[[], None] = lambda: None
    ) -> tuple[ParserSession | None, wire.Opened]:
        """Open a session; return the session and the reply to the worker. `working`: is called from time to time during
        long work.

        If the request is refused, return None and a reply with the reason.
        """
        try:
            return self._open(opening, working)
        except WrongRequest as wrong:
            return None, wire.Opened(opening.number, error=wrong.message, field=wrong.field)

    def _open(self, opening: wire.Open, working: Callable[[], None]) -> tuple[ParserSession, wire.Opened]:
        request = chat_request(opening.request, opening.grammar)
        before = request.extract_structured_outputs()
        kwargs = template_kwargs(request)
        adjust(self._make(request, kwargs), request)
        parser = self._make(request, kwargs)
        grammar = changed_grammar(request, before)
        ended = None
        if grammar is not None or before is not None:
            ended = reasoning_ended(parser, request, wire.unpack_ids(opening.prompt))
        if not self.streams and may_call_tools(request):
            opening = msgspec.structs.replace(opening, is_whole=True)
        request.include_reasoning = True  # the gateway hides the reasoning, and its guards read it
        session = ParserSession(
            opening, self.tokenizer, parser, request, Coalescing(self.long_call), working, self.replays_together
        )
        return session, wire.Opened(opening.number, grammar, ended, _as_json(kwargs) if ended is not None else "")

    def _make(self, request: Any, kwargs: dict[str, Any]) -> Any:
        try:
            return self.parser_class(self.tokenizer, request.tools, chat_template_kwargs=kwargs)
        except (ValueError, TypeError, KeyError) as error:
            raise WrongRequest("chat_template_kwargs", str(error)[:200]) from error


def _as_json(values: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in values.items() if value is not None})


def load_kit(settings: KitSettings) -> ParserKit:
    """Load the tokenizer and the parsers.

    Raises ValueError if vLLM has no parser with a name in `settings`, or if a parser cannot be used with the
    tokenizer.
    """
    return kit_of(_tokenizer(settings), settings)


def _tokenizer(settings: KitSettings) -> Any:
    """Return the model's tokenizer, wrapped in the same cache as in vLLM's server.

    Without the cache, each parser would read the vocabulary again.
    """
    from cluster.worker.weights.vocabulary import load_tokenizer

    try:
        from vllm.tokenizers.hf import get_cached_tokenizer
    except ImportError as error:
        raise ValueError(f"{_keys(settings.names)}: needs vLLM: {error}") from error

    if settings.renderer:
        return renderer_tokenizer(settings.renderer, settings.folder, trust_remote_code=settings.trust_remote_code)
    tokenizer = load_tokenizer(Path(settings.folder), trust_remote_code=settings.trust_remote_code)
    return get_cached_tokenizer(tokenizer)


def usable_parsers(settings: KitSettings, given: Container[str]) -> ParserNames:
    """Return those of the parsers in `settings` that can be used with the model's tokenizer.

    `given`: the keys with which the catalog entry names parsers. All other parsers were chosen by the model's
    family, and are left out if they cannot be used. Raises ValueError if a parser that the entry names cannot be
    used.
    """
    tokenizer = _tokenizer(settings)
    kept = settings.names
    for key, field in zip(PARSER_KEYS, ("tools", "reasoning"), strict=True):
        name = getattr(kept, field)
        if not name:
            continue
        try:
            kit_of(tokenizer, replace(settings, names=ParserNames(**{field: name})))
        except ValueError as error:
            if key in given:
                raise
            log.warning("parser.not_used", parser=name, reason=str(error))
            kept = replace(kept, **{field: ""})
    if kept.tools and kept.reasoning:
        kit_of(tokenizer, replace(settings, names=kept))
    return kept


def kit_of(tokenizer: Any, settings: KitSettings) -> ParserKit:
    """Return the ParserKit for a tokenizer that is already loaded. Raises ValueError as `load_kit` does."""
    try:
        from vllm.parser import ParserManager
    except ImportError as error:
        raise ValueError(f"{_keys(settings.names)}: this vLLM has no such parsers: {error}") from error
    names = settings.names
    if settings.plugin:
        from vllm.reasoning import ReasoningParserManager

        ReasoningParserManager.import_reasoning_parser(settings.plugin)
    is_harmony = "openai" in names.tools or "gptoss" in names.reasoning
    try:
        if is_harmony:
            _load_harmony()
        parser_class = ParserManager.get_parser(
            tool_parser_name=names.tools or None,
            reasoning_parser_name=names.reasoning or None,
            enable_auto_tools=bool(names.tools),
            model_name=settings.folder,
            is_harmony=is_harmony,
            tokenizer=tokenizer,
        )
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{_keys(names)}: {error}") from error
    if parser_class is None:
        raise ValueError("engine: neither tool_call_parser nor reasoning_parser is set")
    return ParserKit(
        tokenizer,
        parser_class,
        long_call=settings.long_call if names.tools in COALESCED else 0,
        replays_together=names.tools in REPLAYED_TOGETHER,
        streams=names.tools not in NOT_STREAMING,
    )


def _load_harmony() -> None:
    """Load the vocabulary of the harmony format now. Raises ValueError if that is impossible.

    vLLM would otherwise load it during the first request, and an error would fail that request.
    """
    from vllm.entrypoints.openai.parser.harmony_utils import get_encoding

    try:
        get_encoding()
    except Exception as error:  # HarmonyError and others: no network, or a wrong file
        why = "unset TIKTOKEN_ENCODINGS_BASE, or put the right o200k_base.tiktoken there"
        raise ValueError(f"the harmony vocabulary cannot be loaded: {error}; {why}") from error


def _keys(names: ParserNames) -> str:
    keys = (("tool_call_parser", names.tools), ("reasoning_parser", names.reasoning))
    return " and ".join(f"engine.{key} {name}" for key, name in keys if name)
