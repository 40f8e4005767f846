"""Run the tests of EngineContract on vLLM, once over the fast path and once over AsyncLLM."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from cluster.api.types import ModelSpec, without_seed_noise
from cluster.worker.engine.vllm import arguments
from cluster.worker.engine.vllm.requests import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS_AFTER_MIN
from tests.worker.engine.contract import EngineContract, Subject


@pytest.mark.engine
def test_bounds_of_lists_are_those_of_vllms_tables() -> None:
    """Our bounds on the lists of a request equal the bounds of vLLM's V2 runner. A list beyond its bound would end
    vLLM's engine core."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "v1/worker/gpu/sample/logit_bias.py").read_text()
    tables = {
        node.targets[0].id: node.value.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    assert tables["MAX_NUM_STOP_TOKEN_IDS"] == MAX_STOP_TOKEN_IDS_AFTER_MIN
    assert tables["MAX_NUM_LOGIT_BIAS_TOKENS"] == MAX_LOGIT_BIAS


@pytest.mark.engine
class TestFastPath(EngineContract):
    """The engine contract, tested on the fast path (vLLM's engine core, called directly)."""

    @pytest.fixture
    def engine(self, fast_subject: Subject) -> Subject:
        """The engine that all tests share."""
        return fast_subject

    def test_says_its_path(self, engine: Subject) -> None:
        """EngineInfo names the fast path as the engine's path. It also has the engine's class, sizes and default
        sampling options."""
        assert (engine.info.engine_path, engine.info.engine_path_reason) == ("fastpath", "")
        digest = arguments.engine_class("float32", None, ModelSpec("m", "/m", engine={"block_size": 32}))
        assert without_seed_noise(engine.info.engine_class) == digest
        assert engine.info.vocab_size == 768
        assert engine.info.max_num_seqs == 8
        assert engine.info.block_size == 32
        assert engine.info.kv_tokens == 64 * 1024
        assert engine.info.default_sampling == {"temperature": 0.6, "top_p": 0.9}


@pytest.mark.engine
class TestPublic(EngineContract):
    """The engine contract, tested with an engine that uses vLLM's AsyncLLM. An engine uses AsyncLLM if the fast path is
    switched off, or if vLLM lacks a class or function that the fast path needs."""

    @pytest.fixture
    def engine(self, public_subject: Subject) -> Subject:
        """The engine that all tests share."""
        return public_subject

    def test_says_its_path(self, engine: Subject) -> None:
        """EngineInfo names the engine path that is used (`public`), and the reason why the fast path is not used."""
        assert (engine.info.engine_path, engine.info.engine_path_reason) == ("public", "switched off")
