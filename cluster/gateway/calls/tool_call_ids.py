"""Ids of the tool calls in an answer. The gateway makes these ids itself and does not show the ids that parsers
make."""

from __future__ import annotations

from hashlib import blake2b
from string import ascii_letters, digits
from typing import Final

from cluster.gateway.calls.call import Call

LENGTH = 9
"""Number of characters of an id. Mistral's templates accept ids of exactly nine letters and digits, and most other
templates accept these ids too."""
NUMBERED: Final = frozenset({"kimi_k2", "kimi_k3"})
"""Parsers of models whose templates show ids as the model writes them: `functions.NAME:NUMBER`. The name and the number
are part of the prompt, so with other ids the prompt would have a format unknown to the model."""
_ALPHABET = ascii_letters + digits


def id_in_answer(call: Call, index: int, number: int, name: str) -> str:
    """Return the id of a tool call in the answer to `call`. `index`: the choice in the answer. `number`: number of the
    tool call in the choice, from 0. `name`: the called function. The id depends only on these arguments, the request
    and the call's id. So it stays the same after a resume at another gateway."""
    if call.sequences[index].tool_parser in NUMBERED:
        return numbered_id(name, call.tool_calls_before + number)
    return tool_call_id(call.shown_id, index, number)


def tool_call_id(call_id: str, index: int, call: int) -> str:
    """Return the id of a tool call. `call_id`: id of the call that is answered. `index`: the choice in the answer.
    `call`: number of the tool call in the choice, from 0."""
    number = int.from_bytes(blake2b(f"{call_id}/{index}/{call}".encode(), digest_size=16).digest())
    letters = []
    for _ in range(LENGTH):
        number, letter = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[letter])
    return "".join(letters)


def numbered_id(name: str, number: int) -> str:
    """Return the id of a call of the function `name`, as vLLM's server makes it for Kimi's models. `number`: number of
    earlier tool calls in the conversation, including those in the same answer."""
    return f"functions.{name}:{number}"
