"""Isolation of the prefix cache, with a real engine and gateway: a cached prefix is found only within its cache
group.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.cluster import bundle_of
from tests.support.keyed import keyed_cluster
from tests.worker.engine.contract import Subject

pytestmark = pytest.mark.engine


async def test_no_hit_crosses_cache_groups(tmp_path: Path, llama_folder: Path, fast_subject: Subject) -> None:
    """Two tenants of one cache group share a cached prefix. A tenant without a group gets cache hits only for prefixes
    that it has sent itself, even if its requests have the name, group or key of another tenant as `cache_salt`."""
    async with keyed_cluster(tmp_path) as keyed:
        await keyed.cluster.add_worker(fast_subject.engine, bundle_of(llama_folder), info=fast_subject.info)
        keys = {
            "alone": await keyed.key("alone"),
            "one": await keyed.key("one", cache_group="both"),
            "two": await keyed.key("two", cache_group="both"),
            "stranger": await keyed.key("stranger"),
        }
        prompt = fast_subject.prompt(77, tokens=200)

        async def cached(tenant: str, salt: str = "") -> int:
            body = {"model": "sim", "prompt": list(prompt), "max_tokens": 1, "temperature": 0}
            salted = {"cache_salt": salt} if salt else {}
            reply = await keyed.fetch("/v1/completions", body | salted, key=keys[tenant])
            assert reply.status == 200
            details = reply.json["usage"].get("prompt_tokens_details") or {}
            return int(details.get("cached_tokens") or 0)

        block = fast_subject.info.block_size
        whole = (len(prompt) - 1) // block * block
        assert [await cached("alone"), await cached("alone")] == [0, whole]
        assert [await cached("one"), await cached("two")] == [0, whole]
        assert await cached("stranger") == 0
        for salt in ("alone", "one", "both", keys["alone"], keys["one"]):
            assert await cached("stranger", salt) == 0
        assert await cached("alone") == whole
