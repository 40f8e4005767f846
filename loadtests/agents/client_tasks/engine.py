"""A scripted engine that answers turns of tasks at the pace of a real engine, and kills its process at chosen
tokens.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cluster.api.types import EngineRequest, TokenOutput
from loadtests.agents.client_tasks.tasks import key_of_prompt
from loadtests.agents.scripted import MAX_MODEL_TOKENS, NoScript, ScriptedEngine, Scripts


class TurnScripts(Scripts):
    """Prepared answers of one model. The key of an answer names the task and the turn."""

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of a prompt, with its control tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def key(self, prompt_token_ids: Sequence[int]) -> str:
        """Return the key of the answer to a prompt. Raises NoScript."""
        key = key_of_prompt(self.text(prompt_token_ids))
        if key not in self.answers:
            raise NoScript(f"no script for {key}")
        return key


def kill_process() -> None:
    """End this process by SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


class PacedEngine(ScriptedEngine):
    """A ScriptedEngine that takes `pace_s` for each step, logs its requests, and kills its process at chosen tokens."""

    def __init__(
        self,
        scripts: TurnScripts,
        *,
        log: Path,
        folder: Path,
        deaths: Mapping[str, int],
        pace_s: float = 0.0,
        kill: Callable[[], None] = kill_process,
        seed: int = 0,
        max_model_len: int = MAX_MODEL_TOKENS,
    ) -> None:
        """Create the engine. `log`: file to which all engines append a JSON object for each request.

        `deaths`: maps the key of an answer to the number of its tokens after which the engine calls `kill`. `folder`:
        folder that all engines share. Before an engine calls `kill`, it writes a file for the answer into this folder,
        so that the worker that continues the answer does not call `kill` too.
        """
        super().__init__(scripts, seed=seed, max_model_len=max_model_len)
        self._kill = kill
        self._texts = scripts
        self._pace_s = pace_s
        self._log = log
        self._deaths = deaths
        self._folder = folder
        self._at: dict[str, tuple[str, int]] = {}

    async def submit(self, request: EngineRequest) -> None:
        """Begin the script of the request's prompt, and log it."""
        await super().submit(request)
        key, emitted = self._texts.key(request.prompt_token_ids), len(request.emitted_token_ids)
        self._at[request.request_id] = key, emitted
        entry = {"key": key, "prompt": self._texts.text(request.prompt_token_ids), "emitted": emitted}
        with self._log.open("a") as file:  # one write of a whole line: engines of several processes append
            file.write(json.dumps(entry) + "\n")

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests."""
        await super().abort(request_ids)
        for request_id in request_ids:
            self._at.pop(request_id, None)

    async def step(self) -> Sequence[TokenOutput]:
        """Wait `pace_s`, and return the next tokens of every request. Calls `kill` at a chosen token."""
        outputs = await super().step()
        await asyncio.sleep(self._pace_s)
        for output in outputs:
            key, before = self._at.pop(output.request_id)
            emitted = before + len(output.token_ids)
            if output.finish is None:
                self._at[output.request_id] = key, emitted
            if key in self._deaths and emitted >= self._deaths[key]:
                self._die(key)
        return outputs

    def _die(self, key: str) -> None:
        try:
            (self._folder / f"death-{key.replace('#', '-')}").touch(exist_ok=False)
        except FileExistsError:
            return
        self._kill()
