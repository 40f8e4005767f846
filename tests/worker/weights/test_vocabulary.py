"""Tests of tokenizers. When a model is opened, a tokenizer that the model cannot use is refused. Every usable kind of
tokenizer file is accepted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from cluster.api.types import ModelSpec
from cluster.wire.bundle import Bundle
from cluster.worker.weights.sources import SourceError, SourceRules, resolve
from cluster.worker.weights.tokenizer_bundle import build_bundle
from tests.support.checkpoints import VOCAB_SIZES, build_tokenizer
from tests.support.corpus import SENTENCES

SIZE = VOCAB_SIZES["llama"]


def folder_of(folder: Path, model_type: str = "llama", **config: Any) -> Path:
    """Create a model folder without a tokenizer; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {"model_type": model_type, "vocab_size": SIZE, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(known | config))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the tokenizer files of a model."""
    return build_tokenizer("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A model folder with its tokenizer."""
    return folder_of(Path(shutil.copytree(llama, tmp_path / "m")))


def ids_of(bundle: Bundle, text: str) -> list[int]:
    """Return a text's token ids by the bundle's tokenizer."""
    ids: list[int] = Tokenizer.from_str(bundle.files["tokenizer.json"].decode()).encode(text).ids
    return ids


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON object in a file."""
    content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    change(content)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "qwen2", "opt", "gpt_neox", "gemma", "mistral", "phi", "bloom"]
)
@pytest.mark.parametrize("also", ["", "tokenizer_config.json"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, model_type: str, also: str) -> None:
    """A folder without a tokenizer is refused, whatever its architecture.

    For some architectures transformers creates an empty tokenizer.
    """
    folder = folder_of(tmp_path / "m", model_type)
    if also:
        (folder / also).write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    with pytest.raises(ValueError, match=r"has no tokenizer: it needs tokenizer\.json, .*Copy the tokenizer files"):
        build_bundle(folder)


@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_an_empty_vocabulary_is_refused(tmp_path: Path, tokenizer_class: str) -> None:
    """A tokenizer with only special tokens is refused."""
    folder = folder_of(tmp_path / "m")
    empty = Tokenizer(models.BPE())
    empty.add_special_tokens(["<s>", "</s>"])
    empty.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"(its vocabulary is empty|can be loaded).*copy the tokenizer files"):
        build_bundle(folder)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "tokenizer.json is empty"),
        ("{}", "copy the tokenizer files of the model again"),
        ('{"version": "1.0", "model": {"type": "NoSuch"}, "added_tokens": []}', "copy the tokenizer files"),
        ("[]", "copy the tokenizer files"),
        ('{"version"', "copy the tokenizer files"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ],
)
def test_a_damaged_tokenizer_file_is_refused(model: Path, content: str, why: str) -> None:
    """The error for a damaged tokenizer file has the remedy, whatever error the library raises."""
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=why):
        build_bundle(model)


def test_each_kind_of_tokenizer_file_is_taken(llama: Path, tmp_path: Path) -> None:
    """A model can have tokenizer.json alone, vocab.json with merges.txt, or a sentencepiece model."""
    import sentencepiece

    alone = folder_of(tmp_path / "alone")
    shutil.copy(llama / "tokenizer.json", alone)
    pair = folder_of(tmp_path / "pair", "gpt2")
    content = json.loads((llama / "tokenizer.json").read_text())["model"]
    (pair / "vocab.json").write_text(json.dumps(content["vocab"] | {"<|endoftext|>": len(content["vocab"])}))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in content["merges"]]
    (pair / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    piece = folder_of(tmp_path / "piece", "llama")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(piece / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (piece / "tokenizer.vocab").unlink()
    for folder in (alone, pair, piece):
        assert len(ids_of(build_bundle(folder), "Hello world")) > 1, folder
    (pair / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"vocab\.json but no merges\.txt"):
        build_bundle(pair)


def test_kinds_that_are_not_served_are_named(tmp_path: Path) -> None:
    """A model with an unsupported kind of file is refused, and the error names the kind. The kinds are: Mistral's
    tekken.json if it cannot be read, a folder in Mistral's format, and gguf files."""
    (folder_of(tmp_path / "tekken", "mistral") / "tekken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tekken\.json cannot be read"):
        build_bundle(tmp_path / "tekken")
    rules = SourceRules(tmp_path, allowed_formats=["safetensors", "gguf"])
    for name, others in (("gguf", ["m.gguf"]), ("both", ["m.gguf", "config.json"]), ("params", ["params.json"])):
        (tmp_path / name).mkdir()
        for other in others:
            (tmp_path / name / other).write_text("{}")
        with pytest.raises(SourceError, match="not served yet"):
            resolve(ModelSpec("m", str(tmp_path / name)), rules)
    with pytest.raises(SourceError, match=r"load_format: gguf files are not served yet"):
        resolve(ModelSpec("m", "hf://a/b", load_format="gguf"), rules)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("count", [1, 40])
