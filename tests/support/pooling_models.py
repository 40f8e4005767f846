"""Pooling models of the tests: the real all-MiniLM-L6-v2, and tiny random models of sentence-transformers' forms."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.worker.weights import demo_model

PACKAGE_FOLDER = Path(__file__).parents[2] / ".minilm"
"""Folder where `make minilm` installs the package of the embedding model."""
WORDS = ("red", "green", "blue", "river", "mountain", "cat", "dog", "runs", "sleeps", "why", "the", "a", "old", "new")
SIZE = 128
"""Length of the random models' hidden states."""
BASES: Mapping[str, Mapping[str, Any]] = {
    "bert": {"model_type": "bert", "type_vocab_size": 2},
    "roberta": {"model_type": "roberta", "type_vocab_size": 1},
    "xlm-roberta": {"model_type": "xlm-roberta", "type_vocab_size": 1},
    "modernbert": {
        "model_type": "modernbert",
        "pad_token_id": 0,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "num_key_value_heads": 2},
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "num_key_value_heads": 2,
        "use_bidirectional_attention": True,
    },
}
"""Configurations of the random models, by name."""
OLD, NEW = "sentence_transformers.models.", "sentence_transformers.sentence_transformer.modules."
TYPES_6 = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": f"{NEW}pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
    "Dropout": f"{NEW}dropout.Dropout",
}
"""Types of modules as sentence-transformers 6 writes them."""
TANH = "torch.nn.modules.activation.Tanh"
MEAN, CLS, LAST = ({"pooling_mode": mode, "embedding_dimension": SIZE} for mode in ("mean", "cls", "lasttoken"))


@dataclass(frozen=True)
class PoolingForm:
    """A random model of one of sentence-transformers' forms.

    `modules`: the modules behind the Transformer, each with its settings. `files`: changes of other JSON files, by
    path; None removes the file. `activation`: activation of a cross-encoder. `refusal`: pattern of the error with which
    the folder is refused; "" for a model whose results equal the reference. `types`: types of modules that differ from
    those of older releases. `pickled`: whether the weights of Dense are in a pickled file.
    """

    name: str
    modules: Sequence[tuple[str, Mapping[str, Any]]] = (("Pooling", MEAN),)
    refusal: str = ""
    base: str = "bert"
    files: Mapping[str, Mapping[str, Any] | Sequence[Any] | None] = field(default_factory=dict)
    activation: str = ""
    types: Mapping[str, str] = field(default_factory=dict)
    pickled: bool = False


def dense(into: int = SIZE, out: int = 64, activation: object = TANH, **settings: object) -> tuple[str, dict[str, Any]]:
    """Return a Dense module."""
    return "Dense", {
        "in_features": into,
        "out_features": out,
        "bias": True,
        "activation_function": activation,
        **settings,
    }


def old_flags(*modes: str) -> dict[str, Any]:
    """Return the settings of Pooling as sentence-transformers before 6 writes them."""
    flags = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    return {"word_embedding_dimension": SIZE, "include_prompt": True} | {
        f"pooling_mode_{flag}": flag in modes for flag in flags
    }


