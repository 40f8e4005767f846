"""The properties of a model that the controller reads from the model's bundle."""

from __future__ import annotations

import pytest

from cluster.controller.bundling import describe
from cluster.wire.bundle import Bundle


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("4096", 4096),
        ("1e30", 0),
        ("3000000000", 0),
        ("Infinity", 0),
        ("[4096]", 0),
        ('"4096"', 0),
        ("-1", 0),
        ("null", 0),
    ],
)
def test_the_length_of_a_context(text: str, length: int) -> None:
    """The length in config.json is used if a message can hold it. Anything else counts as unknown and raises no
    error, which would end the controller."""
    bundle = Bundle({"config.json": b'{"max_position_embeddings": %s}' % text.encode()})
    assert describe(bundle).max_model_len == length
