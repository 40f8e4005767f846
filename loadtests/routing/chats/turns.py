"""Chats with scripted answers. Their turns are played on a server or a fleet."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.datasets import words
from loadtests.serving.ours import MODEL

TURNS, CONCURRENCY, TOKENS = 12, 4, 8
SYSTEM_WORDS, FIRST_WORDS, USER_WORDS, ASSISTANT_WORDS = 60, 640, 20, 20
"""Words of the messages. The first message of a user is a document, so that the chats need most of their KV tokens from
the first turn on. Every prompt has more than MIN_TOKENS tokens, so each call is predicted."""

Post = Callable[[Mapping[str, object]], Awaitable[Mapping[str, Any]]]
"""Function that sends the request of a chat and returns the answer."""


@dataclass(slots=True)
class Chat:
    """A chat with scripted answers, so that its prompts are equal on every engine."""

    number: int
    seed: int
    salt: str
    turn: int = 0

    def body(self) -> Mapping[str, object]:
        """Return the request of the current turn."""
        messages = [{"role": "system", "content": words(f"{self.seed}/system", SYSTEM_WORDS)}]
        for turn in range(self.turn + 1):
            name = f"{self.seed}/{self.number}/{turn}"
            messages.append({"role": "user", "content": words(f"{name}/user", USER_WORDS if turn else FIRST_WORDS)})
            if turn < self.turn:
                messages.append({"role": "assistant", "content": words(f"{name}/assistant", ASSISTANT_WORDS)})
        sampling = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True}
        return {"model": MODEL, "messages": messages, "cache_salt": self.salt, **sampling}


@dataclass(frozen=True, slots=True)
class Tokens:
    """Prompt tokens and cached tokens of calls."""

    prompt: int = 0
    cached: int = 0

    @property
    def rate(self) -> float:
        """Share of the prompt tokens that was cached."""
        return self.cached / max(self.prompt, 1)


async def play(chats: Sequence[Chat], seed: int, post: Post) -> Tokens:
    """Play all turns of chats, CONCURRENCY calls at a time.

    The next turn is always taken from an idle chat (one without a running call). The chat is drawn at random
    from the quarter of the idle chats that has waited longest, because people take similar pauses.
    """
    rng, idle, running = random.Random(seed), list(chats), set[asyncio.Task[None]]()
    prompt = cached = 0

    async def turn(chat: Chat) -> None:
        nonlocal prompt, cached
        usage = (await post(chat.body()))["usage"]
        prompt += usage["prompt_tokens"]
        cached += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        chat.turn += 1
        if chat.turn < TURNS:
            idle.append(chat)

    while idle or running:
        while idle and len(running) < CONCURRENCY:
            running.add(asyncio.create_task(turn(idle.pop(rng.randrange(max(len(idle) // 4, 1))))))
        done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    return Tokens(prompt, cached)
