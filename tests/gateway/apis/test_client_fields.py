"""Coverage of the fields that official clients can send. Each is read, refused, or documented as without effect."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsStreaming
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsStreaming as CompletionParams
from openai.types.embedding_create_params import EmbeddingCreateParams as EmbeddingParams

from cluster.gateway.apis.anthropic.requests import COUNT_FIELDS, MESSAGES_FIELDS
from cluster.gateway.apis.openai.pooling_requests import EMBEDDINGS_FIELDS
from cluster.gateway.apis.openai.requests import CHAT_FIELDS, COMPLETION_FIELDS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "api.md"


def ignored(path: str) -> set[str]:
    """Return the fields of an endpoint that docs/api.md lists as fields without effect."""
    section = PAGE.read_text().split("## Fields without effect")[1].partition("\n## ")[0]
    (row,) = re.findall(rf"^\| `{path}` \| (.*?) \|", section, re.M)
    return set(re.findall(r"`(\w+)`", row))


@pytest.mark.parametrize(
    ("path", "fields", "client"),
    [("/v1/chat/completions", CHAT_FIELDS, ChatParams),
     ("/v1/completions", COMPLETION_FIELDS, CompletionParams),
     ("/v1/embeddings", EMBEDDINGS_FIELDS, EmbeddingParams),
     ("/v1/messages", MESSAGES_FIELDS, MessageCreateParamsStreaming),
     ("/v1/messages/count_tokens", COUNT_FIELDS, MessageCountTokensParams)],
)  # fmt: skip
def test_each_field_of_the_official_client_is_known(path: str, fields: frozenset[str], client: type) -> None:
    """Each request field of the official client is read, refused by name, or listed in docs/api.md as without effect.
    So a new field of a client is not ignored by accident."""
    known = client.__required_keys__ | client.__optional_keys__  # type: ignore[attr-defined]
    assert known - fields == ignored(path)