def test_added_tokens_beyond_the_vocabulary_are_refused(model: Path, special: bool, count: int) -> None:
    """Added tokens without embedding rows are refused, and the error has their ids and the vocabulary size."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(f"<more{at}>", special=special) for at in range(count)])
    tokenizer.save(str(model / "tokenizer.json"))
    with pytest.raises(ValueError, match=rf"has {count} tokens .* has {SIZE} ids .*'<more0>' \({SIZE}\)"):
        build_bundle(model)
    edit(model, "config.json", lambda config: config.update(vocab_size=SIZE + count + 64))
    build_bundle(model)


def test_the_tokenizer_of_a_larger_model_is_refused(model: Path) -> None:
    """A tokenizer with ordinary tokens outside the vocabulary is refused. A vocabulary that is larger than the
    tokenizer is accepted."""
    edit(model, "config.json", lambda config: config.update(vocab_size=SIZE - 100))
    with pytest.raises(
        ValueError, match=rf"has 99 tokens that the model does not have: its vocabulary has {SIZE - 100}"
    ):
        build_bundle(model)
    edit(model, "config.json", lambda config: config.update(vocab_size=SIZE + 256))
    build_bundle(model)


@pytest.mark.parametrize("nested", ["", "text_config"])
def test_the_vocabulary_of_a_multimodal_model_is_its_text_models(model: Path, nested: str) -> None:
    """For an unknown model type, the size of the vocabulary is read from config.json, where it may be nested in the
    configuration of the text model."""
    plain = {"model_type": "of_its_own", "vocab_size": SIZE - 9}
    config = {"model_type": "of_its_own", nested: plain} if nested else plain
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"its vocabulary has {SIZE - 9} ids"):
        build_bundle(model)
    (model / "config.json").write_text(json.dumps({"model_type": "of_its_own"}))
    build_bundle(model)


@pytest.mark.parametrize("role", ["image_token", "pad_token"])
def test_a_special_token_that_text_never_needs_is_left_out(model: Path, role: str) -> None:
    """An image placeholder or padding token that is not in the model's vocabulary is left out of the bundle.

    Published text models name such tokens. The gateway then tokenizes the token's string as ordinary text, so that no
    caller can send an id that the model lacks.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens(["<odd>"])
    tokenizer.save(str(model / "tokenizer.json"))
    edit(model, "tokenizer_config.json", lambda config: config.update({role: "<odd>"}))
    bundle = build_bundle(model)
    assert max(ids_of(bundle, "a <odd> text")) < SIZE
    assert "<odd>" not in bundle.files["tokenizer_config.json"].decode()


@pytest.mark.parametrize("role", ["bos_token", "eos_token", "pad_token"])
def test_a_special_token_that_text_needs_is_missed(model: Path, role: str) -> None:
    """BOS, EOS and tokens in the chat template must be in the vocabulary. Otherwise the model is refused."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens(["<odd>"])
    tokenizer.save(str(model / "tokenizer.json"))
    edit(model, "tokenizer_config.json", lambda config: config.update({role: "<odd>"}))
    (model / "chat_template.jinja").write_text("{{ messages }}<odd>")
    with pytest.raises(ValueError, match="<odd>"):
        build_bundle(model)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ids", [SIZE, [2, SIZE + 5], -1])
def test_eos_ids_outside_the_vocabulary_are_refused(model: Path, file: str, ids: Any) -> None:
    """EOS ids outside the vocabulary are refused, and the error names the file."""
    edit(model, file, lambda config: config.update(eos_token_id=ids))
    with pytest.raises(ValueError, match=rf"{file}: eos_token_id (-1|\d+) is outside the model's vocabulary"):
        build_bundle(model)
    edit(model, file, lambda config: config.update(eos_token_id=[2, SIZE - 1]))
    build_bundle(model)


def test_a_vocabulary_of_words_is_taken(tmp_path: Path) -> None:
    """A word-level tokenizer works, however small its vocabulary is."""
    folder = folder_of(tmp_path / "m", vocab_size=3, eos_token_id=None)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    assert ids_of(build_bundle(folder), "hello world") == [1, 2]
