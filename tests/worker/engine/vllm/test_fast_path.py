"""The fast path's table of vLLM's private names is complete, and missing names are reported."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

import pytest

from cluster.worker.engine.vllm import fast_path
from cluster.worker.engine.vllm.cpu import lone_rank
from cluster.worker.engine.vllm.fast_path import SYMBOLS
from cluster.worker.engine.vllm.private_names import missing, resolve


@pytest.mark.engine
@pytest.mark.parametrize("path", SYMBOLS | lone_rank.SYMBOLS)
def test_this_vllm_has_every_name(path: str) -> None:
    """The installed vLLM has each symbol in the tables SYMBOLS of fast_path.py and lone_rank.py, with the parameters
    and fields listed there."""
    assert missing({path: (SYMBOLS | lone_rank.SYMBOLS)[path]}) == []


@pytest.mark.engine
def test_what_is_missing_is_named() -> None:
    """A missing symbol, field or module is reported by its path."""
    table = {
        "vllm.v1.engine.EngineCoreOutput": ("request_id", "no_such_field"),
        "vllm.v1.engine.NoSuchThing": (),
        "vllm.no_such_module.Thing": ("field",),
    }
    assert missing(table) == [
        "vllm.v1.engine.EngineCoreOutput: no_such_field",
        "vllm.v1.engine.NoSuchThing",
        "vllm.no_such_module.Thing",
    ]


@pytest.mark.engine
def test_finish_reasons_keep_their_order() -> None:
    """vLLM's finish reasons have the names of FinishReason, and each number is one lower than in FinishReason. The fast
    path relies on this."""
    from cluster.api.types import FinishReason

    theirs = resolve("vllm.v1.engine.FinishReason")
    assert {reason.name: int(reason) + 1 for reason in theirs} == {reason.name: int(reason) for reason in FinishReason}


@pytest.mark.parametrize("module", [fast_path, lone_rank])
def test_every_import_stands_in_the_table(module: ModuleType) -> None:
    """Every name that the module imports from vLLM is in the module's table."""
    tree = ast.parse(Path(str(module.__file__)).read_text())
    imported = {
        f"{node.module}.{name.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm")
        for name in node.names
    }
    assert imported
    for name in imported:
        assert any(path == name or path.startswith(f"{name}.") for path in SYMBOLS | lone_rank.SYMBOLS), name
