"""Folders of sentence-transformers' forms: those that vLLM would compute in another way are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.api.types import ModelSpec
from cluster.worker.weights.sentence_modules import KINDS, config_overrides, pooling_type
from cluster.worker.weights.sources import SourceError, check_folder
from tests.support.pooling_models import ACTIVATION, FORMS, MEAN, PoolingForm, build_form, dense

DENSE = PoolingForm("Dense", [("Pooling", MEAN), dense()])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_each_form_is_served_or_refused_by_name(tmp_path: Path, form: PoolingForm) -> None:
    """A folder is refused if vLLM would pass over one of its settings; the error names the model, the file and the
    setting."""
    folder = build_form(tmp_path, form, weights=False)
    spec = ModelSpec("m", "unused", load_format="pt" if form.pickled and not form.refusal else "safetensors")
    (folder / f"model.{'bin' if spec.load_format == 'pt' else 'safetensors'}").touch()
    if not form.refusal:
        check_folder(spec, folder)
        return
    with pytest.raises(SourceError, match=rf"models\[m\]\.source: .*{form.refusal}"):
        check_folder(spec, folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda file: file.unlink(), "lacks 2_Dense/model.safetensors, the weights of a Dense module"),
        (lambda file: file.write_bytes(file.read_bytes()[:-8]), "2_Dense/model.safetensors has .*it is cut off"),
        (lambda file: file.write_bytes(b""), "2_Dense/model.safetensors has 0 bytes and no header"),
        (lambda file: _save(file, weight=(128, 64), bias=(64,)), r"has the tensors .*linear.weight \[128, 64\] where"),
        (lambda file: _save(file, weight=(64, 128)), r"where 2_Dense/config.json asks for .*linear.bias \[64\]"),
        (lambda file: _save(file, prefix="", weight=(64, 128), bias=(64,)), r"has the tensors bias \[64\], weight"),
        (lambda file: _save(file, kind="int8", weight=(64, 128), bias=(64,)), "has the type I8; served are F16"),
    ],
    ids=["missing", "cut", "empty", "transposed", "no bias", "other names", "integers"],
)
def test_dense_weights_must_fit_their_settings(tmp_path: Path, change: object, says: str) -> None:
    """A Dense module whose weights are missing, damaged or of other shapes than its settings is refused, since vLLM
    would leave it out."""
    folder = build_form(tmp_path, DENSE, weights=False)
    (folder / "model.safetensors").touch()
    change(folder / "2_Dense" / "model.safetensors")  # type: ignore[operator]
    with pytest.raises(SourceError, match=says):
        check_folder(ModelSpec("m", "unused"), folder)


def _save(file: Path, *, prefix: str = "linear.", kind: str = "float32", **shapes: tuple[int, ...]) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({prefix + name: np.ones(shape, kind) for name, shape in shapes.items()}, file)


@pytest.mark.parametrize("content", ["[", "[1]", '{"pooling_mode": NaN', '{"pooling_mode": ["mean", {}]}'])
def test_settings_that_are_no_object_are_refused(tmp_path: Path, content: str) -> None:
    """A settings file that cannot be read is refused by its name."""
    folder = build_form(tmp_path, PoolingForm("m"), weights=False)
    (folder / "model.safetensors").touch()
    (folder / "1_Pooling" / "config.json").write_text(content)
    with pytest.raises(SourceError, match=r"1_Pooling/config\.json"):
        check_folder(ModelSpec("m", "unused"), folder)


@pytest.mark.engine
def test_module_types_are_those_that_vllm_reads() -> None:
    """Each served type of a module with an effect is one that vLLM reads too. The Transformer is the model itself."""
    from vllm.transformers_utils import config

    read = {
        "Pooling": config._ST_POOLING_MODULE_TYPES,
        "Normalize": config._ST_NORMALIZE_MODULE_TYPES,
        "Dense": config._DENSE_MODULE_TYPES - {"pylate.models.Dense.Dense"},
    }
    for kind, types in read.items():
        assert {name for name, served in KINDS.items() if served == kind} == types


def test_a_cross_encoder_has_the_activation_of_sentence_transformers(tmp_path: Path) -> None:
    """The activation function that release 6 saves apart from config.json is passed to the engine, and `problem_type`
    does not replace it. A model without a saved activation function is left to vLLM."""
    tanh = {"problem_type": None, "sentence_transformers": {"activation_fn": ACTIVATION + "Tanh"}}
    model = {"model_type": "CrossEncoder", "activation_fn": ACTIVATION + "Tanh"}
    config = {"architectures": ["BertForSequenceClassification"], "problem_type": "regression"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert config_overrides(tmp_path) == {}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(model))
    assert config_overrides(tmp_path) == tanh


def test_the_pooling_type_is_vllms_name(tmp_path: Path) -> None:
    """The pooling mode of a folder has vLLM's name. A folder without modules has none."""
    assert pooling_type(tmp_path) == ""
    assert pooling_type(build_form(tmp_path, PoolingForm("m"), weights=False)) == "MEAN"
