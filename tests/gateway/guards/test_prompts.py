"""Guards see every text of a chat that a template can put into the prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.calls.request import ChatPrompt
from cluster.gateway.calls.tools import function_tool
from cluster.gateway.guards.prompts import texts_of, with_texts

WORDS = st.text("abc", min_size=1, max_size=3)
VALUES = st.recursive(
    WORDS | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(WORDS, inner), max_leaves=5
)
OBJECTS = st.dictionaries(WORDS, VALUES, max_size=3)
PROMPTS = st.builds(
    ChatPrompt,
    st.lists(
        st.fixed_dictionaries({"role": st.just("user"), "content": WORDS | st.lists(st.builds(dict, text=WORDS))})
    ),
    OBJECTS,
    tools=st.lists(st.builds(function_tool, WORDS, WORDS, OBJECTS, st.booleans())),
    documents=st.lists(st.dictionaries(WORDS, WORDS)).map(tuple),
)


@pytest.mark.slow
@given(PROMPTS)
def test_every_text_can_be_rewritten(prompt: ChatPrompt) -> None:
    """The texts of a prompt can be extracted and put back, which gives the same prompt. If each text is put back in
    upper case, no text that the caller wrote stays in lower case. Such texts are in message contents, template
    arguments, tools with their schemas, and documents."""
    texts = texts_of(prompt)
    assert with_texts(prompt, texts) == prompt
    changed: Any = with_texts(prompt, [text.upper() for text in texts])
    written = replace(changed, messages=[message["content"] for message in changed.messages])
    values = [written.messages, list(written.template_kwargs.values()), list(written.documents)]
    values += [[v for k, v in tool["function"].items() if k != "strict"] for tool in written.tools]
    assert not set("abc") & set(json.dumps(values).replace('"text"', ""))
