"""The texts that the gateway computes for token ids. They equal the texts of transformers, and the token texts in
vLLM's log probabilities."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.gateway.text.kinds import TEXTS, Kind

pytestmark = pytest.mark.slow

LAW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@LAW
@given(text=TEXTS)
def test_decode_equals_transformers(kind: Kind, text: str) -> None:
    """The text that is decoded from a list of ids equals the text that transformers decodes, with and without special
    tokens."""
    ids = kind.ours.codec.encode_prompt(text)
    for skip in (True, False):
        assert kind.ours.decode(ids, skip_special_tokens=skip) == kind.theirs.decode(ids, skip_special_tokens=skip)


def test_token_text_equals_vllm(kind: Kind) -> None:
    """The text of each token by itself equals the text that vLLM reports in log probabilities, a leading space
    included."""
    from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

    ids = list(range(len(kind.theirs)))
    assert [kind.ours.token_text(i) for i in ids] == convert_ids_list_to_tokens(kind.theirs, ids)
