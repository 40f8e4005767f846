"""A test engine whose outputs already have parts (content, reasoning, tool calls), as a worker's parser makes them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cluster.api.output_parts import OutputPart, ParsedOutput
from cluster.api.types import RESUME_EXACT, EngineInfo, EngineLoad, EngineRequest, FinishReason, TokenOutput

FIRST_ID = 40
"""Token id of the first token; each further token has the next id."""


class PartsEngine:
    """An engine that answers every request with the same tokens. The last token is a stop token.

    `script`: for each token, the parts of the parsed output that it completes. A request without parsing gets
    the tokens but no parts.
    """

    def __init__(
        self,
        script: Sequence[Sequence[OutputPart]],
        *,
        reasoning_tokens: int = 0,
        parses: bool = True,
        tool_parser: str = "hermes",
        step_s: float = 0.002,
    ) -> None:
        self._script = script
        self._reasoning_tokens = reasoning_tokens
        self._parses = parses
        self._tool_parser = tool_parser
        self._step_s = step_s
        self._running: dict[str, EngineRequest] = {}
        self._done: dict[str, int] = {}
        self._work = asyncio.Event()
        self.requests: list[EngineRequest] = []
        """All requests, in their order."""

    async def start(self) -> EngineInfo:
        """Implements `Engine.start`."""
        words = (f"tools:{self._tool_parser}", "reasoning:qwen3") if self._parses else ()
        return EngineInfo("parts", "sim", "1", 16, 1000, 8, 2048, 2048, 256, capabilities=(RESUME_EXACT, *words))

    async def submit(self, request: EngineRequest) -> None:
        """Implements `Engine.submit`."""
        self.requests.append(request)
        self._running[request.request_id] = request
        self._done[request.request_id] = len(request.emitted_token_ids)
        self._work.set()

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Implements `Engine.abort`."""
        for request_id in request_ids:
            self._running.pop(request_id, None)

    async def step(self) -> Sequence[TokenOutput]:
        """Implements `Engine.step`."""
        while not self._running:
            self._work.clear()
            await self._work.wait()
        await asyncio.sleep(self._step_s)
        outputs = [self._output(request) for request in self._running.values()]
        for output in outputs:
            if output.finish is not None:
                del self._running[output.request_id]
        return outputs

    def _output(self, request: EngineRequest) -> TokenOutput:
        at = self._done[request.request_id]
        self._done[request.request_id] = at + 1
        output = TokenOutput(request.request_id, [FIRST_ID + at])
        begins, ends = at == len(request.emitted_token_ids), at == len(self._script) - 1
        if begins:
            output.prompt_tokens, output.cached_tokens = len(request.prompt_token_ids), 0
        if ends:
            output.finish = FinishReason.STOP
        parsing = request.parsing
        if parsing is not None and self._parses:
            first = 0 if begins or parsing.is_whole else at
            seen = () if parsing.is_whole and not ends else self._script[first : at + 1]
            parts = [part for of_token in seen for part in of_token]
            output.parsed = ParsedOutput(parts, reasoning_tokens=self._reasoning_tokens if ends else 0)
        return output

    def load(self) -> EngineLoad:
        """Implements `Engine.load`."""
        return EngineLoad(running=len(self._running))

    async def check(self) -> None:
        """Implements `Engine.check`."""

    async def close(self) -> None:
        """Implements `Engine.close`."""
