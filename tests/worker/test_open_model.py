"""A checkpoint that cannot work is refused for good when a replica opens it, before any engine starts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cluster.api.types import ModelSpec
from cluster.worker.open_model import open_model
from cluster.worker.replica import Place, Replica
from cluster.worker.settings import ModelRefused, ReplicaSettings
from tests.support.checkpoints import build_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint."""
    return build_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def without(name: str) -> Callable[[Path], None]:
    """A folder loses a file."""
    return lambda folder: (folder / name).unlink()


def with_nan(folder: Path) -> None:
    """One number of the weights becomes NaN."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_tensor(folder: Path) -> None:
    """The weights lose one that vLLM does not miss: it is part of a larger one."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (without("tokenizer.json"), "has no tokenizer"),
        (without("config.json"), r"has no config\.json"),
        (without("model.safetensors"), "holds no weights"),
        (with_nan, r"model\.safetensors: NaN in model\.norm\.weight"),
        (without_tensor, r"no file holds the tensors model\.layers\.1\.self_attn\.k_proj\.weight"),
    ],
)
async def test_a_damaged_checkpoint_is_refused(
    llama: Path, tmp_path: Path, damage: Callable[[Path], None], why: str
) -> None:
    """No second try follows, and the reason is for the catalog."""
    folder = Path(shutil.copytree(llama, tmp_path / "m"))
    damage(folder)
    settings = ReplicaSettings(ModelSpec("m", str(folder)), "c", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ModelRefused, match=why):
        await Replica(settings, Place("r", "n"), open_model).start()


def test_a_whole_checkpoint_is_opened(llama: Path, tmp_path: Path) -> None:
    """With its digest and its tokenizer."""
    opened = open_model(ReplicaSettings(ModelSpec("m", str(llama)), "c", cache_dir=str(tmp_path / "cache")))
    assert opened.weight_digest.startswith("sha256:")
    assert "tokenizer.json" in opened.bundle.files
