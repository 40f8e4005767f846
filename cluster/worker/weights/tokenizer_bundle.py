"""Construction of a tokenizer bundle from a model's folder. A bundle has the files that a gateway needs to make and
read the model's tokens.

The tokenizer is loaded as in the engine (transformers' AutoTokenizer), and its Rust backend is written to the bundle.
So the bundle includes everything that a tokenizer class changes after reading tokenizer.json (BOS post-processor,
prefix space, special tokens), and the gateway needs neither transformers nor the folder.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cluster.wire.bundle import ESCAPE_SEPARATOR, ESCAPED_TOKENS, INPUT_NAMES, RENDERER, TRUNCATION_SIDE, Bundle
from cluster.worker.rendering.families import renderer_of
from cluster.worker.weights import sentence_modules
from cluster.worker.weights.tekken import TEKKEN_FILE
from cluster.worker.weights.vocabulary import check_vocabulary, load_tokenizer, read_json

CONFIG_FIELDS = ("model_type", "architectures", "vocab_size", "bos_token_id", "eos_token_id", "max_position_embeddings")
SEPARATORS = (" ", "\u200b", "\u2060")
"""Characters that may be put into a control token to escape it. The first that no control token contains is used."""
TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def build_bundle(
    folder: Path,
    *,
    trust_remote_code: bool = False,
    escapes_control_tokens: bool = False,
    tokenizer_mode: str = "auto",
) -> Bundle:
    """Return the bundle of the model in `folder`. Equal folders give equal digests.

    `escapes_control_tokens`: whether gateways escape control tokens in contents (gateway/text/chat/control_tokens.py).
    `tokenizer_mode`: the catalog entry's `engine.tokenizer_mode`, which may choose a renderer (rendering/families.py).

    Raises ValueError if the folder has no tokenizer, a tokenizer without a fast (tokenizer.json) form, a tokenizer with
    ids that the model does not have, control tokens that cannot be escaped, or a chat template whose name is not a
    valid file name.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    beyond = check_vocabulary(folder, tokenizer)
    escapes = (
        escaping(tokenizer.backend_tokenizer.get_added_tokens_decoder().values()) if escapes_control_tokens else {}
    )
    config, templates = _model_config(folder), _templates(tokenizer)
    renderer = renderer_of(
        tokenizer_mode,
        str(config.get("model_type", "")),
        config.get("architectures") or (),
        has_template=bool(templates),
        has_tekken=(folder / TEKKEN_FILE).exists(),
    )
    rendered = {RENDERER: renderer} if renderer else {}
    files = {
        "tokenizer.json": _backend_json(tokenizer, beyond, lowers=sentence_modules.lowers(folder)).encode(),
        "tokenizer_config.json": _dump(
            _tokenizer_config(tokenizer, beyond) | _input_settings(folder, tokenizer) | escapes | rendered
        ),
        "generation_config.json": _dump(read_json(folder / "generation_config.json")),
        "config.json": _dump(config),
    }
    for name, source in templates.items():
        files["chat_template.jinja" if name == "default" else f"chat_template.{name}.jinja"] = source.encode()
    return Bundle(files)


def escaping(added: Iterable[Any]) -> dict[str, Any]:
    """Return the entries of tokenizer_config.json with which a gateway escapes control tokens.

    `added`: the tokenizer's `tokenizers.AddedToken`s. Control tokens are the special tokens, and tokens in brackets
    such as `<tool_call>`. An escape puts a separator into a token, so tokens of one character are left out.

    Raises ValueError if every possible separator occurs in a control token, or if the tokenizer normalizes a text
    before it searches for control tokens, since the normalizer could remove the separator.
    """
    control = [token for token in added if token.special or token.content[:1] + token.content[-1:] in ("<>", "[]")]
    if token := next((token for token in control if token.normalized), None):
        raise ValueError(
            f"control_tokens_in_content: the tokenizer normalizes texts before {token.content!r}: use keep"
        )
    texts = sorted({token.content for token in control if len(token.content) > 1})
    free = [separator for separator in SEPARATORS if not any(separator in text for text in texts)]
    if not free:
        raise ValueError("control_tokens_in_content: every separator is part of a control token: use keep")
    return {ESCAPED_TOKENS: texts, ESCAPE_SEPARATOR: free[0]}


