"""A model folder's tokenizer, loaded as in the engine and checked against the model's vocabulary.

Problem: if a folder has no tokenizer file, transformers creates a tokenizer without a vocabulary. It also loads a
tokenizer with ids that the model lacks. Calls then fail with errors that blame the caller. So such a folder is refused
when it is opened, with an error that names the file and the remedy.

Some published models have special tokens with ids beyond the vocabulary that no text needs, such as a padding token, or
an image placeholder in a tokenizer shared with a multimodal model. The gateway's tokenizer omits such tokens and treats
their strings as ordinary text.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cluster.worker.weights.tekken import TEKKEN_FILE, load_tekken

MAX_JSON_BYTES = 16 << 20
"""Maximum size of a file with settings of a model or tokenizer."""
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken")
NEEDED = "tokenizer.json, tokenizer.model, tekken.json, vocab.json with merges.txt, or vocab.txt"
TEXT_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token")
"""Roles of special tokens that may occur in the token ids of a text, for example at its start or end."""
UNUSED_IN_TEXT = ("pad_token", "mask_token")
NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
"""Fields of a multimodal model's config.json that contain the configuration of the text model."""
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings", "embedding")


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer in a folder.

    Raises ValueError if the folder has no tokenizer with a Rust backend. The error has the path and the remedy.
    """
    from transformers import AutoTokenizer, TokenizersBackend

    if has_only_tekken(folder):
        return load_tekken(folder)
    if why := why_no_tokenizer(folder, trust_remote_code):
        raise ValueError(f"{folder} {why}")
    try:
        # mistral_format=False: prefer tokenizer.json to tekken.json, whose tokenizer has no Rust backend.
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True, mistral_format=False
        )
    except BaseException as error:  # a Rust panic is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if fault := _config_fault(folder):
            raise ValueError(
                f"{folder / 'config.json'}: {fault}; correct the file, or fetch or copy it again"
            ) from error
        raise ValueError(
            f"no tokenizer can be loaded from {folder}: {type(error).__name__}: {error}. {_remedy(folder)}"
        ) from error
    if not isinstance(tokenizer, TokenizersBackend):
        raise ValueError(
            f"the tokenizer in {folder} ({type(tokenizer).__name__}) has no fast form: convert it once with "
            "transformers' convert_slow_tokenizer and save its tokenizer.json beside the model"
        )
    if "merges_file" in tokenizer.vocab_files_names and _lacks_merges(folder):
        raise ValueError(f"no tokenizer can be loaded from {folder}: {_remedy(folder)}")
    special = {str(token) for token in tokenizer.all_special_tokens}
    if not set(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)) - special:
        raise ValueError(
            f"the tokenizer of {folder} has no tokens for text: its vocabulary is empty. {_remedy(folder)}"
        )
    return tokenizer


def has_only_tekken(folder: Path) -> bool:
    """Return whether Mistral's tekken.json is the folder's only tokenizer file."""
    return (folder / TEKKEN_FILE).exists() and not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def why_no_tokenizer(folder: Path, trust_remote_code: bool) -> str:
    """Return why a folder has no tokenizer; empty if it may have one."""
    if has_only_tekken(folder) or any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        return ""
    if trust_remote_code and "auto_map" in read_json(folder / "tokenizer_config.json"):
        return ""
    if any(folder.glob("*.gguf")):
        return "has its tokenizer in a gguf file, and gguf folders are not served yet: use the model's safetensors form"
    return f"has no tokenizer: it needs {NEEDED}. Copy the tokenizer files of the model that it was made from"


def _config_fault(folder: Path) -> str:
    """Return why transformers refuses the values of config.json, which it reads for a tokenizer too; empty if it does
    not, or does not know the type of model."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if read_json(folder / "config.json").get("model_type") not in CONFIG_MAPPING:
        return ""
    try:
        AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    return ""


def _remedy(folder: Path) -> str:
    for pattern in TOKENIZER_FILES:
        for file in sorted(folder.glob(pattern)):
            with file.open("rb") as stream:
                head = stream.read(200)
            if not head.strip():
                return f"{file.name} is empty: copy it again"
            if b"git-lfs" in head:
                return f"{file.name} is a pointer of Git LFS, not the file itself: run `git lfs pull` in the folder"
    if _lacks_merges(folder):
        return "The folder has vocab.json but no merges.txt: copy merges.txt there"
    return (
        "The folder must have an intact tokenizer.json and tokenizer_config.json: copy the tokenizer files of the "
        "model again; a tokenizer with its own code needs trust_remote_code"
    )


