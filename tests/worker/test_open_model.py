"""A replica refuses a damaged checkpoint before an engine starts, and the start is not retried."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cluster.api.adapters import AdapterSpec
from cluster.api.types import ModelSpec
from cluster.wire.bundle import ESCAPED_TOKENS
from cluster.worker.open_model import open_bundle, open_model
from cluster.worker.replica import Replica, ReplicaPlacement
from cluster.worker.settings import ModelRefused, ReplicaSettings
from cluster.worker.weights.adapter import adapter_digest
from cluster.worker.weights.adapter_store import AdapterStore
from tests.support.adapters import write_adapter
from tests.support.checkpoints import build_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undamaged checkpoint."""
    return build_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def without(name: str) -> Callable[[Path], None]:
    """Return a function that removes the named file from a folder."""
    return lambda folder: (folder / name).unlink()


def with_nan(folder: Path) -> None:
    """Set one number of the weights in a folder to NaN."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_tensor(folder: Path) -> None:
    """Remove a tensor whose absence vLLM would not notice, since vLLM merges the tensor into a larger one."""
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
    """The start of a replica with a damaged checkpoint raises ModelRefused, which gives the reason. After this error
    the start is not retried."""
    folder = Path(shutil.copytree(llama, tmp_path / "m"))
    damage(folder)
    settings = ReplicaSettings(ModelSpec("m", str(folder)), "c", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ModelRefused, match=why):
        await Replica(settings, ReplicaPlacement("r", "n"), open_model).start()


def test_a_whole_checkpoint_is_opened(llama: Path, tmp_path: Path) -> None:
    """An undamaged checkpoint is opened. The result has a weight digest, and a bundle with the tokenizer."""
    opened = open_model(ReplicaSettings(ModelSpec("m", str(llama)), "c", cache_dir=str(tmp_path / "cache")))
    assert opened.weight_digest.startswith("sha256:")
    assert "tokenizer.json" in opened.bundle.files


def test_the_entry_decides_whether_control_tokens_are_escaped(llama: Path, tmp_path: Path) -> None:
    """The tokenizer bundle of a model lists the control tokens only if the catalog entry sets
    `control_tokens_in_content` to `escape`."""
    for option in ("keep", "escape"):
        spec = ModelSpec("m", str(llama), control_tokens_in_content=option)
        bundle, _ = open_bundle(ReplicaSettings(spec, "c", cache_dir=str(tmp_path / "cache")))
        tokens = json.loads(bundle.files["tokenizer_config.json"]).get(ESCAPED_TOKENS, [])
        assert ("<|eot_id|>" in tokens) == (option == "escape")


@pytest.mark.parametrize(("engine", "has_store"), [({"enable_lora": True, "max_loras": 2}, True), ({}, False)])
def test_an_entry_with_adapters_has_their_store(
    tmp_path: Path, engine: dict[str, object], has_store: bool, llama: Path
) -> None:
    """With `engine.enable_lora`, a replica stores adapters in the cache folder, and checks them against its model."""
    for source, base in ((f"sim://{llama}", None), (str(llama), llama)):
        settings = ReplicaSettings(ModelSpec("m", source, engine=engine), "c", cache_dir=str(tmp_path))
        opened = open_model(settings)
        assert (opened.adapter_files is not None) == has_store
        if has_store:
            folder = write_adapter(tmp_path / "a", llama, rank=8)
            stored = opened.adapter_files.fetch(AdapterSpec("a", str(folder)), lambda: None)  # type: ignore[union-attr]
            assert stored.folder == tmp_path / "adapters" / adapter_digest(folder)
            assert isinstance(opened.adapter_files, AdapterStore)
            assert opened.adapter_files.base == base
