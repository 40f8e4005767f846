"""Damaged model folders are refused before they are READY, with the name of the damaged file or field."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.api.ports import EngineDead
from cluster.api.types import ModelSpec
from cluster.worker.open_model import open_model
from cluster.worker.replica import Replica, ReplicaPlacement
from cluster.worker.settings import ModelRefused, ReplicaSettings
from cluster.worker.weights.model_fields import check_fields
from cluster.worker.weights.sources import check_folder
from tests.support.architectures import ARCHITECTURES, save
from tests.support.checkpoints import build_checkpoint
from tests.support.damaged_folders import Case, cases, engine_cases

CASE_S = 60
"""Longest time in seconds until a damaged folder is refused."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undamaged checkpoint."""
    return build_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Callable[[Case], ReplicaSettings]:
    """A function that makes the damaged folder of a case and returns the settings of a replica that opens it."""

    def make(case: Case) -> ReplicaSettings:
        folder = Path(shutil.copytree(whole, tmp_path / "m"))
        case.damage(folder)
        return ReplicaSettings(ModelSpec("m", str(folder)), "c", cache_dir=str(tmp_path / "cache"))

    return make


@pytest.mark.timeout(CASE_S)
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.id)
def test_a_damaged_folder_is_refused_before_an_engine_starts(
    damaged: Callable[[Case], ReplicaSettings], case: Case
) -> None:
    """Opening a damaged folder raises ValueError with the name of what is damaged, and reads nothing without end."""
    settings = damaged(case)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        open_model(settings)
    assert case.named in str(caught.value).replace(settings.spec.source, "")


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.parametrize("case", engine_cases(), ids=lambda case: case.id)
async def test_what_only_the_engine_finds_is_named_too(damaged: Callable[[Case], ReplicaSettings], case: Case) -> None:
    """A folder that the engine refuses does not become READY, and the error names the damaged field."""
    with pytest.raises((ModelRefused, EngineDead)) as caught:
        await Replica(damaged(case), ReplicaPlacement("r", "n"), open_model).start()
    assert case.named in str(caught.value)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_undamaged_folders_pass(tmp_path: Path, model_type: str) -> None:
    """The folder of an undamaged checkpoint of any architecture passes the checks of its files and fields."""
    folder = save(model_type, tmp_path / "m")
    check_folder(ModelSpec("m", "unused"), folder)
    check_fields(folder)
