"""A stand-in for a model, for the tests of client libraries. It answers the clients' prompts like a model that follows
instructions.

The stand-in reads two things in a prompt's text: the tools in the system message, and the last message. The engine of
loadtests/agents/scripted.py emits the answer's tokens. The tokens pass through vLLM's own parsers in a real worker.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from loadtests.agents.cases import Call
from loadtests.agents.formats import BY_NAME
from loadtests.agents.prepare import BEGIN_TURN, END, script_ids
from loadtests.agents.scripted import Scripts

FAMILY = BY_NAME["hermes"]
GREETING = "Hello! I am well, and you? How can I help you today?"
JOKE = {"setup": "Why do cats sit on keyboards?", "punchline": "To keep an eye on the mouse."}
THOUGHT = "The user wants me to think first."
_QUOTED = re.compile(r"'([^']+)'")
_NUMBER = re.compile(r"-?\d+")
_TOOL = re.compile(r'\{"type": "function", "function"')
_DECODER = json.JSONDecoder()


def tools_in(prompt: str) -> list[Mapping[str, Any]]:
    """Return the functions that a prompt offers as tools."""
    return [_DECODER.raw_decode(prompt, found.start())[0]["function"] for found in _TOOL.finditer(prompt)]


def argument(name: str, schema: Mapping[str, Any], text: str) -> Any:
    """Return a tool's argument: a number or a quoted string from the user's text, otherwise a default."""
    if schema.get("type") == "integer":
        numbers = _NUMBER.findall(text)
        return int(numbers[0]) if numbers else 3
    quoted = _QUOTED.findall(text)
    return quoted[0] if quoted else JOKE.get(name, name)


def call_for(tools: Sequence[Mapping[str, Any]], text: str) -> Call:
    """Return a call of the tool whose name is in the user's text, otherwise of the first tool. Of several names the
    longest counts."""
    named = sorted((tool for tool in tools if tool["name"] in text), key=lambda tool: len(tool["name"]))
    tool = named[-1] if named else tools[0]
    schema = tool.get("parameters") or {}
    properties = schema.get("properties") or {}
    required = schema.get("required") or ()
    return Call(tool["name"], {name: argument(name, properties[name], text) for name in required})


def answer_to(prompt: str) -> str:
    """Return the text that the model generates for a prompt."""
    if BEGIN_TURN not in prompt:  # of the completions API
        return GREETING
    tools = tools_in(prompt)
    role, _, last = prompt.split(BEGIN_TURN)[-2].removesuffix("\n").partition("\n")
    text = last.removesuffix(END)
    thought = THOUGHT if "Think before" in text else ""
    if tools and role == "user":
        return FAMILY.answer([call_for(tools, text)], reasoning=thought)
    if "joke" in text:
        return FAMILY.answer([], json.dumps(JOKE), reasoning=thought)
    return FAMILY.answer([], GREETING, reasoning=thought)


@dataclass
class _Answers:
    """A mapping from prompts to answers. An answer is made when its prompt is looked up."""

    tokenizer: Tokenizer
    known: dict[str, Sequence[int]] = field(default_factory=dict)

    def __getitem__(self, prompt: str) -> Sequence[int]:
        if prompt not in self.known:
            self.known |= script_ids(self.tokenizer, {prompt: answer_to(prompt)})
        return self.known[prompt]


@dataclass(frozen=True)
class ToyScripts(Scripts):
    """Prepared answers (scripts) to all prompts. The key of an answer is the text of its prompt."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ToyScripts:
        """Return scripts whose prompts and answers are encoded with `tokenizer`."""
        return cls(tokenizer, _Answers(tokenizer))  # type: ignore[arg-type] # of a mapping, only look-ups are used

    def key(self, prompt_token_ids: Sequence[int]) -> str:
        """Return the text of a prompt."""
        return str(self.tokenizer.decode(list(prompt_token_ids), skip_special_tokens=False))
