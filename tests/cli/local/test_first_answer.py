"""The first answer of a demo, and the example commands, suit the kind of model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.api.pooling import PoolingTask
from cluster.cli.commands.run.up import _commands_to_try
from cluster.cli.local.children import StartFailed
from cluster.cli.local.first_answer import FIRST_TEXTS, first_answer, served_tasks
from cluster.cli.local.step_lines import StepLine
from cluster.wire.bundle import Bundle
from tests.gateway.conftest import bundle, checkpoint
from tests.support.cluster import TestCluster
from tests.support.pooling import DIMENSIONS, pooling_cluster

__all__ = ["bundle", "checkpoint"]

WHERE = {"grpc": "localhost:50051", "http": "localhost:8000"}


@pytest.fixture(scope="module")
async def models(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, bundle: Bundle
) -> AsyncIterator[TestCluster]:
    """A gateway with the models `embed`, `score` and `sim`."""
    async with pooling_cluster(tmp_path_factory.mktemp("pooling"), checkpoint, bundle) as cluster:
        yield cluster


@pytest.mark.parametrize(
    ("model", "tasks", "says"),
    [
        ("embed", (PoolingTask.EMBED,), f"3 vectors of {DIMENSIONS} numbers"),
        ("score", (PoolingTask.SCORE,), "3 scores in"),
        ("sim", (), "tokens/s"),
    ],
)
async def test_each_kind_of_model_answers(
    models: TestCluster, capsys: pytest.CaptureFixture[str], model: str, tasks: tuple[PoolingTask, ...], says: str
) -> None:
    """The first answer is vectors for an embedding model, scores for a cross-encoder, else a text with its speed."""
    endpoint = models.gateway.endpoints["grpc"]
    assert await served_tasks(endpoint, model) == tasks
    await first_answer(endpoint, model, StepLine("[4/4]", "first answer"))
    shown = capsys.readouterr().out
    assert says in shown
    assert bool(tasks) == any(text in shown for text in FIRST_TEXTS)


async def test_an_unknown_model_is_an_error(models: TestCluster) -> None:
    """An unknown model has no pooling tasks, and the first call to it fails with the gateway's reason."""
    endpoint = models.gateway.endpoints["grpc"]
    assert await served_tasks(endpoint, "absent") == ()
    with pytest.raises(StartFailed, match="absent"):
        await first_answer(endpoint, "absent", StepLine("", "first answer"))


@pytest.mark.parametrize(
    ("tasks", "command", "never"),
    [((PoolingTask.EMBED,), "embed m ", "chat"), ((PoolingTask.SCORE,), "rerank m ", "chat"), ((), "chat m ", "embed")],
)
def test_commands_to_try_suit_the_model(tasks: tuple[PoolingTask, ...], command: str, never: str) -> None:
    """`up` prints example commands only for what the model can do: `embed`, `rerank` or `chat`."""
    lines = list(_commands_to_try("headrace", "m", WHERE, tasks))
    assert lines[0].startswith(f"headrace {command}")
    assert "headrace status" in lines
    assert not any(f" {never} " in line for line in lines)
