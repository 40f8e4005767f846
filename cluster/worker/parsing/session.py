"""One request in the parser process: its tokens go through vLLM's detokenizer and parser, one token at a time.

For a streamed answer, the parts are those that vLLM's own server would make if each step gave one token. An answer that
is not streamed is parsed as a whole, as in vLLM's own server. So the joined parts depend on the tokens alone, and the
parsing of a resumed request can begin with a replay of its tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

from cluster.api.output_parts import OutputPart, PartKind, merge_parts
from cluster.worker.parsing import wire
from cluster.worker.parsing.chat_requests import is_forced, may_call_tools
from cluster.worker.parsing.coalescing import Coalescing
from cluster.worker.parsing.wire import Part

PRIMING_TOKENS = 1024
"""Number of the prompt's last tokens with which the detokenizer begins. The text of the first output token depends on
the tokens before it. vLLM's server decodes the whole prompt, which gives the same text."""
REPLAYED_TOKENS = 256
"""Number of emitted tokens that are replayed in one parse, if that gives the same parts. A replay of a long output
token by token would take seconds, and no other output would be parsed meanwhile."""
_CONTENT, _REASONING, _TOOL_NAME, _TOOL_ARGUMENTS = map(
    int, (PartKind.CONTENT, PartKind.REASONING, PartKind.TOOL_NAME, PartKind.TOOL_ARGUMENTS)
)
"""The kinds of parts as plain numbers. A member of an enum takes several times as long to compare and to encode."""


