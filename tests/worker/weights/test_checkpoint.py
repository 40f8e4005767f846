"""Damaged or incomplete weight files are refused when a model is opened; undamaged files of any architecture pass."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cluster.api.types import ModelSpec
from cluster.worker.weights.checkpoint import INDEX, OUTPUT, CheckpointError, check_weights
from tests.support.architectures import ARCHITECTURES, save

WEIGHTS = "model.safetensors"
Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that takes an architecture and returns the folder of an undamaged checkpoint in one file."""
    root = tmp_path_factory.mktemp("architectures")

    def folder(model_type: str) -> Path:
        there = root / model_type
        return there if there.exists() else save(model_type, there)

    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a checkpoint that has several weight files and an index."""
    folder = save("llama", tmp_path_factory.mktemp("shards"), max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def check(folder: Path, **spec: Any) -> None:
    """Check a folder in the same way as when a model is opened."""
    check_weights(ModelSpec("m", "unused", **spec), folder)


def rewrite(folder: Path, change: Callable[[Tensors], object], name: str = WEIGHTS) -> None:
    """Change the tensors of a file in place."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", ["cohere", "gemma2"])
def test_an_output_matrix_that_vllm_ignores_is_refused(
    whole: Callable[[str], Path], tmp_path: Path, model_type: str
) -> None:
    """vLLM ties the embeddings of some architectures always. A checkpoint with another output matrix is refused; one
    that repeats its embeddings passes."""
    folder = Path(shutil.copytree(whole(model_type), tmp_path / "m"))
    rewrite(folder, lambda tensors: tensors.update({OUTPUT: tensors["model.embed_tokens.weight"].clone()}))
    check(folder)
    rewrite(folder, lambda tensors: tensors[OUTPUT][-1:, -1:].add_(1.0))
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: {OUTPUT} differs from model.embed_tokens.weight"):
        check(folder)
    rewrite(folder, lambda tensors: tensors.update({OUTPUT: tensors[OUTPUT].half()}))
    with pytest.raises(CheckpointError, match="differs"):
        check(folder)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_whole_checkpoints_pass_and_each_tensor_is_missed(
    whole: Callable[[str], Path], tmp_path: Path, model_type: str
) -> None:
    """An undamaged checkpoint of any architecture passes.

    If a tensor is missing or has a wrong shape, the error names the tensor.
    """
    folder = Path(shutil.copytree(whole(model_type), tmp_path / "m"))
    check(folder)
    tensors = load_file(folder / WEIGHTS)
    chance = random.Random(model_type)
    for name in chance.sample(sorted(tensors), 3):
        rewrite(folder, lambda given, name=name: given.pop(name))  # type: ignore[misc]
        with pytest.raises(CheckpointError) as missing:
            check(folder)
        layer = re.split(r"(?<=\.\d\.)", name)[0]  # the rest may be transformers' other name for the tensor
        assert layer in str(missing.value)
        odd = tensors | {name: tensors[name].repeat(2, *[1] * (tensors[name].dim() - 1))}
        save_file(odd, folder / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="has the shape"):
            check(folder)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("model_type", "prefix"), [("gpt2", "transformer."), ("opt", "model."), ("bloom", "transformer.")]
)
def test_other_names_and_buffers_of_old_checkpoints_pass(
    whole: Callable[[str], Path], tmp_path: Path, model_type: str, prefix: str
) -> None:
    """The checkpoint of a bare model is accepted, although its tensor names lack the usual prefix. Further tensors of
    old checkpoints, such as attention masks, are ignored."""
    import torch

    folder = Path(shutil.copytree(whole(model_type), tmp_path / "m"))
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(tensors, folder / WEIGHTS)
    check(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}},
        {"architectures": ["OfItsOwnCode"]},
        {"model_type": "of_its_own"},
        {"architectures": None},
    ],
)
def test_what_is_not_known_is_left_to_the_engine(
    whole: Callable[[str], Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    """Tensors are not checked for quantized checkpoints and for architectures that transformers does not know."""
    folder = Path(shutil.copytree(whole("llama"), tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    check(folder)


def test_an_entry_may_say_that_a_tensor_is_not_needed(whole: Callable[[str], Path], tmp_path: Path) -> None:
    """A checkpoint without a tensor is accepted if the catalog entry says that vLLM does not need the tensor. The entry
    can do so with a loader option of vLLM, or by changing a value of config.json."""
    folder = Path(shutil.copytree(whole("llama"), tmp_path / "m"))
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    check(folder, engine={"model_loader_extra_config": {"enable_weights_track": False}})
    check(folder, engine={"hf_overrides": {"tie_word_embeddings": True}})


def test_shards_pass_with_and_without_their_index(shards: Path, tmp_path: Path) -> None:
    """Shards are accepted with and without an index. A file that the index does not name is ignored."""
    folder = Path(shutil.copytree(shards, tmp_path / "m"))
    (folder / "consolidated.safetensors").write_bytes(b"another form of the same")
    check(folder)
    (folder / "consolidated.safetensors").unlink()
    (folder / INDEX).unlink()
    check(folder)


def test_a_missing_shard_is_named(shards: Path, tmp_path: Path) -> None:
    """The error for a missing shard names the shard, with and without an index."""
    folder = Path(shutil.copytree(shards, tmp_path / "m"))
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"lacks {lost.name}.*fetch or copy the checkpoint again"):
            check(folder)
        (folder / INDEX).unlink(missing_ok=True)


def test_a_tensor_that_only_the_index_has_is_named(shards: Path, tmp_path: Path) -> None:
    """If the index lists a tensor that its weight file lacks, the error names the tensor and the file."""
    folder = Path(shutil.copytree(shards, tmp_path / "m"))
    name, file = next(iter(json.loads((folder / INDEX).read_text())["weight_map"].items()))
    rewrite(folder, lambda tensors: tensors.pop(name), file)
    with pytest.raises(CheckpointError, match=rf"{name} \(in {file}\)"):
        check(folder)


def _cut(content: bytes) -> bytes:
    return content[:-100]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_cut, r"is cut off: it has \d+ bytes, and its header describes \d+"),
        (lambda content: content[:1000], "is cut off"),
        (lambda content: content[:100], "is damaged"),
        (lambda content: content[:5], "is damaged"),
        (lambda _: b"", "is empty"),
        (lambda content: content + b"more", "is damaged"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (lambda _: b"<html>404</html>" * 9, "is damaged"),
        (lambda content: content.replace(b'"F32"', b'"F33"', 1), "is damaged"),
        (lambda content: content.replace(b'"shape":[32]', b'"shape":[33]', 1), "is damaged"),
    ],
)
def test_a_damaged_file_is_named(shards: Path, tmp_path: Path, damage: Callable[[bytes], bytes], why: str) -> None:
    """The error for a damaged file names the file, the damage and the remedy."""
    folder = Path(shutil.copytree(shards, tmp_path / "m"))
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"{file.name} .*{why}"):
        check(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_named(shards: Path, tmp_path: Path, content: str) -> None:
    """The error for a damaged index file names the file."""
    folder = Path(shutil.copytree(shards, tmp_path / "m"))
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX):
        check(folder)


