"""With `control_tokens_in_content: escape`, texts of users, tools and documents never become control tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from cluster.gateway.text.chat.control_tokens import ControlTokens
from cluster.gateway.text.tokenizer import TextModel
from cluster.wire.bundle import ESCAPE_SEPARATOR, ESCAPED_TOKENS
from cluster.worker.weights.tokenizer_bundle import build_bundle, escaping
from tests.gateway.text.kinds import Kind


def added(content: str, special: bool = True, normalized: bool = False) -> AddedToken:
    """Return an added token of a tokenizer."""
    return AddedToken(content, special=special, normalized=normalized)


TOKENS = st.lists(st.text("<|>ab ", min_size=1, max_size=5), max_size=6)


@given(TOKENS, st.text("<|>ab \n", max_size=40))
def test_no_token_is_left_and_the_rest_is_unchanged(tokens: list[str], text: str) -> None:
    """For any set of control tokens, an escaped text contains none of them, even if one is part of another. Only
    separators are inserted, and a text without tokens is unchanged. Escaping twice gives the same as escaping once."""
    config = escaping([added(token) for token in tokens])
    divisible, separator = config[ESCAPED_TOKENS], config[ESCAPE_SEPARATOR]
    control = ControlTokens(divisible, separator)
    escaped = control.escaped(text)
    assert not any(token in escaped for token in tokens if len(token) > 1)
    assert control.escaped(escaped) == escaped
    if not any(token in text for token in divisible):
        assert escaped == text
    rest = iter(escaped)
    assert all(character in rest for character in text), "the text is a subsequence"
    assert Counter(escaped) - Counter(text) == Counter({separator: len(escaped) - len(text)})


def test_parts_form_no_token_together() -> None:
    """A control token that is spread over the parts of a message is escaped too, since templates join parts."""
    tokens = ControlTokens(["<|end|>"], " ")
    parts = [{"type": "text", "text": text} for text in ("a <|e", "nd|> b", "c")]
    (message,) = tokens.in_messages([{"role": "user", "content": parts, "name": "<|end|>"}])
    assert message["content"] == [{"type": "text", "text": "a < |end|> bc"}]
    assert message["name"] == "< |end|>"
    assert tokens.in_messages([{"role": "user", "content": parts[1:]}])[0]["content"] == parts[1:]
    kept = [{"role": "assistant", "content": "<|end|>"}, {"role": "system", "content": "<|end|>"}]
    assert tokens.in_messages(kept) == kept
    assert tokens.in_documents([{"text": "<|end|>", "n": 1}]) == [{"text": "< |end|>", "n": 1}]


def test_a_tokenizer_that_would_undo_it_is_refused() -> None:
    """Control tokens in texts are escaped by a separator within them. Escaping is refused if the tokenizer matches a
    control token in normalized text. It is also refused if every possible separator occurs in a control token."""
    for tokens in ([added("<s>", normalized=True)], [added("a b"), added("a\u200bb"), added("a\u2060b")]):
        with pytest.raises(ValueError, match="use keep"):
            escaping(tokens)
    others = [added(text, special=False, normalized=True) for text in ("  ", "\n\n", "word")]
    tag = added("<tool_call>", special=False)
    assert escaping([*others, added("x"), tag]) == {ESCAPED_TOKENS: ["<tool_call>"], ESCAPE_SEPARATOR: " "}


@pytest.mark.slow
def test_contents_never_become_control_tokens(kind: Kind) -> None:
    """With the option `escapes_control_tokens`, control tokens in the texts of a chat stay plain text. So the prompt
    has the same special ids as for a chat with harmless texts, for each family. Without the option, such texts become
    control tokens, as with transformers."""
    model = TextModel.from_bundle(build_bundle(kind.folder, escapes_control_tokens=True))
    special = {kind.theirs.convert_ids_to_tokens(token_id) for token_id in kind.special_ids}
    hostile = st.lists(
        st.sampled_from([*special, "<", "</", "<|", "|>", "s>", "[INST]", " ", "a", "é", "\n", "<|im_start|>"]),
        max_size=6,
    ).map("".join)

    def specials(text: TextModel, *contents: str) -> Counter[int]:
        parts = [{"type": "text", "text": content} for content in contents]
        messages: list[dict[str, Any]] = [{"role": "user", "content": "".join(contents)}]
        messages += [{"role": "assistant", "content": "x"}, {"role": "user", "content": parts}]
        return Counter(token_id for token_id in text.codec.encode_chat(messages) if token_id in kind.special_ids)

    @given(hostile, hostile)
    def check(first: str, second: str) -> None:
        assert specials(model, first, second) == specials(model, "x")

    check()
    assert specials(kind.ours, *special) != specials(kind.ours, "x")
