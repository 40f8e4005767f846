"""Prompts for the load tests: random words of chosen lengths, with or without shared prefixes; questions from
MT-bench; or prompts from the blocks of a trace. Equal seeds give equal prompts.

The driver has no tokenizer, so lengths are numbers of words from `WORDS`. Such a word is one token or a few
tokens in any English tokenizer. The report contains the token counts that the server reports.
"""

from __future__ import annotations

import functools
import importlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

from loadtests import traces
from loadtests.faces.base import Request
from loadtests.traces import DEFAULT_FOLDER, NoData, Traced

_TEXT = (
    "the of and to in is that it was for on are with as his they be at one have this from or had by hot but some what "
    "there we can out other were all your when up use word how said an each she which do their time if will way about "
    "many then them would write like so these her long make thing see him two has look more day could go come did my "
    "sound no most number who over know water than call first people may down side been now find"
)
WORDS = tuple(_TEXT.split())
BLOCK_WORDS = 512
NAMES = ("fixed", "prefixes", "mt-bench", *traces.TRACES)


def words(seed: str, count: int) -> str:
    """Return `count` words. Equal seeds give equal words. For one seed, a longer text begins with the shorter text."""
    rng = random.Random(seed)
    return " ".join(rng.choices(WORDS, k=max(count, 1)))


@functools.cache
def reference() -> str:
    """Return Python's language reference from help(): real prose with some code."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(topics[name] for name in sorted(topics))


def prose(seed: str, size_bytes: int) -> str:
    """Return `size_bytes` bytes of Python's language reference, from a seeded position on."""
    text = reference()
    at = random.Random(seed).randrange(len(text))
    return (text[at:] + text)[:size_bytes].encode()[:size_bytes].decode("utf-8", "ignore")


def fixed(count: int, prompt_words: int, max_tokens: int, seed: int, chat: bool = True) -> list[Request]:
    """Return prompts of one length. Each prompt begins with its number, so that no prefix is shared."""
    return [
        Request(f"fixed-{seed}-{i}", f"{i} {words(f'{seed}/{i}', prompt_words)}", max_tokens, chat)
        for i in range(count)
    ]


def prefixes(
    count: int, groups: int, prefix_words: int, own_words: int, max_tokens: int, seed: int, chat: bool = True
) -> list[Request]:
    """Return prompts in `groups` groups. All prompts of a group begin with the prefix of the group."""
    rng = random.Random(f"{seed}/groups")
    out = []
    for i in range(count):
        group = rng.randrange(groups)
        prompt = f"{words(f'{seed}/prefix/{group}', prefix_words)} {words(f'{seed}/own/{i}', own_words)}"
        out.append(Request(f"prefixes-{seed}-{i}", prompt, max_tokens, chat, group=f"prefix-{group}"))
    return out


def mt_bench(count: int, max_tokens: int, seed: int, folder: Path = DEFAULT_FOLDER) -> list[Request]:
    """Return `count` requests, each with the first turn of a question of MT-bench. `seed` determines the order of the
    questions. If there are fewer than `count` questions, they are repeated from the beginning of that order."""
    path = traces.data_file(folder, "fastchat/mt_bench_question.jsonl")
    questions = [json.loads(line) for line in path.read_text().splitlines()]
    random.Random(seed).shuffle(questions)
    picked = [questions[i % len(questions)] for i in range(count)]
    return [
        Request(f"mt-{q['question_id']}-{i // len(questions)}", q["turns"][0], max_tokens, group=q["category"])
        for i, q in enumerate(picked)
    ]


def from_trace(requests: Sequence[Traced], scale: float, seed: int, max_tokens: int = 0) -> list[Request]:
    """Return the requests of a trace, with each length multiplied by `scale`. Equal blocks of the trace give equal
    text, so prompts share prefixes as in the trace."""
    out = []
    for i, traced in enumerate(requests):
        if traced.blocks:
            each = max(1, round(BLOCK_WORDS * scale))
            prompt = " ".join(words(f"{seed}/block/{block}", each) for block in traced.blocks)
        else:
            prompt = words(f"{seed}/{i}", round(traced.prompt_tokens * scale))
        tokens = max(1, round(traced.output_tokens * scale))
        tokens = min(tokens, max_tokens) if max_tokens else tokens
        out.append(Request(f"trace-{seed}-{i}", prompt, tokens, group=traced.tenant))
    return out


def check_name(name: str) -> str:
    """Return `name` unchanged. Raises NoData for an unknown name."""
    if name not in NAMES:
        raise NoData(f"unknown dataset {name!r}: there are {', '.join(NAMES)}")
    return name
