"""An engine for tests that answers with the prompt, or with parsed parts that the test sets."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cluster.api.output_parts import OutputPart, ParsedOutput
from cluster.api.ports import EngineDead
from cluster.api.types import RESUME_EXACT, EngineInfo, EngineLoad, EngineRequest, FinishReason, TokenOutput


class EchoEngine:
    """An engine whose output is the prompt's tokens.

    If `parts` is set, requests that ask for parsing get these parts. If `answer` is set, its tokens replace the
    prompt's tokens.
    """

    def __init__(self, vocab: int, *, step_s: float = 0.001, tokens_a_step: int = 16) -> None:
        self._vocab = vocab
        self._step_s = step_s
        self._tokens_a_step = tokens_a_step
        self._running: dict[str, EngineRequest] = {}
        self._done: dict[str, int] = {}
        self._work = asyncio.Event()
        self._is_dead = False
        self._steps = 0
        self.parts: Sequence[OutputPart] = ()
        """Parts of each answer; none for the prompt's text."""
        self.answer: Sequence[int] = ()
        """Token ids of each answer; none for the prompt's."""

    async def start(self) -> EngineInfo:
        """Implements `Engine.start`."""
        capabilities = (RESUME_EXACT, "tools:hermes", "reasoning:qwen3")
        return EngineInfo("echo", "sim", "1", 16, 4000, 64, 2048, 2048, self._vocab, capabilities=capabilities)

    async def submit(self, request: EngineRequest) -> None:
        """Implements `Engine.submit`."""
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
            self._raise_if_dead()
            self._work.clear()
            await self._work.wait()
        await asyncio.sleep(self._step_s)
        self._raise_if_dead()
        self._steps += 1
        outputs = [self._output(request) for request in self._running.values()]
        for output in outputs:
            if output.finish is not None:
                del self._running[output.request_id]
        return outputs

    def _output(self, request: EngineRequest) -> TokenOutput:
        at, prompt = self._done[request.request_id], request.prompt_token_ids
        answer = self.answer or prompt
        has_parts = request.parsing is not None and bool(self.parts)
        count = 1 if has_parts else self._tokens_a_step
        tokens = list(answer[at : at + count])
        self._done[request.request_id] = at + len(tokens)
        output = TokenOutput(request.request_id, tokens)
        if at == len(request.emitted_token_ids):
            output.prompt_tokens, output.cached_tokens = len(prompt), 0
        if at + len(tokens) >= len(answer) or has_parts:
            output.finish = FinishReason.STOP
        if has_parts:
            output.parsed = ParsedOutput(list(self.parts))
        return output

    def load(self) -> EngineLoad:
        """Implements `Engine.load`."""
        return EngineLoad(running=len(self._running), steps=self._steps)

    async def check(self) -> None:
        """Implements `Engine.check`."""
        self._raise_if_dead()

    async def close(self) -> None:
        """Implements `Engine.close`. A caller that waits in `step` gets EngineDead."""
        self._is_dead = True
        self._work.set()

    def _raise_if_dead(self) -> None:
        if self._is_dead:
            raise EngineDead("closed")