def test_an_output_matrix_of_its_own_is_missed(whole: Callable[[str], Path], tmp_path: Path) -> None:
    """A missing lm_head is an error, unless config.json ties lm_head to the embeddings."""
    folder = Path(shutil.copytree(whole("llama"), tmp_path / "m"))
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match="lm_head"):
        check(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    check(folder)


@pytest.mark.timeout(120)
def test_a_number_of_layers_that_no_model_has_is_refused_at_once(whole: Callable[[str], Path], tmp_path: Path) -> None:
    """A config.json with a billion layers is refused before the tensors are compared. The comparison would use all
    memory of the host."""
    folder = Path(shutil.copytree(whole("llama"), tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match=r"num_hidden_layers of config\.json is 1000000000"):
        check(folder)


@pytest.mark.parametrize("change", [{"vocab_size": 130}, {"hidden_size": 64}, {"num_hidden_layers": 4}])
def test_a_configuration_of_another_model_is_found(
    whole: Callable[[str], Path], tmp_path: Path, change: dict[str, int]
) -> None:
    """A config.json whose sizes differ from the sizes of the tensors is refused."""
    folder = Path(shutil.copytree(whole("llama"), tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        check(folder)


def test_other_formats_are_not_looked_at(shards: Path, tmp_path: Path) -> None:
    """Files that the load format does not read are not checked."""
    folder = Path(shutil.copytree(shards, tmp_path / "m"))
    (folder / INDEX).write_text("{")
    for load_format in ("dummy", "pt"):
        check(folder, load_format=load_format)
