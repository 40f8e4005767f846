"""Encoding a text in blocks, some of them from memory, gives the ids of the whole text."""

from __future__ import annotations

import json
from array import array
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from cluster.gateway.text.encoding import block_encoder
from cluster.gateway.text.encoding.block_encoder import BlockEncoder
from cluster.gateway.text.encoding.prompt_memory import PromptMemory
from tests.gateway.text.cut_tokenizers import ODD_TEXTS, TOKENIZERS, ids_of
from tests.gateway.text.kinds import Kind, with_template

LAW = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def encoder_of(tokenizer: Tokenizer, chars: int = 1) -> BlockEncoder | None:
    """Return the encoder of a tokenizer, or None if the tokenizer's texts cannot be cut into blocks. The blocks are so
    small that even a short text has several."""
    layout = json.loads(tokenizer.to_str())
    return BlockEncoder.of(tokenizer, layout, token_cut_chars=chars, word_cut_chars=2 * chars)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_equal_those_from_scratch(name: str) -> None:
    """Encoding a text in blocks gives the same token ids as encoding the whole text at once, with and without special
    tokens. Each text repeats parts of earlier texts. The ids are also equal if a helper process cuts the texts."""
    tokenizer = TOKENIZERS[name]
    memory = PromptMemory(20_000)  # small, so that blocks are evicted too

    @LAW
    @given(texts=st.lists(st.tuples(ODD_TEXTS, st.integers(0, 99)), max_size=6), chars=st.sampled_from([1, 9]))
    def law(texts: list[tuple[str, int]], chars: int) -> None:
        encoder = encoder_of(tokenizer, chars)
        assert encoder is not None
        before = ""
        for number, (text, kept) in enumerate(texts):
            text = before = before[: len(before) * kept // 100] + text + before[len(before) * kept // 50 :]
            special = number % 2 == 0
            expected = tokenizer.encode(text, add_special_tokens=special).ids
            recall = encoder.recall(memory, "acme", add_special_tokens=special)
            missing = recall.missing(encoder.begin(text))
            other = encoder.recall(memory, "acme", add_special_tokens=special)
            assert encoder.encode(text, other).tolist() == expected
            assert recall.ids(encoder.finish(missing)).tolist() == expected

    law()


DROPS_REASONING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set text = m.content %}{% if loop.index0 < ns.last %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ text }}<|im_end|>\n{% endfor %}"
)
MOVES_TOOLS = (  # as Mistral's do
    "{{ bos_token }}{% for m in messages %}"
    "{% if loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
COUNTS = "{{ messages | length }} messages <s>{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
TEMPLATES = {"drops reasoning": DROPS_REASONING, "moves the tools": MOVES_TOOLS, "counts first": COUNTS}
TOOLS = [{"type": "function", "function": {"name": "read", "description": "Read a file. " * 20}}]
WORDS = "The river turns the wheel, and 12 boats wait. def add(a, b):\n    return a + b\n\n"
MESSAGES = st.lists(
    st.tuples(
        st.sampled_from(["user", "assistant", "tool"]),
        st.integers(0, 40).map(lambda times: WORDS * times),
        st.sampled_from(["", "</think>", "<|im_end|>", "[INST]", "世界 🎉"]),
        st.integers(0, 40).map(lambda times: WORDS[::-1] * times),
    ).map(lambda parts: {"role": parts[0], "content": "".join(parts[1:])}),
    min_size=1,
    max_size=6,
)


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
def test_turns_equal_those_from_scratch(kind: Kind, template: str) -> None:
    """The block encoder gives each turn of a conversation the same ids as tokenizing the whole conversation anew, even
    if a template changes the text of earlier messages."""
    model = with_template(kind, {"default": TEMPLATES[template]})

    @settings(max_examples=12, deadline=None)
    @given(messages=MESSAGES)
    def law(messages: list[dict[str, Any]]) -> None:
        for end in range(1, len(messages) + 1):
            turn = messages[:end]
            assert model.codec.chat_ids("acme", turn, tools=TOOLS).tolist() == model.codec.encode_chat(
                turn, tools=TOOLS
            )

    law()


def turns(count: int, said: str = "") -> str:
    """Return the text of a conversation with `count` messages. `said`: text that is added to the second message."""
    lines = [f"{'It was said: ' * 20}{i} boats wait at mill {i * i}." for i in range(count)]
    if count > 1:
        lines[1] += said
    return "".join(f"<|start_header_id|>user<|end_header_id|>\n\n{line}<|eot_id|>" for line in lines)


def missing_chars(encoder: BlockEncoder, memory: PromptMemory, text: str, tenant: str = "acme", salt: str = "") -> int:
    """Encode a text. Returns the number of characters that were not found in memory."""
    blocks = encoder.cut(text)
    recall = encoder.recall(memory, tenant, salt, add_special_tokens=False)
    missing = recall.missing(encoder.begin(text))
    recall.ids(encoder.finish(missing))
    return sum(len(blocks[i]) for i in missing)


@pytest.mark.parametrize("name", ["llama3", "llama3, odd tokens"])
def test_a_turn_costs_its_new_part(name: str) -> None:
    """For the next turn of a conversation, only the new messages and a changed earlier message are encoded. For another
    tenant, or for the same tenant with another salt, the whole conversation is encoded at first."""
    encoder, memory = encoder_of(TOKENIZERS[name], 100), PromptMemory()
    assert encoder is not None
    whole, message = len(turns(40)), len(turns(1))
    assert missing_chars(encoder, memory, turns(40)) == whole
    assert missing_chars(encoder, memory, turns(42)) < 4 * message
    assert missing_chars(encoder, memory, turns(42, "A new word.")) < 3 * message
    assert missing_chars(encoder, memory, turns(42), "other") == len(turns(42))
    assert missing_chars(encoder, memory, turns(42), salt="mine") == len(turns(42))
    assert missing_chars(encoder, memory, turns(42), salt="mine") < message


def test_models_share_a_memory() -> None:
    """If two models share one prompt memory, each model gets only its own ids, even for equal texts."""
    memory = PromptMemory()
    for salt, name in ((b"1", "llama3"), (b"2", "falcon")):
        tokenizer = TOKENIZERS[name]
        encoder = BlockEncoder.of(tokenizer, json.loads(tokenizer.to_str()), salt=salt)
        assert encoder is not None
        text = turns(100)
        for _ in range(2):
            ids = encoder.encode(text, encoder.recall(memory, "acme", add_special_tokens=False))
            assert ids.tolist() == ids_of(tokenizer, text)
    assert memory.bytes_of("acme") == memory.bytes > 0


def test_a_giant_text_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text with more new ids than MAX_REMEMBERED_BYTES is encoded and not remembered."""
    monkeypatch.setattr(block_encoder, "MAX_REMEMBERED_BYTES", 40_000)
    tokenizer = TOKENIZERS["llama3"]
    encoder, memory = BlockEncoder.of(tokenizer, json.loads(tokenizer.to_str())), PromptMemory()
    assert encoder is not None
    text = "<|eot_id|>" * 10_001
    ids = encoder.encode(text, encoder.recall(memory, "acme", add_special_tokens=True))
    assert ids == array("I", tokenizer.encode(text).ids)
    assert memory.bytes == 0


def test_a_lone_surrogate_is_the_tokenizers_error() -> None:
    """A text with a lone surrogate raises TypeError, wherever in the text it is."""
    encoder = encoder_of(TOKENIZERS["llama3"])
    assert encoder is not None
    for text in ("a \ud800", "a " * 50 + "\ud800", "\ud800 a" * 50):
        with pytest.raises(TypeError):
            encoder.encode(text, encoder.recall(PromptMemory(), "acme", add_special_tokens=False))


def test_a_tokenizer_without_cuts_encodes_whole() -> None:
    """A tokenizer that treats special tokens as text, and whose pieces may contain a space, gets no block encoder. Its
    texts are therefore encoded whole."""
    tokenizer = Tokenizer.from_str(TOKENIZERS["llama3"].to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert encoder_of(tokenizer) is not None
    tokenizer.encode_special_tokens = True
    assert encoder_of(tokenizer) is None
