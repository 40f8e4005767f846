"""Makes a tokenizer bundle from a model's folder: what the gateway needs to speak the model's tokens.

The tokenizer is loaded as the engine loads it (transformers' AutoTokenizer) and its Rust backend is written out, so
that whatever a tokenizer class changes after reading tokenizer.json (BOS post-processor, prefix space, special
tokens) is in the bundle. The gateway then needs neither transformers nor the folder.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.api.bundle import Bundle

CONFIG_FIELDS = ("model_type", "architectures", "vocab_size", "bos_token_id", "eos_token_id", "max_position_embeddings")
TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def build_bundle(folder: Path, *, trust_remote_code: bool = False) -> Bundle:
    """The bundle of the model in `folder`. Equal folders give equal digests.

    Raises ValueError when the folder has no tokenizer, one without a fast (tokenizer.json) form, or a chat template
    with a name that cannot be a file's.
    """
    tokenizer = _load(folder, trust_remote_code)
    files = {
        "tokenizer.json": _backend_json(tokenizer).encode(),
        "tokenizer_config.json": _dump(_tokenizer_config(tokenizer)),
        "generation_config.json": _dump(_read_json(folder / "generation_config.json")),
        "config.json": _dump(_model_config(folder)),
    }
    for name, source in _templates(tokenizer).items():
        files["chat_template.jinja" if name == "default" else f"chat_template.{name}.jinja"] = source.encode()
    return Bundle(files)


def _load(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer, TokenizersBackend

    try:
        # mistral_format=False: tokenizer.json is preferred to tekken.json, whose tokenizer has no Rust backend.
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True, mistral_format=False
        )
    except (ValueError, OSError, ImportError) as e:
        raise ValueError(
            f"no tokenizer can be loaded from {folder}: {e}. The folder must hold a tokenizer.json and a "
            "tokenizer_config.json; a tokenizer with code of its own needs trust_remote_code"
        ) from e
    if not isinstance(tokenizer, TokenizersBackend):
        raise ValueError(
            f"the tokenizer in {folder} ({type(tokenizer).__name__}) has no fast form: convert it once with "
            "transformers' convert_slow_tokenizer and save its tokenizer.json beside the model"
        )
    return tokenizer


def _backend_json(tokenizer: Any) -> str:
    """The Rust tokenizer's JSON, without the truncation and padding that only batch inference wants."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    return str(backend.to_str())


def _tokenizer_config(tokenizer: Any) -> dict[str, Any]:
    """transformers' own names; special tokens as plain strings, as a template sees them."""
    return {
        **tokenizer.special_tokens_map,
        "extra_special_tokens": [str(token) for token in tokenizer.extra_special_tokens],
        "add_bos_token": bool(getattr(tokenizer, "add_bos_token", False)),
        "add_eos_token": bool(getattr(tokenizer, "add_eos_token", False)),
        "split_special_tokens": bool(tokenizer.split_special_tokens),
    }


def _model_config(folder: Path) -> dict[str, Any]:
    """The few fields of config.json that concern tokens; a multimodal model's lie in its text_config."""
    config = _read_json(folder / "config.json")
    text = config.get("text_config")
    merged = {**(text if isinstance(text, dict) else {}), **config}
    return {name: merged[name] for name in CONFIG_FIELDS if merged.get(name) is not None}


def _templates(tokenizer: Any) -> Mapping[str, str]:
    """Name -> source; a single template is called `default`."""
    template = tokenizer.chat_template
    if template is None:
        return {}
    templates = dict(template) if isinstance(template, dict) else {"default": template}
    for name in templates:
        if not TEMPLATE_NAME.fullmatch(name):
            raise ValueError(f"chat template name {name!r} must be letters, digits, '_' and '-' only: rename its file")
    return templates


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode()
