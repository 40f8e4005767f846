"""Modules of embedding models in sentence-transformers' layout: modules.json, and a folder for each module.

Problem: vLLM reads only part of these settings and passes over the rest, so a model can serve vectors that differ from
those of sentence-transformers without any error. `check_modules` accepts a folder only if each setting is one that vLLM
applies in the same way (vllm/transformers_utils/config.py:get_pooling_config, model_executor/models/adapters.py), or
one without effect on a vector. The files are fetched with the weights and included in the digest.

Source: sentence-transformers 6.3, base/modules and sentence_transformer/modules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.worker.weights.safetensors_header import HeaderError, read_header

MODULES, MODEL_SETTINGS = "modules.json", "config_sentence_transformers.json"
WEIGHTS, PICKLED_WEIGHTS = "model.safetensors", "pytorch_model.bin"
FILES = ("config.json", WEIGHTS, PICKLED_WEIGHTS)
"""Files that a module's folder may have."""
TRANSFORMER_SETTINGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Names of the Transformer module's settings. The first file that exists and is not empty counts."""
SETTINGS = (MODULES, MODEL_SETTINGS, *TRANSFORMER_SETTINGS)
"""Files besides config.json that determine how an embedding model treats texts."""
MAX_MODULES = 16
MAX_BYTES = 1 << 20
"""Maximum size of a modules.json."""
KINDS: Mapping[str, str] = {
    f"sentence_transformers.{path}": path.rpartition(".")[2]
    for path in (
        *(f"models.{kind}" for kind in ("Transformer", "Pooling", "Dense", "Normalize", "Dropout")),
        "base.modules.transformer.Transformer",
        "sentence_transformer.modules.pooling.Pooling",
        "base.modules.dense.Dense",
        "base.modules.normalize.Normalize",
        "sentence_transformer.modules.normalize.Normalize",
        "sentence_transformer.modules.dropout.Dropout",
    )
}
"""Kinds of modules by the types that both vLLM and sentence-transformers know. vLLM passes over other types. A Dropout
changes no vector."""
POOLING_MODES = {"cls": "CLS", "mean": "MEAN", "lasttoken": "LAST"}
"""The modes of Pooling that vLLM has, with vLLM's names."""
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = (
    *(f"torch.nn.modules.activation.{name}" for name in ("Tanh", "ReLU", "Sigmoid", "GELU", "SiLU")),
    "torch.nn.modules.linear.Identity",
)
"""The activation functions that vLLM and sentence-transformers both load, by name."""
_ORDER = re.compile("Transformer( Pooling( Dense| Dropout)*( Normalize)?( Dropout)*)?")
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_FLOATS = ("F16", "BF16", "F32", "F64")
AGAIN = "fetch or copy the model again, subfolders included"


@dataclass(frozen=True, slots=True)
class Module:
    """An item of modules.json. `folder`: "" for the model's folder itself."""

    kind: str
    folder: str


def module_folders(content: bytes) -> Sequence[str]:
    """Return the names of the modules' folders. `content`: content of a modules.json.

    Raises ValueError for content that is not a list of modules, for a module that is not served, and for a folder that
    is not a plain name.
    """
    return [module.folder for module in _modules(content) if module.folder]


