"""Sources of weights and the rules for them, weight digests, and the default model."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster.api.types import ModelSpec
from cluster.worker.weights import demo_model
from cluster.worker.weights.checkpoint import check_weights
from cluster.worker.weights.digests import weight_digest
from cluster.worker.weights.fetching import Progress
from cluster.worker.weights.sentence_modules import MAX_MODULES
from cluster.worker.weights.sources import SourceError, SourceRules, resolve
from tests.support.pooling_models import NORMALIZE, SIZE, PoolingForm, build_form, dense, minilm


def checkpoint(folder: Path, files: Sequence[str] = ("model.safetensors",), **config: object) -> Path:
    """Create a folder that looks like a model folder; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    for name in files:
        (folder / name).write_bytes(b"weights of " + name.encode())
    return folder


def test_a_folder_with_safetensors_is_taken(tmp_path: Path) -> None:
    """A local folder resolves to itself."""
    folder = checkpoint(tmp_path / "m")
    assert resolve(ModelSpec("m", str(folder)), SourceRules(tmp_path)) == folder


@pytest.mark.parametrize(
    ("spec", "rules", "says"),
    [
        ({"source": "nowhere"}, {}, "there is no folder"),
        ({"source": "gopher://x"}, {}, "is unknown"),
        ({"source": "hf://only-one-part"}, {}, "expected hf://organisation/name"),
        ({"source": "hf://a/b"}, {"allowed_sources": ["hf://meta-llama/*"]}, "weights.allow.sources"),
        ({"source": "x", "load_format": "pt"}, {}, "weights.allow.formats"),
    ],
)
def test_a_wrong_source_is_refused_with_the_reason(
    tmp_path: Path, spec: dict[str, str], rules: dict[str, object], says: str
) -> None:
    """The error for a wrong source names the entry and the reason."""
    with pytest.raises(SourceError, match=says) as error:
        resolve(ModelSpec("m", **spec), SourceRules(tmp_path, **rules))  # type: ignore[arg-type]
    assert "models[m]" in str(error.value)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    """A folder with weights but no config.json is refused."""
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"no config\.json"):
        resolve(ModelSpec("m", str(tmp_path)), SourceRules(tmp_path))


def test_pickled_weights_are_refused_unless_asked_for_and_allowed(tmp_path: Path) -> None:
    """A folder with .bin files (pickled weights) is refused, unless the catalog entry sets their `load_format` and
    `weights.allow` lists that format."""
    folder = checkpoint(tmp_path / "m", ["pytorch_model.bin"])
    with pytest.raises(SourceError, match="pickled weights can run code"):
        resolve(ModelSpec("m", str(folder)), SourceRules(tmp_path))
    allowed = SourceRules(tmp_path, allowed_formats=["safetensors", "pt"])
    assert resolve(ModelSpec("m", str(folder), load_format="pt"), allowed) == folder


def test_an_empty_model_folder_is_refused(tmp_path: Path) -> None:
    """A folder without weights is refused before an engine starts."""
    with pytest.raises(SourceError, match="holds no weights"):
        resolve(ModelSpec("m", str(checkpoint(tmp_path / "m", []))), SourceRules(tmp_path))


@pytest.mark.parametrize(("trust", "allow"), [(False, False), (True, False), (False, True)])
def test_remote_code_needs_both_words(tmp_path: Path, trust: bool, allow: bool) -> None:
    """A config.json with auto_map is refused, unless the entry trusts remote code and the cluster allows it."""
    folder = checkpoint(tmp_path / "m", auto_map={"AutoModel": "modeling.Model"})
    with pytest.raises(SourceError, match="auto_map"):
        resolve(ModelSpec("m", str(folder), trust_remote_code=trust), SourceRules(tmp_path, allow_remote_code=allow))
    both = SourceRules(tmp_path, allow_remote_code=True)
    assert resolve(ModelSpec("m", str(folder), trust_remote_code=True), both) == folder


def test_offline_hub_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the hub is offline and a model is not cached, the error says that HF_HUB_OFFLINE is set."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set"):
        resolve(ModelSpec("m", "hf://example/absent"), SourceRules(tmp_path))


def test_digest_is_by_content_and_kept(tmp_path: Path) -> None:
    """Equal content has the same digest in any folder. The stored digest of a folder is used until a file changes."""
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    cache = tmp_path / "cache"
    digest = weight_digest(one, cache)
    assert digest.startswith("sha256:")
    assert weight_digest(two, cache) == digest
    weights = one / "model.safetensors"
    stamp = weights.stat()
    weights.write_bytes(b"WEIGHTS of model.safetensors")
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert weight_digest(one, cache) == digest, "same size and time: the record is believed"
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert weight_digest(one, cache) != digest


def test_digest_covers_the_configuration_and_the_names(tmp_path: Path) -> None:
    """A different configuration or file name gives a different digest."""
    cache = tmp_path / "cache"
    digests = {
        weight_digest(checkpoint(tmp_path / "a"), cache),
        weight_digest(checkpoint(tmp_path / "b", rope=1), cache),
        weight_digest(checkpoint(tmp_path / "c", ["other.safetensors"]), cache),
    }
    assert len(digests) == 3
    with pytest.raises(ValueError, match="no model files"):
        weight_digest(tmp_path / "cache", cache)


def test_a_damaged_record_is_made_again(tmp_path: Path) -> None:
    """If the stored digest is not JSON, the digest is computed and stored again."""
    folder, cache = checkpoint(tmp_path / "a"), tmp_path / "cache"
    digest = weight_digest(folder, cache)
    for record in (cache / "digests").iterdir():
        record.write_text("{")
    assert weight_digest(folder, cache) == digest