class ParserSession:
    """The parsing of one request's output.

    `parser`: vLLM's Parser, made for this request. `request`: vLLM's ChatCompletionRequest, as `adjust` has changed it.
    """

    def __init__(
        self,
        opening: wire.Open,
        tokenizer: Any,
        parser: Any,
        request: Any,
        coalescing: Coalescing,
        working: Callable[[], None] = lambda: None,
        replays_together: bool = False,
    ) -> None:
        """Begin a session and replay its emitted tokens.

        `coalescing`: decides when to parse. `working`: is called from time to time during long work.
        `replays_together`: whether several emitted tokens may be replayed in one parse.
        """
        self._parser = parser
        self._request = request
        self._coalescing = coalescing
        self._working = working
        self._replays_together = replays_together
        self._reasons = parser.reasoning_parser is not None
        """Whether the output is still reasoning. Until the reasoning ends, replayed tokens are parsed one by one."""
        self._is_whole = opening.is_whole
        self._has_stops = bool(opening.stop)
        self._prompt: list[int] | None = wire.unpack_ids(opening.prompt)
        self._single = request.parallel_tool_calls is False
        self._detokenizer = _detokenizer(opening, tokenizer, request, self._prompt)
        self._ids = array("I")
        self._text = ""
        self._unparsed: list[int] = []
        self._parts: list[Part] = []
        self._stop = ""
        self._replay(wire.unpack_ids(opening.emitted))

    def _replay(self, emitted: Sequence[int]) -> None:
        """Parse the tokens that were emitted before this session began. The next call of `feed` returns the parts that
        result."""
        together = REPLAYED_TOKENS if self._replays_together else 1
        for token_id in emitted:
            if self._is_whole or self._reasons or together == 1:
                self._take(token_id, wire.RUNS)
            else:
                self._decode(token_id, wire.RUNS)
                if self._ended_by_stop() or len(self._unparsed) >= together:
                    self._parse(self._ended_by_stop())
            if self._ended_by_stop():
                return
        if self._unparsed:
            self._parse(False)

    def feed(self, number: int, ids: Sequence[int], state: int) -> wire.Parsed:
        """Parse the next tokens; return the result for the worker.

        `number`: the session's number. `state`: state of the output after these tokens (RUNS, STOPPED, ENDED or
        FAILED).
        """
        kept = len(ids)
        if state == wire.FAILED:
            return wire.Parsed(number, [], kept)
        if self._stop:
            kept = 0
        elif kept == 1:
            self._take(ids[0], state)
        elif ids:
            kept = self._take_all(ids, state)
        elif state != wire.RUNS:
            self._finish()
        new, self._parts = self._parts, []
        parts = merge_parts(new) if len(new) > 1 else cast("list[OutputPart]", new)
        if state == wire.RUNS and not self._stop:
            return wire.Parsed(number, parts, kept)
        return wire.Parsed(number, parts, kept, self._stop, self._reasoning_tokens())

    def _ended_by_stop(self) -> bool:
        return bool(self._stop)

    def _take_all(self, ids: Sequence[int], state: int) -> int:
        """Parse tokens until a stop string is found; return the number of tokens used."""
        last = len(ids) - 1
        for at, token_id in enumerate(ids):
            self._take(token_id, state if at == last else wire.RUNS)
            if self._ended_by_stop():
                return at + 1
        return len(ids)

    def _take(self, token_id: int, state: int) -> None:
        """Detokenize one token, and parse the output if a parse is due. `state`: the state of the output after this
        token (see `feed`)."""
        ended = self._decode(token_id, state)
        if self._is_whole:
            if ended:
                self._finish()
        elif ended or self._coalescing.is_due(len(self._ids)):
            self._parse(ended)

    def _decode(self, token_id: int, state: int) -> bool:
        """Detokenize one token, and search its text for stop strings; return whether the output has ended."""
        self._ids.append(token_id)
        if not len(self._ids) % REPLAYED_TOKENS:
            self._working()
        detokenizer = self._detokenizer
        stop = detokenizer.update([token_id], state == wire.STOPPED)
        if stop:
            self._stop = stop
        ended = bool(stop) or state != wire.RUNS
        if not self._is_whole:
            if ended and self._unparsed:  # parsers may finish differently if they get other tokens with the last
                self._parse(False)
            self._text += detokenizer.get_next_output_text(ended, True)
            self._unparsed.append(token_id)
        return ended

    def _finish(self) -> None:
        """At the end of the output, parse the tokens that are not parsed yet."""
        if self._is_whole:
            self._parse_whole()
        else:
            self._text += self._detokenizer.get_next_output_text(True, True)
            self._parse(True)

    def _parse(self, ended: bool) -> None:
        text, ids = self._text, self._unparsed
        self._text, self._unparsed = "", []
        delta = self._parser.parse_delta(
            delta_text=text,
            delta_token_ids=ids,
            request=self._request,
            prompt_token_ids=self._prompt,
            finished=ended,
        )
        self._prompt = None  # parsers read the prompt at their first token only
        if delta is None:
            return
        parts = _delta_parts(delta, self._single)
        if parts:
            self._parts += parts
            self._reasons = self._reasons and all(kind == _REASONING for kind, _, _ in parts)
            self._coalescing.record(len(self._ids), in_call=parts[-1][0] >= _TOOL_NAME)

    def _parse_whole(self) -> None:
        parser, request = self._parser, self._request
        parser.set_prompt_token_ids(self._prompt or [])
        reasoning, content, calls = parser.parse(
            self._detokenizer.get_next_output_text(True, False),
            request,
            enable_auto_tools=parser.tool_parser is not None,
            model_output_token_ids=self._detokenizer.output_token_ids,
        )
        if not may_call_tools(request) or (parser.tool_parser is None and not is_forced(request)):
            calls = None
        if reasoning:
            self._parts.append((PartKind.REASONING, reasoning, 0))
        if content:
            self._parts.append((PartKind.CONTENT, content, 0))
        for index, call in enumerate((calls or [])[: 1 if self._single else None]):
            self._parts.append((PartKind.TOOL_NAME, call.name, index))
            if call.arguments:
                self._parts.append((PartKind.TOOL_ARGUMENTS, call.arguments, index))

    def _reasoning_tokens(self) -> int:
        if self._parser.reasoning_parser is None:
            return 0
        return int(self._parser.count_reasoning_tokens(tuple(self._ids)))


def _delta_parts(delta: Any, single: bool) -> Sequence[Part]:
    """Return the parts in vLLM's DeltaMessage. `single`: whether to leave out all tool calls except the first."""
    parts: list[Part] = []
    if delta.reasoning:
        parts.append((_REASONING, delta.reasoning, 0))
    if delta.content:
        parts.append((_CONTENT, delta.content, 0))
    for call in delta.tool_calls or ():
        function = call.function
        if function is None or (single and call.index):
            continue
        if function.name:
            parts.append((_TOOL_NAME, function.name, call.index))
        if function.arguments:
            parts.append((_TOOL_ARGUMENTS, function.arguments, call.index))
    return parts


def _detokenizer(opening: wire.Open, tokenizer: Any, request: Any, prompt: list[int]) -> Any:
    """Return vLLM's incremental detokenizer, which also finds stop strings."""
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    params = SimpleNamespace(
        stop=list(opening.stop),
        min_tokens=opening.min_tokens,
        include_stop_str_in_output=False,
        skip_special_tokens=request.skip_special_tokens,
        spaces_between_special_tokens=request.spaces_between_special_tokens,
    )
    return IncrementalDetokenizer.from_new_request(
        tokenizer,
        SimpleNamespace(
            request_id="", prompt_token_ids=prompt[-PRIMING_TOKENS:], prompt_embeds=None, sampling_params=params
        ),
    )
