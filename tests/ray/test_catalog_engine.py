"""Test of changes of a model under load, with the real engine on a real Ray.

The model is added, gets a canary that is rolled back, is replaced, and is removed. Each version has different weights,
so an answer shows which version generated the answer: with greedy decoding, an answer is a prefix of the longest answer
of that version. No answer mixes two versions, is cut or fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.admin.v1 import catalog_pb2 as pb
from cluster.ray.backend import ChildBackend
from tests.ray.test_catalog_live import CALLERS, START_S, Load, operating
from tests.support.calls import chat, text_of
from tests.support.checkpoints import build_checkpoint
from tests.support.cluster import running_cluster, until
from tests.support.serving import removed

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.timeout(900)]


def group_by_prefix(texts: Sequence[str]) -> dict[str, int]:
    """Group texts that are prefixes of one another, and return the longest text of each group with the size of the
    group."""
    kinds: dict[str, int] = {}
    for text in sorted((text.rstrip("\ufffd") for text in texts), key=len, reverse=True):
        kind = next((kind for kind in kinds if kind.startswith(text)), text)
        kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


@pytest.mark.long
async def test_a_model_changes_under_load_on_the_real_engine(backend: ChildBackend, tmp_path: Path) -> None:
    """No call fails, and no answer mixes two versions, while a model changes under load."""
    sources = [build_checkpoint("llama", tmp_path / f"seed{seed}", seed) for seed in range(3)]
    async with running_cluster(tmp_path / "gateway") as cluster, operating(cluster, backend, tmp_path) as operator:
        load = Load(cluster)

        async def full_answer() -> str:
            request = chat(model="m", max_tokens=40, ignore_eos=True)
            return text_of([chunk async for chunk in cluster.stub.StreamChat(request)]).rstrip("\ufffd")

        entry: dict[str, Any] = {
            "name": "m",
            "source": str(sources[0]),
            "dtype": "float32",
            "max_model_len": 512,
            "engine": {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 16},
        }
        await operator.apply(entry)
        first = await operator.serve("v1")
        of_first = await full_answer()
        load.begin()
        await load.more(CALLERS)
        assert len(group_by_prefix([*load.texts, of_first])) == 1

        # a canary gets calls and is rolled back by hand
        canary = {
            "version": "v2",
            "weight": 0.5,
            "source": str(sources[1]),
            "rollback": {"error_ratio": 0, "ttft_ratio": 0},
        }
        await operator.apply({**entry, "canary": canary})
        assert first.items() <= (await operator.serve("v1", "v2")).items()
        await load.more(4 * CALLERS)
        assert len(group_by_prefix(load.texts)) == 2
        await operator.ask("Catalog.Rollback", pb.RollbackRequest(name="m", reason="by hand"))
        assert await operator.serve("v1") == first
        assert await full_answer() == of_first

        # the next version replaces the first
        await operator.apply({**entry, "version": "v3", "source": str(sources[2])})
        await until(lambda: set(operator.workers().values()) == {"v3"}, "it is replaced", START_S)
        of_last = await full_answer()
        await load.more(2 * CALLERS)

        # the model is removed: its streams end, and new calls get MODEL_NOT_FOUND
        await operator.apply(prune=True)
        await load.over()
        await until(lambda: operator.entry() is None, "the gateway has no entry of it", START_S)
        kinds = group_by_prefix([*load.texts, of_first, of_last])
        assert len(kinds) == 3, "one group for each version, none of two"
        assert not any(kind.startswith(of_first) and kind.startswith(of_last) for kind in kinds)
        print(f"{load.ended} calls, none failed, of versions {sorted(kinds.values())}")
    await removed(backend, "m")