@pytest.mark.engine
def test_the_default_model_is_made_once(tmp_path: Path) -> None:
    """Two concurrent calls create the folder of the default model once.

    The unfinished folder of a dead process is removed, and the last progress report equals the total.
    """
    torn = tmp_path / "models" / f".{demo_model.FOLDER}.making-dead"
    torn.mkdir(parents=True)
    seen: list[tuple[int, int, str]] = []
    folders: list[Path] = []

    def make() -> None:
        folders.append(
            resolve(ModelSpec("m", "demo://smollm2"), SourceRules(tmp_path), lambda *report: seen.append(report))
        )

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [tmp_path / "models" / demo_model.FOLDER] * 2
    assert not torn.exists()
    assert sorted(path.name for path in folders[0].iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert seen[-1][0] == seen[-1][1]
    assert "quantization_config" not in json.loads((folders[0] / "config.json").read_text())
    assert [path.name for path in folders[0].parent.iterdir() if "making" in path.name] == []


def embedding_model(folder: Path, mode: str = "cls") -> Path:
    """Create a folder with the files of an embedding model; return the folder."""
    build_form(
        folder,
        PoolingForm("m", [("Pooling", {"pooling_mode": mode, "embedding_dimension": SIZE}), dense(), NORMALIZE]),
        weights=False,
    )
    (folder / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize("file", ["1_Pooling/config.json", "2_Dense/config.json", "3_Normalize/config.json"])
def test_an_embedding_model_without_its_settings_is_refused(tmp_path: Path, file: str) -> None:
    """A folder without the settings that a module in modules.json needs is refused, since its vectors would be wrong. A
    module that needs no settings is accepted."""
    folder = embedding_model(tmp_path / "m")
    (folder / file).unlink()
    if "Normalize" in file:
        assert resolve(ModelSpec("m", str(folder)), SourceRules(tmp_path)) == folder
        return
    with pytest.raises(SourceError, match=rf"models\[m\].*lacks {file}"):
        resolve(ModelSpec("m", str(folder)), SourceRules(tmp_path))


TRANSFORMER = {"type": "sentence_transformers.models.Transformer", "path": ""}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[", "is not a list of modules"),
        ("3", "is not a list of modules"),
        ('[{"path": "x"}]', "is not a list of modules"),
        ('[{"type": "Pooling", "path": "../x"}]', "names the folder"),
        ('[{"type": ["Pooling"], "path": "x"}]', "the module type .* is not served"),
        (json.dumps([TRANSFORMER] * (MAX_MODULES + 1)), "it must have 1 to 16"),
        ("[]", "has 0 modules"),
        (json.dumps([TRANSFORMER | {"name": "0"}] * 2), "a name occurs twice"),
    ],
)
def test_a_wrong_list_of_modules_is_refused(tmp_path: Path, content: str, says: str) -> None:
    """A modules.json that cannot be read, or that has a path outside the folder, is refused with the reason."""
    folder = embedding_model(tmp_path / "m")
    (folder / "modules.json").write_text(content)
    with pytest.raises(SourceError, match=says):
        resolve(ModelSpec("m", str(folder)), SourceRules(tmp_path))


def test_the_digest_covers_how_a_model_pools(tmp_path: Path) -> None:
    """Equal weights with different pooling settings have different digests, since their vectors differ."""
    one, other, same = (
        embedding_model(tmp_path / name, pooling) for name, pooling in (("a", "cls"), ("b", "mean"), ("c", "cls"))
    )
    digests = [weight_digest(folder, tmp_path / "cache") for folder in (one, other, same)]
    assert digests[0] == digests[2] != digests[1]


def test_the_embedding_model_is_copied_once(tmp_path: Path) -> None:
    """demo://minilm is a folder with the model's pooling settings. A second call returns the same folder unchanged."""
    minilm(tmp_path)
    spec, rules = ModelSpec("m", "demo://minilm"), SourceRules(tmp_path)
    folder = resolve(spec, rules)
    assert folder == tmp_path / "models" / demo_model.MINILM.folder
    assert (folder / "1_Pooling" / "config.json").is_file()
    check_weights(spec, folder)
    stamp = folder.stat().st_mtime_ns
    assert (resolve(spec, rules), folder.stat().st_mtime_ns) == (folder, stamp)


def test_the_last_report_of_a_demo_model_is_its_total(tmp_path: Path) -> None:
    """While a demo model is created, a thread reports how many bytes are written. The last report is the total size,
    also on a slow disk."""
    reports: list[tuple[int, int, str]] = []
    size_reported = threading.Event()

    def report(done: int, total: int, what: str) -> None:
        reports.append((done, total, what))
        size_reported.set()

    def make(package: Path, folder: Path, progress: Progress) -> None:
        (folder / "model.safetensors").write_bytes(b"12345")
        assert size_reported.wait(10)

    slow = dataclasses.replace(demo_model.MINILM, package="pytest", bytes=6, make=make)
    demo_model.make_demo_model(slow, tmp_path, report)
    assert reports[0] == (5, 6, "writing the checkpoint")
    assert reports[-1] == (6, 6, "done")


def test_a_missing_package_is_named_with_the_remedy(tmp_path: Path) -> None:
    """A demo model whose package is not installed raises an error that names the package and how to install it."""
    absent = dataclasses.replace(demo_model.MINILM, package="headrace-absent-package")
    with pytest.raises(demo_model.DemoModelError, match=r"headrace-absent-package.*make minilm"):
        demo_model.make_demo_model(absent, tmp_path)
    assert not list((tmp_path / "models").glob(".*making*"))
