"""Ids of the tool calls in an answer. The gateway derives the ids, and no parser's own ids are shown."""

from __future__ import annotations

from hashlib import blake2b
from string import ascii_letters, digits

LENGTH = 9
"""Number of characters of an id. Mistral's templates accept ids of exactly nine letters and digits, and all other
templates accept these ids too."""
_ALPHABET = ascii_letters + digits


def tool_call_id(call_id: str, index: int, call: int) -> str:
    """Return the id of tool call `call` in choice `index` of the answer to the call `call_id`."""
    number = int.from_bytes(blake2b(f"{call_id}/{index}/{call}".encode(), digest_size=16).digest())
    letters = []
    for _ in range(LENGTH):
        number, letter = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[letter])
    return "".join(letters)