def _modules(content: bytes) -> Sequence[Module]:
    try:
        listed = json.loads(content)
        pairs = [(module["type"], module["path"]) for module in listed]
        names = {module.get("name", at) for at, module in enumerate(listed)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{MODULES} is not a list of modules with type and path: {AGAIN}") from None
    if not 0 < len(pairs) <= MAX_MODULES:
        raise ValueError(f"{MODULES} has {len(pairs)} modules; it must have 1 to {MAX_MODULES}")
    if len(names) < len(pairs):
        raise ValueError(f"{MODULES}: a name occurs twice, and sentence-transformers would drop a module: {AGAIN}")
    for kind, folder in pairs:
        if not isinstance(folder, str) or (folder and not _FOLDER.fullmatch(folder)):
            shown = str(folder)[:64]
            raise ValueError(f"{MODULES} names the folder {shown!r}; it must be letters, digits, '_' and '-'")
        if str(kind) not in KINDS:
            raise ValueError(
                f"{MODULES}: the module type {str(kind)[:80]!r} is not served, because vLLM would leave it out. Served "
                f"are {', '.join(sorted(set(KINDS.values())))} of sentence_transformers.models: choose another model"
            )
    modules = [Module(KINDS[str(kind)], folder) for kind, folder in pairs]
    order = " ".join(module.kind for module in modules)
    if not _ORDER.fullmatch(order):
        raise ValueError(
            f"{MODULES}: the modules {order} are not served in this order, because vLLM would apply them in another. "
            "Served is Transformer Pooling, then any number of Dense, then at most one Normalize: choose another model"
        )
    if modules[0].folder:
        raise ValueError(
            f"{MODULES}: the Transformer is in the folder {modules[0].folder!r}, and vLLM reads the model's folder: "
            "save the model with a current sentence-transformers, whose Transformer has the path ''"
        )
    return modules


def check_modules(folder: Path, *, pickled: bool = False) -> None:
    """Raise ValueError for a model folder whose vectors or scores would differ from those of sentence-transformers.

    `pickled`: whether weights of modules may be in pickled files.
    """
    config = _settings(folder / "config.json")
    if not (folder / MODULES).is_file():
        stray = [name for name in (*SETTINGS, "1_Pooling") if (folder / name).exists()]
        if stray and not _is_cross_encoder(config):
            raise ValueError(
                f"{folder} has {stray[0]} and lacks {MODULES}, which says how texts become vectors: {AGAIN}"
            )
        modules: Sequence[Module] = ()
    else:
        modules = _modules((folder / MODULES).read_bytes())
        if (folder / "adapter_config.json").exists():
            raise ValueError(f"{folder} has adapter_config.json, which vLLM would leave out: merge the adapter first")
    own = _settings(folder / MODEL_SETTINGS)
    is_cross_encoder = own.get("model_type") == "CrossEncoder" or (not modules and _is_cross_encoder(config))
    _check_model_settings(own, is_cross_encoder)
    if is_cross_encoder:
        _check_cross_encoder(modules, folder)
    if not modules:
        return
    if is_cross_encoder:
        _check_transformer(folder, "sequence-classification", "logits", "scores")
        return
    _check_transformer(folder, "feature-extraction", "last_hidden_state", "token_embeddings")
    if len(modules) < 2:
        raise ValueError(f"{MODULES} has no Pooling, so the model has no vector of a text: choose another model")
    size = _pooling_size(folder, modules[1].folder)
    for module in modules[2:]:
        if module.kind == "Dense":
            size = _check_dense(folder, module.folder, size, pickled=pickled)
        elif module.kind == "Normalize":
            _check_names(f"{module.folder}/config.json", _settings(folder / module.folder / "config.json"))
    cut = own.get("truncate_dim")
    if cut is not None and not (isinstance(cut, int) and size <= cut):
        raise ValueError(
            f"{MODEL_SETTINGS}: truncate_dim {cut!r} is not applied. Remove it, and let callers send `dimensions`; "
            "the lengths that they may choose are set with engine.hf_overrides: {matryoshka_dimensions: [...]}"
        )


def pooling_type(folder: Path) -> str:
    """Return vLLM's name of the pooling mode that a checked folder's settings choose; "" if there are none."""
    try:
        modules = _modules((folder / MODULES).read_bytes())
    except FileNotFoundError:
        return ""
    return _mode(folder, modules[1].folder) if len(modules) > 1 else ""


def lowers(folder: Path) -> bool:
    """Return whether an embedding model's texts must be converted to lower case before they are tokenized."""
    return _transformer_settings(folder)[1].get("do_lower_case") is True


def config_overrides(folder: Path) -> Mapping[str, Any]:
    """Return the values to set in vLLM's view of config.json, so that vectors and scores equal sentence-transformers'.

    vLLM reads the activation function of a cross-encoder from config.json only, and prefers `problem_type` to it. It
    needs `position_embedding_type` for XLMRobertaModel, and transformers 5 does not write this key.
    """
    overrides: dict[str, Any] = {}
    if activation := _activation(folder):
        overrides |= {"problem_type": None, "sentence_transformers": {"activation_fn": activation}}
    config = _settings(folder / "config.json")
    if config.get("model_type") == "xlm-roberta" and "position_embedding_type" not in config:
        overrides["position_embedding_type"] = "absolute"
    return overrides


def module_files(folder: Path) -> Sequence[Path]:
    """Return the files in a model's folder that determine how the model pools: the model's own settings, and the files
    of its modules."""
    try:
        folders = module_folders((folder / MODULES).read_bytes())
    except (OSError, ValueError):
        return ()
    own = [folder / name for name in SETTINGS]
    return [file for file in (*own, *(folder / sub / name for sub in folders for name in FILES)) if file.is_file()]


def _settings(file: Path, *, needed: bool = False) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is no file. Raises ValueError. `needed`: whether there must be a
    file."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not needed:
            return {}
        raise ValueError(
            f"{file.parent.parent} lacks {file.parent.name}/{file.name}, which {MODULES} names: without it every "
            f"vector would be wrong; {AGAIN}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}; {AGAIN}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{file} must hold a JSON object; {AGAIN}")
    return settings


def _is_cross_encoder(config: Mapping[str, Any]) -> bool:
    return any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())


