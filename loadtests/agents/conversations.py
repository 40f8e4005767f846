"""Conversations of coding agents, made of real prose and code: Python's language reference and standard library.

The conversations have the shape of agent traces published in 2026: 43 turns, 142,000 tokens at the end, and 96 % of the
input was already sent in earlier turns. A conversation begins with a system prompt and a task. Each further turn adds
the assistant's answer, with tool calls, and the results of these tools.
"""

from __future__ import annotations

import functools
import json
import random
import sysconfig
from pathlib import Path
from typing import Any, Final

from loadtests.datasets import prose

TURNS: Final = 43
FIRST_CHARS, ANSWER_CHARS = 60_000, 1_600
"""Characters of the system prompt, and of an assistant's answer."""
CHARS: Final = 560_000
"""Characters of a whole conversation."""
RESULT_CHARS: Final = (CHARS - FIRST_CHARS) // TURNS - ANSWER_CHARS
"""Characters of the tools' results in one turn."""
MODULES: Final = ("argparse", "ast", "asyncio/*", "collections/*", "dataclasses", "email/*", "enum", "http/*", "json/*")
MODULES_MORE: Final = ("logging/*", "pathlib", "pickle", "subprocess", "tarfile", "typing", "unittest/*", "zipfile")


@functools.cache
def code() -> str:
    """Return the source of many modules of the standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [file for name in (*MODULES, *MODULES_MORE) for file in sorted(folder.glob(f"{name}.py"))]
    return "\n".join(file.read_text() for file in files)


def excerpt(seed: str, chars: int) -> str:
    """Return `chars` characters of the standard library's source, from a seeded position on."""
    text = code()
    at = random.Random(seed).randrange(len(text) - chars)
    return text[at : at + chars]


def conversation(seed: str, scale: float = 1.0, system: str = "", count: int = TURNS) -> list[list[dict[str, Any]]]:
    """Return the messages of each turn of a conversation; a turn's messages begin with those of the turn before.

    `scale`: factor of all lengths. `count`: number of turns. `system`: seed of the system prompt, which other
    conversations may share.
    """
    first = prose(f"system/{system or seed}", round(FIRST_CHARS * scale))
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": first},
        {"role": "user", "content": f"Task {seed}: " + prose(f"task/{seed}", 400)},
    ]
    turns = [list(messages)]
    for number in range(1, count):
        messages += _turn(seed, number, scale)
        turns.append(list(messages))
    return turns


def _turn(seed: str, number: int, scale: float) -> list[dict[str, Any]]:
    """Return the messages that one turn adds to a conversation: an answer with a tool call, and the result of the tool.
    Every eighth turn has a user's message instead. `number`: number of the turn. `scale`: factor for the lengths of the
    texts."""
    said = prose(f"answer/{seed}/{number}", round(ANSWER_CHARS * scale))
    if number % 8 == 0:
        return [
            {"role": "assistant", "content": said},
            {"role": "user", "content": excerpt(f"{seed}/{number}", round(RESULT_CHARS * scale))},
        ]
    arguments = json.dumps({"path": f"lib/{number}.py", "first": number * 7, "pattern": said[:60]})
    call = {"id": f"call_{number}", "type": "function", "function": {"name": "read_file", "arguments": arguments}}
    result = excerpt(f"{seed}/{number}", round(RESULT_CHARS * scale))
    return [
        {"role": "assistant", "content": said, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": result},
    ]


def body(messages: list[dict[str, Any]], **more: object) -> bytes:
    """Return the body of a request of OpenAI's API, as clients in Python write it. `more`: fields to add or replace."""
    value = {"model": "agent", "messages": messages, "stream": True, "max_tokens": 444, **more}
    return json.dumps(value).encode()


def without_tools(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Convert the messages for a chat template that has no tools: each tool result becomes a message of the user."""
    roles = {"tool": "user"}
    return [{"role": roles.get(m["role"], m["role"]), "content": m["content"]} for m in messages]
