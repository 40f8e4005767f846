"""Adapters on two ranks, and on the public path (AsyncLLM). Each test starts its own engine; run by `make
contract-v2`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.api.ports import EngineCorrupt, EngineRefused
from cluster.worker.engine.vllm.engine import VllmEngine
from tests.support.adapters import write_adapter
from tests.support.merged_adapters import MergedAdapters
from tests.worker.engine.conftest import TOKEN_HI, TOKEN_LO, tiny_spec
from tests.worker.engine.contract import Driver, Subject
from tests.worker.engine.vllm.test_adapters import ANSWER_TOKENS, ENGINE, RANK, load, tokens, with_adapter

pytestmark = pytest.mark.engine


async def test_two_ranks_serve_adapters_until_a_load_fails(llama_folder: Path, tmp_path: Path) -> None:
    """With all slots full, the base model and the adapters give the right tokens on two ranks. A failed load mixes up
    the replies of the ranks, so the engine must be replaced."""
    adapters = MergedAdapters(llama_folder, tmp_path / "adapters", rank=RANK)
    engine = VllmEngine(tiny_spec(engine=ENGINE, tensor_parallel_size=2), llama_folder, executor="mp")
    try:
        info = await engine.start()
        subject = Subject(engine, info, TOKEN_LO, TOKEN_HI, deadline_s=240.0)
        folders = await load(engine, adapters, 1, 2, 3)
        prompt, order = subject.prompt(21, tokens=40), [0, 1, 2, 3, 0]
        answers = await Driver(subject).run(*(with_adapter(folders[number], prompt) for number in order))
        assert tokens(answers) == [adapters.merged_tokens(number, prompt, ANSWER_TOKENS) for number in order]
        broken = write_adapter(tmp_path / "broken", llama_folder, 2 * RANK)
        with pytest.raises(EngineCorrupt, match="rank"):
            await engine.load_adapter("e" * 64, str(broken), pinned=False)
    finally:
        await engine.close()


async def test_the_public_path_serves_adapters(llama_folder: Path, tmp_path: Path) -> None:
    """Over AsyncLLM, the engine serves adapters as it does over the fast path. It keeps running after a failed load."""
    adapters = MergedAdapters(llama_folder, tmp_path / "adapters", rank=RANK)
    engine = VllmEngine(tiny_spec(engine=ENGINE), llama_folder, prefer_fastpath=False)
    try:
        info = await engine.start()
        subject = Subject(engine, info, TOKEN_LO, TOKEN_HI, deadline_s=240.0)
        folders = await load(engine, adapters, 1, 2, 3)
        broken = write_adapter(tmp_path / "broken", llama_folder, 2 * RANK)
        with pytest.raises(EngineRefused):
            await engine.load_adapter("e" * 64, str(broken), pinned=False)
        prompt, order = subject.prompt(21, tokens=40), [0, 1, 2, 3, 0]
        answers = await Driver(subject).run(*(with_adapter(folders[number], prompt) for number in order))
        assert tokens(answers) == [adapters.merged_tokens(number, prompt, ANSWER_TOKENS) for number in order]
        await engine.unload_adapter(folders[1].name)  # type: ignore[union-attr]
        with pytest.raises(EngineRefused):
            await engine.submit(with_adapter(folders[1], prompt))
    finally:
        await engine.close()