def _check_model_settings(own: Mapping[str, Any], is_cross_encoder: bool) -> None:
    kind = own.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer" and not is_cross_encoder:
        raise ValueError(
            f"{MODEL_SETTINGS}: model_type {kind!r} is not served; served are SentenceTransformer and CrossEncoder: "
            "choose another model"
        )
    name, prompts = own.get("default_prompt_name"), own.get("prompts") or {}
    known = {"query": "", "document": ""} | (prompts if isinstance(prompts, dict) else {})
    if name is not None and (name not in known or known[name]):
        raise ValueError(
            f"{MODEL_SETTINGS}: default_prompt_name {name!r} is not applied. Set it to null in a copy of the model, "
            "and let callers put the prompt in front of their texts"
        )


def _check_transformer(folder: Path, task: str, output: str, to: str) -> None:
    """Raise ValueError if the Transformer module does more than to write the model's `output` for a text to `to`."""
    flag, empty = ("true", "false"), ("{}", "null")
    text = [json.dumps({"method": "forward", "method_output_name": name}) for name in (output, [output])]
    served: Mapping[str, Sequence[str]] = {
        "transformer_task": (f'"{task}"',),
        "module_output_name": (f'"{to}"',),
        "modality_config": text,
        "do_lower_case": flag,
        "unpad_inputs": (*flag, "null"),
        **dict.fromkeys(("query_length", "document_length", "query_expansion", "processing_kwargs"), empty),
        **dict.fromkeys(("model_args", "tokenizer_args", "config_args"), empty[:1]),
        **dict.fromkeys(("model_kwargs", "processor_kwargs", "config_kwargs"), empty[:1]),
    }
    name, settings = _transformer_settings(folder)
    for key, value in settings.items():
        part = value.get("text") if key == "modality_config" and isinstance(value, dict) else value
        is_length = key == "max_seq_length" and isinstance(value, int) and value > 0 and value is not True
        if not is_length and json.dumps(part) not in served.get(key, ()):
            raise ValueError(
                f"{name}: {key} {str(value)[:80]} is not served, because vLLM would not apply it. Remove the key if "
                "the model does not need it, or choose another model"
            )


def _transformer_settings(folder: Path) -> tuple[str, Mapping[str, Any]]:
    for name in TRANSFORMER_SETTINGS:
        if settings := _settings(folder / name):
            return name, settings
    return TRANSFORMER_SETTINGS[0], {}


def _mode(folder: Path, sub: str) -> str:
    """Return vLLM's name of a Pooling module's mode. Raises ValueError for a mode that vLLM does not have, and for
    settings in which vLLM and sentence-transformers would see different modes."""
    where, settings = f"{sub}/config.json", _settings(folder / sub / "config.json", needed=True)
    for key, value in settings.items():
        if key in POOLING_FLAGS or key == "include_prompt":
            if not isinstance(value, bool):
                raise ValueError(f"{where}: {key} must be true or false, got {value!r}; {AGAIN}")
        elif key not in ("pooling_mode", "embedding_dimension", "word_embedding_dimension"):
            raise ValueError(f"{where}: {key!r} is no setting of Pooling; {AGAIN}")
    flags = [mode for key, mode in POOLING_FLAGS.items() if settings.get(key)]
    named = settings.get("pooling_mode")
    modes = flags if named is None else named if isinstance(named, list) else [named]
    if len(modes) != 1 or modes[0] not in POOLING_MODES or (flags and flags != modes) or isinstance(named, list):
        both = f" and the flags {', '.join(flags)}" if flags and named is not None else ""
        raise ValueError(
            f"{where}: the pooling mode {', '.join(map(str, modes)) or '(none)'}{both} is not served, because vLLM "
            f"would pool in another way. Served is exactly one of {', '.join(POOLING_MODES)}: choose another model"
        )
    return POOLING_MODES[modes[0]]


def _pooling_size(folder: Path, sub: str) -> int:
    """Check a Pooling module, and return the length of its vectors."""
    _mode(folder, sub)
    settings = _settings(folder / sub / "config.json")
    size = settings.get("embedding_dimension", settings.get("word_embedding_dimension"))
    return _whole(f"{sub}/config.json", "embedding_dimension", size)


def _whole(where: str, key: str, number: object) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{where}: {key} must be a whole number of at least 1, got {number!r}; {AGAIN}")
    return number


