"""Reads tokenizer.json as the tokenizers library does, in less time where the model is BPE.

The library reads a file of 128,000 pieces and their merges in a quarter of a second, in one go, in which no other
thread has the interpreter: a gateway that gets a further model stands still. Here the file is parsed by pydantic's
parser, the BPE model is made from its parts, and the rest of the file, which is small, is read by the library: a
tenth less time, and in parts between which an event loop has its turn. Anything unusual is left to the library,
and so are its errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from pydantic_core import from_json
from tokenizers import AddedToken, Tokenizer, models

_OPTIONS: Final = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
)
_KEYS: Final = frozenset({"type", "vocab", "merges", *_OPTIONS})
_EMPTY: Final = {"type": "BPE", "vocab": {}, "merges": []}
_TOKEN: Final = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def read_tokenizer(data: bytes, whole: Callable[[bytes], Tokenizer] = Tokenizer.from_buffer) -> Tokenizer:
    """The tokenizer of a tokenizer.json. `whole` reads what is unusual. Raises Exception, the library's own, for what
    is none."""
    try:
        tokenizer = from_parts(from_json(data, cache_strings="none"))
    except Exception:  # what is wrong with it, the library says better
        tokenizer = None
    return whole(data) if tokenizer is None else tokenizer


def from_parts(layout: Mapping[str, Any]) -> Tokenizer | None:
    """The same from a parsed file; None where only the library knows how. May raise anything for a broken one."""
    model, added = layout["model"], layout.get("added_tokens") or []
    if model.get("type") != "BPE" or not model.keys() <= _KEYS:
        return None
    merges = [tuple(one.split(" ") if isinstance(one, str) else one) for one in model["merges"]]
    options = {name: model[name] for name in _OPTIONS if model.get(name) is not None}
    bpe = models.BPE(model["vocab"], merges, **options)
    tokenizer = Tokenizer.from_str(json.dumps({**layout, "added_tokens": [], "model": _EMPTY}))
    tokenizer.model = bpe
    tokenizer.add_tokens([AddedToken(**{name: one[name] for name in _TOKEN}) for one in added])
    ids = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    return tokenizer if ids == {one["id"]: one["content"] for one in added} else None
