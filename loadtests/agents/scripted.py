"""An engine that emits prepared tokens: the answer to each prompt is looked up by a mark in the prompt's text.

Headrace (ScriptedEngine) and vLLM's own server (vllm_server.py) use the same scripts, so both parse the same tokens.
Each side delivers the tokens in steps of random sizes, drawn from its own seed.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TextIO

from tokenizers import Tokenizer

from cluster.api.outcomes import Outcome
from cluster.api.ports import EngineDead, EngineRefused
from cluster.api.types import (
    RESUME_EXACT,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    FinishReason,
    TokenOutput,
)

MARK = "[case {}]"
_MARK = re.compile(r"\[case ([\w-]+)\]")
MARKED_TOKENS = 96
"""Number of the prompt's last tokens among which the mark is searched."""
LARGEST_STEP = 5
BLOCK_TOKENS, BLOCKS, SEQUENCES = 16, 1 << 20, 256
MAX_MODEL_TOKENS = 32_768


class NoScript(ValueError):
    """Raised for a prompt without the mark of a script."""


def steps(token_ids: Sequence[int], seed: str, largest: int = LARGEST_STEP) -> Iterator[Sequence[int]]:
    """Yield the tokens in steps of 1 to `largest` tokens. Equal seeds give equal steps."""
    draw, at = random.Random(seed), 0
    while at < len(token_ids):
        size = draw.randint(1, largest)
        yield token_ids[at : at + size]
        at += size


@dataclass(frozen=True, slots=True)
class Scripts:
    """Prepared answers of one model. `answers`: the token ids of each answer, by the answer's key. Each answer ends
    with the end token."""

    tokenizer: Tokenizer
    answers: Mapping[str, Sequence[int]]

    @classmethod
    def read(cls, model: Path, path: Path) -> Self:
        """Read the answers from a JSON file. `model`: the folder of the model."""
        return cls(Tokenizer.from_file(str(model / "tokenizer.json")), json.loads(path.read_text()))

    def key(self, prompt_token_ids: Sequence[int]) -> str:
        """Return the key of the prompt's script. Raises NoScript."""
        text = self.tokenizer.decode(list(prompt_token_ids[-MARKED_TOKENS:]), skip_special_tokens=False)
        marks = _MARK.findall(text)
        if not marks or marks[-1] not in self.answers:
            raise NoScript(f"no script for a prompt that ends with {text[-200:]!r}")
        return str(marks[-1])


class PromptLog:
    """A file of all prompts that one server's engine got. Each line is a JSON array: the key of the script that answers
    the prompt, and the prompt's token ids."""

    def __init__(self, path: Path) -> None:
        """Open the file for appending."""
        self._file: TextIO = path.open("a")
        self._seen: set[tuple[str, tuple[int, ...]]] = set()

    def add(self, key: str, token_ids: Sequence[int]) -> None:
        """Record a prompt. A prompt that was recorded for this key before is not recorded again."""
        ids = tuple(token_ids)
        if (key, ids) not in self._seen:
            self._seen.add((key, ids))
            self._file.write(json.dumps([key, ids]) + "\n")
            self._file.flush()