def _lacks_merges(folder: Path) -> bool:
    """Return whether the folder has vocab.json but no merges.

    Byte pair encoding would then make one token per letter.
    """
    here = {name for name in ("tokenizer.json", "vocab.json", "merges.txt") if (folder / name).exists()}
    return here == {"vocab.json"}


def check_vocabulary(folder: Path, tokenizer: Any) -> frozenset[int]:
    """Return the tokenizer's ids that are outside the model's vocabulary. None of these ids occurs in an encoded text.

    Raises ValueError if such an id may occur in a text, or if a configured EOS id is outside the vocabulary.
    """
    size = vocab_size(folder)
    if not size:
        return frozenset()
    _check_eos(folder, size)
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= size}
    if not beyond:
        return frozenset()
    harmless = _unneeded(folder, tokenizer, beyond)
    if wrong := sorted((number, token) for token, number in beyond.items() if token not in harmless):
        named = ", ".join(f"{token!r} ({number})" for number, token in wrong[:3])
        raise ValueError(
            f"the tokenizer of {folder} has {len(wrong)} tokens that the model does not have: its vocabulary has "
            f"{size} ids (vocab_size of config.json), and these are beyond: {named}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}. Put the model's own tokenizer there, "
            "or resize the model's embeddings"
        )
    return frozenset(beyond.values())


def _unneeded(folder: Path, tokenizer: Any, beyond: Mapping[str, int]) -> set[str]:
    """Return the tokens in `beyond` that the model does not need: those that are special and occur in no text.
    `beyond`: tokens whose ids are outside the model's vocabulary, with these ids."""
    special = {added.content for added in tokenizer.added_tokens_decoder.values() if added.special}
    in_text = {token for role in TEXT_ROLES for token in _texts(getattr(tokenizer, role, None))}
    in_text |= set(tokenizer.convert_ids_to_tokens(tokenizer("").input_ids))
    templates = tokenizer.chat_template or ""
    source = "".join(templates.values()) if isinstance(templates, dict) else templates
    named: set[str] = set()
    for role, value in tokenizer.special_tokens_map.items():
        if role not in TEXT_ROLES and role.endswith("_token"):
            named |= {token for token in _texts(value) if role not in UNUSED_IN_TEXT or token not in source}
    rows = embedding_rows(folder)
    return {
        token for token, number in beyond.items() if token in special - in_text and (token in named or number < rows)
    }


def _texts(value: Any) -> Iterable[str]:
    return () if value is None else (str(value),)


def _check_eos(folder: Path, size: int) -> None:
    for name in ("generation_config.json", "config.json"):
        values = text_config(read_json(folder / name))
        configured = values.get("eos_token_id")
        for number in configured if isinstance(configured, list) else [configured]:
            if isinstance(number, int) and not 0 <= number < size:
                raise ValueError(
                    f"{folder / name}: eos_token_id {number} is outside the model's vocabulary of {size} ids, which "
                    "is not served: name the id of the token that ends an answer"
                )


def vocab_size(folder: Path) -> int:
    """Return the size of the model's vocabulary, determined as in the engine; 0 if it is unknown."""
    written = text_config(read_json(folder / "config.json")).get("vocab_size")
    try:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        loaded = getattr(config.get_text_config(), "vocab_size", None)
    except Exception:  # an architecture with its own code, or unknown to this transformers
        loaded = None
    return next((number for number in (loaded, written) if isinstance(number, int)), 0)


def embedding_rows(folder: Path) -> int:
    """Return the number of rows of the model's input embedding, read from the headers of the safetensors files. Returns
    0 if the files have no input embedding."""
    from safetensors import SafetensorError, safe_open

    rows = 0
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(str(file), framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    parts = name.split(".")
                    if parts[-1] == "weight" and len(parts) > 1 and parts[-2] in EMBEDDINGS:
                        rows = max(rows, int(tensors.get_slice(name).get_shape()[0]))
        except (OSError, SafetensorError):
            continue  # checkpoint.py reports the damage
    return rows


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config.json, with the fields of its nested text model merged in."""
    for name in NESTED:
        nested = config.get(name)
        if isinstance(nested, dict):
            return {**config, **text_config(nested)}
    return dict(config)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is no file.

    Raises ValueError for a file that has no JSON object, or one in which a key has two values.
    """
    try:
        content = json.loads(read_bounded(path, MAX_JSON_BYTES).decode(), object_pairs_hook=_one_value)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {str(error)[:200]}; fetch or copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def _one_value(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        for key, value in pairs:
            if made[key] != value:
                raise ValueError(f"the key {key[:80]!r} occurs twice with different values")
    return made


def read_bounded(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most `most` bytes. Raises OSError otherwise. A FIFO does not block."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no regular file")
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(f"it has more than {most} bytes")
    return content
