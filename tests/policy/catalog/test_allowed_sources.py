"""Tests of the patterns of allowed model sources."""

from __future__ import annotations

import pytest

from cluster.policy.catalog.allowed_sources import is_allowed_source


@pytest.mark.parametrize(
    ("source", "patterns", "is_allowed"),
    [
        ("/weights/a", ("/weights/*",), True),
        ("/weights/a..b", ("/weights/*",), True),
        ("/weights/../secrets", ("/weights/*",), False),
        ("/weights/..", ("hf://*", "/weights/*"), False),
        ("s3://bucket/ours/../theirs", ("s3://bucket/ours/*",), False),
        ("../model", ("*",), True),
        ("hf://org/name", ("hf://org/*",), True),
        ("hf://other/name", ("hf://org/*",), False),
        ("anything", (), False),
    ],
)
def test_a_source_stays_in_the_folder_of_a_pattern(source: str, patterns: tuple[str, ...], is_allowed: bool) -> None:
    """A pattern allows every source that it matches, except a source that leads out of the folder that the pattern
    names."""
    assert is_allowed_source(source, patterns) is is_allowed