def read_prompts(path: Path) -> dict[str, list[tuple[int, ...]]]:
    """Return the distinct prompts of each key in a PromptLog's file."""
    out: dict[str, list[tuple[int, ...]]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        key, ids = json.loads(line)
        out.setdefault(key, []).append(tuple(ids))
    return out


class _Running:
    """A request of ScriptedEngine."""

    def __init__(self, request: EngineRequest, answer: Sequence[int], seed: str) -> None:
        done = len(request.emitted_token_ids)
        limit = request.sampling.max_tokens
        self.prompt_tokens: int | None = len(request.prompt_token_ids)
        self.finish = FinishReason.STOP if len(answer) <= limit else FinishReason.LENGTH
        self.steps = list(steps(answer[done:limit], seed))

    def next_output(self, request_id: str) -> TokenOutput:
        """Return the output of the next step."""
        token_ids = self.steps.pop(0) if self.steps else ()
        output = TokenOutput(request_id, list(token_ids), finish=None if self.steps else self.finish)
        if self.prompt_tokens is not None:
            output.prompt_tokens, output.cached_tokens, self.prompt_tokens = self.prompt_tokens, 0, None
        return output


class ScriptedEngine:
    """An Engine (cluster.api.ports) that emits prepared tokens (a script) for each prompt. Every step returns tokens
    for all running requests."""

    def __init__(
        self,
        scripts: Scripts,
        *,
        seed: int = 0,
        prompts: PromptLog | None = None,
        max_model_len: int = MAX_MODEL_TOKENS,
    ) -> None:
        """Create the engine. `prompts`: log of the prompts that the engine gets."""
        self._scripts = scripts
        self._max_model_len = max_model_len
        self._seed = seed
        self._prompts = prompts
        self._running: dict[str, _Running] = {}
        self._wake = asyncio.Event()
        self._steps = 0
        self._closed = False

    async def start(self) -> EngineInfo:
        """Return the engine's properties."""
        return EngineInfo(
            engine_class="scripted",
            engine_path="sim",
            engine_version="scripted-1",
            block_size=BLOCK_TOKENS,
            kv_blocks=BLOCKS,
            max_num_seqs=SEQUENCES,
            max_num_batched_tokens=self._max_model_len,
            max_model_len=self._max_model_len,
            vocab_size=self._scripts.tokenizer.get_vocab_size(),
            capabilities=(RESUME_EXACT,),
        )

    async def submit(self, request: EngineRequest) -> None:
        """Begin the script of the request's prompt. Raises EngineRefused for a prompt without a script."""
        try:
            key = self._scripts.key(request.prompt_token_ids)
        except NoScript as error:
            raise EngineRefused(Outcome.INVALID_FIELD.name, str(error), "messages") from error
        if self._prompts is not None:
            self._prompts.add(key, request.prompt_token_ids)
        seed = f"{self._seed}-{key}-{len(request.emitted_token_ids)}"
        self._running[request.request_id] = _Running(request, self._scripts.answers[key], seed)
        self._wake.set()

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests."""
        for request_id in request_ids:
            self._running.pop(request_id, None)

    async def step(self) -> Sequence[TokenOutput]:
        """Wait until there is a request, then return the next tokens of every request."""
        await asyncio.sleep(0)
        while not self._running:
            if self._closed:
                raise EngineDead("closed")
            self._wake.clear()
            await self._wake.wait()
        self._steps += 1
        outputs = [running.next_output(request_id) for request_id, running in self._running.items()]
        for output in outputs:
            if output.finish is not None:
                del self._running[output.request_id]
        return outputs

    def load(self) -> EngineLoad:
        """Return the number of running requests."""
        return EngineLoad(running=len(self._running), steps=self._steps)

    async def check(self) -> None:
        """Raise EngineDead if the engine is closed."""
        if self._closed:
            raise EngineDead("closed")

    async def close(self) -> None:
        """End the engine; a caller that waits in `step` gets EngineDead."""
        self._closed = True
        self._running.clear()
        self._wake.set()


class ScheduledRequest:
    """A request as an executor of vLLM's engine core sees it: each step schedules some of its tokens."""

    def __init__(self, prompt_tokens: int, tokens: Iterator[int]) -> None:
        """Create the request. `prompt_tokens`: number of the prompt's tokens that are not computed yet."""
        self._left = prompt_tokens
        self._tokens = tokens

    def tokens(self, scheduled: int) -> list[int]:
        """Record that `scheduled` more tokens are computed. Returns the next output token, or [] while part of the
        prompt is not computed."""
        self._left -= scheduled
        return [] if self._left > 0 else [next(self._tokens)]