NORMALIZE: tuple[str, Mapping[str, Any]] = ("Normalize", {})
ACTIVATION = "torch.nn.modules.activation."
MODEL = "config_sentence_transformers.json"
TEXT_TASK = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
FORMS: Sequence[PoolingForm] = (
    # equal to the reference
    PoolingForm("mean", [("Pooling", old_flags("mean_tokens"))]),
    PoolingForm("cls, normalized", [("Pooling", old_flags("cls_token")), NORMALIZE]),
    PoolingForm("last token of a causal model", [("Pooling", old_flags("lasttoken")), NORMALIZE], base="qwen3"),
    PoolingForm("mean of a causal model", [("Pooling", MEAN)], base="llama"),
    PoolingForm("causal model made bidirectional", base="qwen3", files={"config.json": {"is_causal": False}}),
    PoolingForm("last token of an encoder", [("Pooling", LAST), NORMALIZE]),
    PoolingForm(
        "modes and types of release 6",
        [("Pooling", CLS), dense(), NORMALIZE],
        types=TYPES_6,
        files={"sentence_bert_config.json": TEXT_TASK},
    ),
    PoolingForm(
        "two Dense", [("Pooling", MEAN), dense(SIZE, 96), dense(96, 32, ACTIVATION + "ReLU"), NORMALIZE], base="gemma3"
    ),
    PoolingForm(
        "Dense without bias", [("Pooling", MEAN), dense(bias=False, activation="torch.nn.modules.linear.Identity")]
    ),
    PoolingForm("GELU", [("Pooling", MEAN), dense(activation=ACTIVATION + "GELU")]),
    PoolingForm("SiLU", [("Pooling", MEAN), dense(activation=ACTIVATION + "SiLU")]),
    PoolingForm("Sigmoid", [("Pooling", CLS), dense(activation=ACTIVATION + "Sigmoid"), NORMALIZE], base="roberta"),
    PoolingForm(
        "Dropout", [("Pooling", MEAN), ("Dropout", {"dropout": 0.2}), dense(), ("Dropout", {"dropout": 0.1}), NORMALIZE]
    ),
    PoolingForm("mean of XLM-RoBERTa", [("Pooling", MEAN), NORMALIZE], base="xlm-roberta"),
    PoolingForm("mean of ModernBERT", [("Pooling", MEAN)], base="modernbert"),
    PoolingForm("prompt excluded, no prompt", [("Pooling", MEAN | {"include_prompt": False})]),
    PoolingForm(
        "empty default prompt",
        files={MODEL: {"prompts": {"query": "", "document": ""}, "default_prompt_name": "document"}},
    ),
    PoolingForm(
        "dot product, no cut",
        [("Pooling", old_flags("mean_tokens"))],
        files={MODEL: {"similarity_fn_name": "dot", "truncate_dim": SIZE, "model_type": "SentenceTransformer"}},
    ),
    PoolingForm(
        "lower case and length", files={"sentence_roberta_config.json": {"max_seq_length": 64, "do_lower_case": True}}
    ),
    PoolingForm(
        "length beyond the positions",
        files={"sentence_bert_config.json": {"max_seq_length": 400, "do_lower_case": False}},
    ),
    PoolingForm("pickled Dense, allowed", [("Pooling", MEAN), dense()], pickled=True),
    PoolingForm("cross-encoder", (), activation=ACTIVATION + "Sigmoid"),
    PoolingForm(
        "cross-encoder, old activation",
        (),
        activation="torch.nn.modules.linear.Identity",
        files={"config.json": {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}},
    ),
    PoolingForm(
        "cross-encoder, activation",
        (),
        activation=ACTIVATION + "Tanh",
        files={"config.json": {"sentence_transformers": {"activation_fn": ACTIVATION + "Tanh", "version": "4.0"}}},
    ),
    PoolingForm(
        "cross-encoder, problem type",
        (),
        activation=ACTIVATION + "Sigmoid",
        files={"config.json": {"problem_type": "regression", "sentence_transformers": {"version": "4.0"}}},
    ),
    PoolingForm(
        "cross-encoder of release 6",
        (),
        activation="torch.nn.modules.linear.Identity",
        types=TYPES_6,
        base="xlm-roberta",
        files={
            MODEL: {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity"},
            "modules.json": [{"idx": 0, "name": "0", "path": "", "type": TYPES_6["Transformer"]}],
            "sentence_bert_config.json": {
                "transformer_task": "sequence-classification",
                "module_output_name": "scores",
                "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
            },
        },
    ),
    # refused: Pooling
    *(
        PoolingForm(
            f"pooling mode {mode}",
            [("Pooling", MEAN | {"pooling_mode": mode}), NORMALIZE],
            f"1_Pooling/config.json: the pooling mode {mode} ",
        )
        for mode in ("max", "weightedmean", "mean_sqrt_len_tokens")
    ),
    *(
        PoolingForm(
            f"flag {flag}", [("Pooling", old_flags(flag))], "1_Pooling/config.json: the pooling mode .* is not served"
        )
        for flag in ("max_tokens", "weightedmean_tokens", "mean_sqrt_len_tokens")
    ),
    PoolingForm(
        "two flags", [("Pooling", old_flags("cls_token", "mean_tokens"))], "the pooling mode cls, mean is not served"
    ),
    PoolingForm(
        "two modes", [("Pooling", MEAN | {"pooling_mode": ["mean", "max"]})], "the pooling mode mean, max is not served"
    ),
    PoolingForm(
        "mode against flag",
        [("Pooling", old_flags("cls_token") | {"pooling_mode": "mean"})],
        "the pooling mode mean and the flags cls is not",
    ),
    PoolingForm("no mode", [("Pooling", {"embedding_dimension": SIZE})], r"the pooling mode \(none\) is not served"),
    PoolingForm(
        "number as flag",
        [("Pooling", {"pooling_mode_mean_tokens": 1})],
        "pooling_mode_mean_tokens must be true or false",
    ),
    PoolingForm(
        "unknown setting",
        [("Pooling", MEAN | {"pooling_mode_first": True})],
        "'pooling_mode_first' is no setting of Pooling",
    ),
    # refused: other modules and orders
    PoolingForm(
        "LayerNorm", [("Pooling", MEAN), ("LayerNorm", {"dimension": SIZE})], "module type '.*LayerNorm' is not served"
    ),
    *(
        PoolingForm(kind, [(kind, {})], f"module type '.*{kind}' is not served")
        for kind in ("WeightedLayerPooling", "CNN", "LSTM", "WordWeights", "Router", "Asym")
    ),
    *(
        PoolingForm(
            kind, [("Pooling", MEAN)], f"module type '.*{kind}' is not served", types={"Transformer": OLD + kind}
        )
        for kind in ("CLIPModel", "WordEmbeddings", "StaticEmbedding", "BoW")
    ),
    PoolingForm(
        "SPLADE",
        [("SpladePooling", {})],
        "SpladePooling' is not served",
        types={"SpladePooling": "sentence_transformers.sparse_encoder.models.SpladePooling"},
    ),
    PoolingForm(
        "ColBERT", [dense()], "pylate.models.Dense.Dense' is not served", types={"Dense": "pylate.models.Dense.Dense"}
    ),
    PoolingForm(
        "code of the model",
        [("Pooling", MEAN)],
        "custom_st.Transformer' is not served",
        types={"Transformer": "custom_st.Transformer"},
    ),
    PoolingForm(
        "Normalize before Dense",
        [("Pooling", MEAN), NORMALIZE, dense()],
        "Transformer Pooling Normalize Dense are not served in this order",
    ),
    PoolingForm("two Normalize", [("Pooling", MEAN), NORMALIZE, NORMALIZE], "are not served in this order"),
    PoolingForm("Dense before Pooling", [dense(), ("Pooling", MEAN)], "are not served in this order"),
    PoolingForm("no Pooling", (), "has no Pooling"),
    PoolingForm(
        "sparse encoder",
        refusal="model_type 'SparseEncoder' is not served",
        files={MODEL: {"model_type": "SparseEncoder"}},
    ),
    PoolingForm(
        "multi-vector encoder",
        refusal="model_type 'MultiVectorEncoder' is not served",
        files={MODEL: {"model_type": "MultiVectorEncoder"}},
    ),
    PoolingForm(
        "normalized tokens",
        [("Pooling", MEAN), ("Normalize", {"module_input_name": "token_embeddings"})],
        "2_Normalize/config.json: module_input_name 'token_embeddings'",
    ),
    PoolingForm("no list of modules", refusal="lacks modules.json, which says", files={"modules.json": None}),
    PoolingForm(
        "modules as an object",
        refusal="modules.json is not a list",
        files={"modules.json": {"modules": [{"type": OLD + "Pooling", "path": "1_Pooling"}]}},
    ),
    PoolingForm(
        "folder outside",
        refusal="names the folder '../x'",
        files={"modules.json": [{"type": OLD + "Transformer", "path": "../x"}]},
    ),
    PoolingForm(
        "Transformer in a folder",
        refusal="the Transformer is in the folder '0_Transformer'",
        files={
            "modules.json": [
                {"type": OLD + "Transformer", "path": "0_Transformer"},
                {"type": OLD + "Pooling", "path": "1_Pooling", "name": "1"},
            ]
        },
    ),
    # refused: Dense
    PoolingForm(
        "LeakyReLU",
        [("Pooling", MEAN), dense(activation=ACTIVATION + "LeakyReLU")],
        "2_Dense/config.json: activation_function '.*LeakyReLU'",
    ),
    PoolingForm(
        "function as activation",
        [("Pooling", MEAN), dense(activation="torch.tanh")],
        "activation_function 'torch.tanh' is not",
    ),
    PoolingForm("no activation", [("Pooling", MEAN), dense(activation=None)], "activation_function None is not served"),
    PoolingForm("residual", [("Pooling", MEAN), dense(use_residual=True)], "use_residual is not served"),
    PoolingForm(
        "Dense of tokens",
        [("Pooling", MEAN), dense(module_input_name="token_embeddings")],
        "module_input_name 'token_embeddings'",
    ),
    PoolingForm(
        "Dense of another size",
        [("Pooling", old_flags("mean_tokens")), dense(96)],
        "in_features is 96, and the module before gives vectors of 128",
    ),
    PoolingForm(
        "Dense chain broken",
        [("Pooling", MEAN), dense(SIZE, 96), dense(64, 32)],
        "3_Dense/config.json: in_features is 64, and the module before gives vectors of 96",
    ),
    PoolingForm(
        "pickled Dense",
        [("Pooling", MEAN), dense()],
        "2_Dense has pytorch_model.bin and no model.safetensors",
        pickled=True,
    ),
    # refused: settings of the whole model
    PoolingForm(
        "default prompt",
        refusal="default_prompt_name 'query' is not applied",
        files={MODEL: {"prompts": {"query": "query: "}, "default_prompt_name": "query"}},
    ),
    PoolingForm(
        "unknown default prompt",
        refusal="default_prompt_name 'x' is not applied",
        files={MODEL: {"prompts": {}, "default_prompt_name": "x"}},
    ),
    PoolingForm("cut vectors", refusal="truncate_dim 32 is not applied", files={MODEL: {"truncate_dim": 32}}),
    PoolingForm(
        "arguments of the model",
        refusal="sentence_bert_config.json: config_args .* is not served",
        files={"sentence_bert_config.json": {"max_seq_length": 64, "config_args": {"num_hidden_layers": 1}}},
    ),
    PoolingForm(
        "other hidden state",
        refusal="modality_config .* is not served",
        files={
            "sentence_bert_config.json": TEXT_TASK
            | {"modality_config": {"text": {"method": "forward", "method_output_name": ["hidden_states", 1]}}}
        },
    ),
    PoolingForm(
        "no length",
        refusal="max_seq_length None is not served",
        files={"sentence_bert_config.json": {"max_seq_length": None, "do_lower_case": False}},
    ),
    PoolingForm("adapter", refusal="has adapter_config.json", files={"adapter_config.json": {"peft_type": "LORA"}}),
    PoolingForm(
        "cross-encoder, softmax",
        (),
        "activation function '.*Softmax' of this cross-encoder",
        activation=ACTIVATION + "Softmax",
        files={"config.json": {"sentence_transformers": {"activation_fn": ACTIVATION + "Softmax"}}},
    ),
    PoolingForm(
        "cross-encoder, custom",
        (),
        "activation function 'my.Scale' of this cross-encoder",
        activation="x",
        files={MODEL: {"model_type": "CrossEncoder", "activation_fn": "my.Scale"}},
    ),
)
"""Forms of models that sentence-transformers writes, reads or wrote."""


def minilm(cache_dir: Path) -> Path:
    """Return the folder of all-MiniLM-L6-v2; skip the test if its package is not installed."""
    if str(PACKAGE_FOLDER) not in sys.path:
        sys.path.append(str(PACKAGE_FOLDER))
    try:
        return demo_model.ensure_demo_model(cache_dir, source=demo_model.MINILM_SOURCE)
    except demo_model.DemoModelError as error:
        pytest.skip(str(error))


def build_form(folder: Path, form: PoolingForm, *, weights: bool = True) -> Path:
    """Write a random model of a form into `folder`; return the folder. The numbers depend on the form's name only.

    `weights`: whether to write the weights of the Transformer, and its tokenizer.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(form.name.encode()))
        if weights:
            _write_transformer(folder, form)
        else:
            kind = "ForSequenceClassification" if form.activation else "Model"
            _write(folder / "config.json", {"model_type": "bert", "architectures": [f"Bert{kind}"]})
        listed = [{"idx": 0, "name": "0", "path": "", "type": form.types.get("Transformer", f"{OLD}Transformer")}]
        for at, (kind, settings) in enumerate(form.modules, 1):
            path = folder / f"{at}_{kind}"
            listed.append({"idx": at, "name": str(at), "path": path.name, "type": form.types.get(kind, OLD + kind)})
            _write(path / "config.json", settings)
            if kind == "Dense":
                _write_dense(path, settings, pickled=form.pickled)
    if not form.activation:
        _write(folder / "modules.json", listed)
        _write(folder / MODEL, {"__version__": {}, "prompts": {}, "default_prompt_name": None})
    for name, change in form.files.items():
        if change is None:
            (folder / name).unlink()
        else:
            before = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
            _write(folder / name, before | change if isinstance(change, dict) and isinstance(before, dict) else change)
    return folder


def _write(file: Path, content: object) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))


def _write_dense(path: Path, settings: Mapping[str, Any], *, pickled: bool) -> None:
    import torch
    from safetensors.torch import save_file

    linear = torch.nn.Linear(settings["in_features"], settings["out_features"], bias=settings["bias"])
    state = {f"linear.{name}": tensor.detach() * 3 for name, tensor in linear.state_dict().items()}
    if pickled:
        torch.save(state, path / "pytorch_model.bin")
    else:
        save_file(state, path / "model.safetensors")


def _write_transformer(folder: Path, form: PoolingForm) -> None:
    """Write a random model with its tokenizer into `folder`."""
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    config = AutoConfig.for_model(
        **{
            "vocab_size": 1024,
            "hidden_size": SIZE,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "max_position_embeddings": 96,
            "initializer_range": 0.2,
            "num_labels": 1,
            **BASES[form.base],
        }
    )
    model = (AutoModelForSequenceClassification if form.activation else AutoModel).from_config(config)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer(types=form.base == "bert").save_pretrained(folder)


def tokenizer(*, types: bool = True) -> Any:
    """Return the tokenizer of the random models: words, with BERT's special tokens. `types`: whether it returns token
    types."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, **{w: 5 + i for i, w in enumerate(WORDS)}}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]  # as BertTokenizer's
    return PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", model_input_names=names, **special)


def reference(folder: Path, form: PoolingForm, inputs: Sequence[tuple[Sequence[int], int]]) -> list[list[float]]:
    """Return the vectors or scores of inputs, computed with torch and transformers as sentence-transformers does.

    `inputs`: pairs of token ids and the start of the second text (0: there is none).
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if form.activation else AutoModel
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    results = []
    for ids, second in inputs:
        types = [int(second and at >= second) for at in range(len(ids))]
        arguments = {"token_type_ids": torch.tensor([types])} if form.base == "bert" else {}
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([ids]), **arguments)
            if form.activation:
                results.append(activation_of(form.activation)(output.logits)[0].tolist())
                continue
            vector = output.last_hidden_state[0]
            for at, (kind, settings) in enumerate(form.modules, 1):
                if kind == "Pooling":
                    mode = next((key for key, value in settings.items() if value is True and "mode" in key), None)
                    mode = settings.get("pooling_mode", mode)
                    vector = vector.mean(0) if "mean" in mode else vector[-1 if "last" in mode else 0]
                elif kind == "Dense":
                    path = folder / f"{at}_{kind}"
                    file = path / "pytorch_model.bin"
                    state = torch.load(file) if form.pickled else load_file(path / "model.safetensors")
                    vector = torch.nn.functional.linear(vector, state["linear.weight"], state.get("linear.bias"))
                    vector = activation_of(settings["activation_function"])(vector)
                elif kind == "Normalize":
                    vector = torch.nn.functional.normalize(vector, dim=-1)
            results.append(vector.tolist())
    return results


def activation_of(name: str) -> Any:
    """Return the activation function of a name such as `torch.nn.modules.activation.Tanh`."""
    import torch

    return getattr(torch.nn, name.rpartition(".")[2])()


def build_cross_encoder(folder: Path, labels: int = 1) -> Path:
    """Write a tiny random BertForSequenceClassification with its tokenizer into `folder`; return the folder. Its scores
    depend on the token types."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=1024,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=96,
        type_vocab_size=2,
        num_labels=labels,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = BertForSequenceClassification(config)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer().save_pretrained(folder)
    return folder