def _backend_json(tokenizer: Any, beyond: frozenset[int], *, lowers: bool = False) -> str:
    """Return the Rust tokenizer as JSON, without truncation, without padding, and without added tokens whose ids are in
    `beyond`.

    `lowers`: whether the returned tokenizer first converts texts to lower case.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    if lowers:
        from tokenizers import normalizers

        own = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    written = str(backend.to_str())
    if not beyond:
        return written
    content = json.loads(written)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] not in beyond]
    return json.dumps(content, ensure_ascii=False)


def _tokenizer_config(tokenizer: Any, beyond: frozenset[int]) -> dict[str, Any]:
    """Return the tokenizer's settings under transformers' names. Special tokens are returned as text. `beyond`: ids of
    the tokens that the settings must not contain."""
    left_out = set(tokenizer.convert_ids_to_tokens(sorted(beyond)))
    roles = {role: token for role, token in tokenizer.special_tokens_map.items() if str(token) not in left_out}
    extra = [str(token) for token in tokenizer.extra_special_tokens if str(token) not in left_out]
    return {
        **roles,
        "extra_special_tokens": extra,
        "add_bos_token": bool(getattr(tokenizer, "add_bos_token", False)),
        "add_eos_token": bool(getattr(tokenizer, "add_eos_token", False)),
        "split_special_tokens": bool(tokenizer.split_special_tokens),
    }


def _input_settings(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Return the settings of a pooling model's inputs under transformers' names: the side on which a long input is cut,
    and the names of the tokenizer's outputs.

    A setting is returned only if a gateway encodes inputs otherwise without it, so that the bundles of most models keep
    their digests: a side other than `right`, and output names without token types for a model that has token types.
    """
    settings: dict[str, Any] = {}
    if tokenizer.truncation_side != "right":
        settings[TRUNCATION_SIDE] = tokenizer.truncation_side
    token_types = _merged_config(folder).get("type_vocab_size")
    if isinstance(token_types, int) and token_types > 1 and "token_type_ids" not in tokenizer.model_input_names:
        settings[INPUT_NAMES] = list(tokenizer.model_input_names)
    return settings


def _model_config(folder: Path) -> dict[str, Any]:
    """Return the fields of config.json that concern tokens."""
    merged = _merged_config(folder)
    return {name: merged[name] for name in CONFIG_FIELDS if merged.get(name) is not None}


def _merged_config(folder: Path) -> dict[str, Any]:
    """Return the fields of config.json. In a multimodal model, fields that concern tokens may be in its
    `text_config`; they are merged in."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    return {**(text if isinstance(text, dict) else {}), **config}


def _templates(tokenizer: Any) -> Mapping[str, str]:
    """Return the source of each chat template, by name. If there is only one, its name is `default`."""
    template = tokenizer.chat_template
    if template is None:
        return {}
    templates = dict(template) if isinstance(template, dict) else {"default": template}
    for name, source in templates.items():
        if not isinstance(source, str):
            raise ValueError(
                f"chat_template {name!r} must be a text, got {source!r:.80}: correct tokenizer_config.json"
            )
        if fault := _syntax_fault(source):
            raise ValueError(
                f"the chat template {name!r} (chat_template.jinja, or in tokenizer_config.json) {fault}; "
                "correct or copy it again"
            )
        if not TEMPLATE_NAME.fullmatch(name):
            raise ValueError(f"chat template name {name!r} must be letters, digits, '_' and '-' only: rename its file")
    return templates


def _syntax_fault(source: str) -> str:
    """Return the syntax error of a chat template; empty if it has none. transformers' own tags are known."""
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(source)
    except jinja2.TemplateSyntaxError as error:
        return f"cannot be read: line {error.lineno}: {error.message}"
    return ""


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode()