def _check_names(where: str, settings: Mapping[str, Any]) -> None:
    """Raise ValueError if a module reads or writes anything but the vector of a text."""
    for key in ("module_input_name", "module_output_name"):
        if settings.get(key) not in (None, "sentence_embedding"):
            raise ValueError(
                f"{where}: {key} {settings[key]!r} is not served; served is 'sentence_embedding': choose another model"
            )


def _check_dense(folder: Path, sub: str, size: int, *, pickled: bool) -> int:
    """Check the settings and the weights of a Dense module, and return the length of its vectors.

    `size`: length of the vectors that it gets.
    """
    where, settings = f"{sub}/config.json", _settings(folder / sub / "config.json", needed=True)
    _check_names(where, settings)
    has, gives = (_whole(where, key, settings.get(key)) for key in ("in_features", "out_features"))
    if has != size:
        raise ValueError(f"{where}: in_features is {has}, and the module before gives vectors of {size}; {AGAIN}")
    if not isinstance(bias := settings.get("bias", True), bool):
        raise ValueError(f"{where}: bias must be true or false, got {bias!r}; {AGAIN}")
    if settings.get("use_residual"):
        raise ValueError(f"{where}: use_residual is not served, because vLLM would leave it out: choose another model")
    if (activation := settings.get("activation_function")) not in ACTIVATIONS:
        raise ValueError(
            f"{where}: activation_function {activation!r} is not served, because vLLM and sentence-transformers do not "
            f"both apply it. Served are {', '.join(ACTIVATIONS)}: choose another model"
        )
    wanted = {"linear.weight": (gives, has), **({"linear.bias": (gives,)} if bias else {})}
    name, shapes = _dense_shapes(folder / sub, pickled=pickled)
    if shapes != wanted:
        raise ValueError(
            f"{sub}/{name} has the tensors {_listed(shapes)} where {where} asks for {_listed(wanted)}; {AGAIN}"
        )
    return gives


def _dense_shapes(folder: Path, *, pickled: bool) -> tuple[str, Mapping[str, tuple[int, ...]]]:
    """Return the name of a Dense module's weight file, and its tensors' shapes. Raises ValueError."""
    file, where = folder / WEIGHTS, f"{folder.name}/{WEIGHTS}"
    if file.is_file():
        try:
            with file.open("rb") as stream:
                tensors = read_header(stream, file.stat().st_size)
        except (HeaderError, OSError) as error:
            raise ValueError(f"{where} {error}; {AGAIN}") from None
        if odd := [name for name, tensor in tensors.items() if tensor.dtype not in _FLOATS]:
            raise ValueError(f"{where}: {odd[0]} has the type {tensors[odd[0]].dtype}; served are {', '.join(_FLOATS)}")
        return WEIGHTS, {name: tensor.shape for name, tensor in tensors.items()}
    file = folder / PICKLED_WEIGHTS
    if not file.is_file():
        raise ValueError(f"{folder.parent} lacks {where}, the weights of a Dense module; {AGAIN}")
    if not pickled:
        raise ValueError(
            f"{folder.name} has {PICKLED_WEIGHTS} and no {WEIGHTS}; pickled weights can run code. Convert them to "
            "safetensors, or set load_format and weights.allow.formats"
        )
    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        return PICKLED_WEIGHTS, {name: tuple(tensor.shape) for name, tensor in state.items()}
    except Exception as error:  # a damaged pickle raises many types
        raise ValueError(f"{folder.name}/{PICKLED_WEIGHTS} cannot be read: {error}; {AGAIN}") from None


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in list(shapes.items())[:4]) or "none"


def _check_cross_encoder(modules: Sequence[Module], folder: Path) -> None:
    if len(modules) > 1:
        kinds = " ".join(module.kind for module in modules)
        raise ValueError(f"{MODULES}: the modules {kinds} of a CrossEncoder are not served: choose another model")
    activation = _activation(folder)
    if activation and activation not in ACTIVATIONS:
        raise ValueError(
            f"the activation function {activation!r} of this cross-encoder is not served. Served are "
            f"{', '.join(ACTIVATIONS)}: choose another model"
        )


def _activation(folder: Path) -> str:
    """Return the activation function of a cross-encoder that sentence-transformers has saved; "" for other models."""
    config, own = _settings(folder / "config.json"), _settings(folder / MODEL_SETTINGS)
    section = config.get("sentence_transformers")
    named = (
        own.get("activation_fn") if own.get("model_type") == "CrossEncoder" else None,
        section.get("activation_fn") if isinstance(section, dict) else None,
        config.get("sbert_ce_default_activation_function"),
    )
    saved = own.get("model_type") == "CrossEncoder" or isinstance(section, dict)
    return str(next(filter(None, named), ACTIVATIONS[2] if saved else ""))
