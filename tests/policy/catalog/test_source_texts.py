"""Texts about sources, without credentials and places."""

from __future__ import annotations

import pytest

from cluster.policy.catalog.source_texts import without_credentials, without_places


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("403, url='https://user:word@host/a?key=secret'", "403, url='https://host/a'"),
        ("s3://key:secret@bucket/a: denied", "s3://bucket/a: denied"),
        ("hf://org/name@main is private?", "hf://org/name@main is private?"),
        ("r: 512 is above max_lora_rank 64", "r: 512 is above max_lora_rank 64"),
    ],
)
def test_credentials_are_removed(text: str, expected: str) -> None:
    """A URL in a text keeps neither its user and password nor its query."""
    assert without_credentials(text) == expected


@pytest.mark.parametrize(
    ("text", "source", "expected"),
    [
        ("there is no folder /data/x; use another", "/data/x", "there is no folder a path; use another"),
        ("no s3://b/x/f.json", "s3://user:word@b/x", "no the source/f.json"),
        ("org/name cannot be fetched", "hf://org/name@main", "the source cannot be fetched"),
        ("adapters[a]/adapter_model.safetensors has 1 byte", "/a", "adapters[a]/adapter_model.safetensors has 1 byte"),
        ("https://user:pw@host/a?sig=S 403", "https://user:pw@host/a?sig=S", "the source 403"),
        ("[Errno 13] Permission denied: '/mnt/x/y'", "/mnt/x", "[Errno 13] Permission denied: 'a path'"),
    ],
)
def test_places_are_hidden(text: str, source: str, expected: str) -> None:
    """Tenants see neither the source nor a path."""
    assert without_places(text, source) == expected
