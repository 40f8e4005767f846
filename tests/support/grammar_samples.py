"""Random outputs of compiled JSON-schema grammars, drawn byte by byte, and a validator that judges them."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.worker.engine.vllm.grammar.json_strings import StrictCompiler

STOP = 256
_WEIGHTS = {**dict.fromkeys(b'"]}', 12.0), **dict.fromkeys(b":,", 4.0), **dict.fromkeys(b" \n\r\t", 0.05), STOP: 12.0}
_RARE = {**dict.fromkeys(range(0x20), 0.3), **dict.fromkeys(range(0x7F, 0x100), 0.1), ord("\\"): 0.5}


@functools.cache
def compiler() -> Any:
    """Return a grammar compiler with Headrace's repairs, for a vocabulary of the 256 bytes and STOP."""
    import xgrammar

    tokens = [bytes([byte]) for byte in range(256)] + [b"</s>"]
    info = xgrammar.TokenizerInfo(tokens, xgrammar.VocabType.RAW, vocab_size=len(tokens), stop_token_ids=[STOP])
    return StrictCompiler(xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False))


def compiled(schema: object) -> Any:
    """Return the grammar of a schema, compiled as in vLLM's repaired xgrammar backend.

    Raises RuntimeError for a schema that does not compile.
    """
    return compiler().compile_json_schema(json.dumps(schema), any_whitespace=True, separators=None)


def accepts(grammar: Any, text: str) -> bool:
    """Return whether the grammar accepts the whole text."""
    import xgrammar

    matcher = xgrammar.GrammarMatcher(grammar, terminate_without_stop_token=True)
    return bool(matcher.accept_string(text.encode()) and matcher.is_terminated())


def samples(grammar: Any, seed: int, count: int, longest: int = 300) -> Iterator[str]:
    """Yield up to `count` random outputs of a grammar. Outputs longer than `longest` bytes are left out."""
    import xgrammar

    draw, mask = random.Random(seed), xgrammar.allocate_token_bitmask(1, STOP + 1)
    for _ in range(count):
        matcher, output = xgrammar.GrammarMatcher(grammar), bytearray()
        keep = draw.choice((0.1, 1.0, 5.0))  # weight of the characters that make an output longer
        while len(output) <= longest:
            matcher.fill_next_token_bitmask(mask)
            words = mask[0].tolist()
            allowed = [token for token in range(STOP + 1) if words[token // 32] >> (token % 32) & 1]
            if not allowed:
                break
            (token,) = draw.choices(allowed, [_WEIGHTS.get(t) or keep * _RARE.get(t, 1.0) for t in allowed])
            assert matcher.accept_token(token)
            if token == STOP:
                with contextlib.suppress(
                    UnicodeDecodeError
                ):  # encoded halves of surrogate pairs, which no tokenizer has
                    yield output.decode()
                break
            output.append(token)


@functools.cache
def _validator() -> Any:
    """Return jsonschema's validator for draft 2020-12. Character classes in patterns are ASCII, as in ECMAScript."""
    import jsonschema

    def pattern(_: Any, expression: str, value: object, __: object) -> Iterator[Any]:
        python = expression.replace("(?<", "(?P<")  # the expressions judged here have no look-behind
        if isinstance(value, str) and not re.search(python, value, re.ASCII):
            yield jsonschema.ValidationError(f"{value!r} does not match {expression!r}")

    return jsonschema.validators.extend(jsonschema.Draft202012Validator, {"pattern": pattern})


def problem(schema: Mapping[str, object], text: str) -> str:
    """Return why a text is not JSON that satisfies the schema; empty if it satisfies the schema."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"no JSON: {error}"
    return next((wrong.message for wrong in _validator()(schema).iter_errors(value)), "")
