"""The laws of an engine over the real one, by all of its paths."""

from __future__ import annotations

import pytest

from tests.engine.contract import EngineContract, Subject


@pytest.mark.engine
class TestFastPath(EngineContract):
    """The engine core read directly."""

    @pytest.fixture
    def engine(self, fast_subject: Subject) -> Subject:
        """The shared engine."""
        return fast_subject

    def test_says_its_path(self, engine: Subject) -> None:
        """EngineInfo tells which way the engine serves and what it is."""
        assert (engine.info.engine_path, engine.info.engine_path_reason) == ("fastpath", "")
        assert engine.info.engine_class == "float32-tp1-pp1"
        assert engine.info.vocab_size == 768
        assert engine.info.max_num_seqs == 8
        assert engine.info.block_size == 32
        assert engine.info.kv_tokens == 64 * 1024
        assert engine.info.default_sampling == {"temperature": 0.6, "top_p": 0.9}


@pytest.mark.engine
class TestPublic(EngineContract):
    """AsyncLLM, as where the fast path's names are missing."""

    @pytest.fixture
    def engine(self, public_subject: Subject) -> Subject:
        """The shared engine."""
        return public_subject

    def test_says_its_path(self, engine: Subject) -> None:
        """EngineInfo tells which way the engine serves, and why not the fast one."""
        assert (engine.info.engine_path, engine.info.engine_path_reason) == ("public", "switched off")
