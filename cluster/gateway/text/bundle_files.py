"""The parsed files of a tokenizer bundle: tokenizer, chat templates and settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final

from tokenizers import Tokenizer

from cluster.gateway.text.chat.control_tokens import ControlTokens
from cluster.gateway.text.tokenizer_json import read_tokenizer
from cluster.wire.bundle import ESCAPE_SEPARATOR, ESCAPED_TOKENS, RENDERER, TRUNCATION_SIDE, Bundle

_NO_TOKENS: Final = frozenset({ESCAPE_SEPARATOR, RENDERER, TRUNCATION_SIDE})
"""Keys of the bundle's tokenizer_config.json whose values are strings and not special tokens."""


class BundleFiles:
    """The tokenizer, the chat templates and the settings in a tokenizer bundle."""

    def __init__(self, bundle: Bundle) -> None:
        """Read the files. Raises ValueError, which names the file, if a file is missing or invalid."""
        self.config = _json(bundle, "tokenizer_config.json")
        """The contents of tokenizer_config.json."""
        self.tokenizer = _tokenizer(bundle, self.config)
        self._generation_config = _json(bundle, "generation_config.json")
        self._model_config = _json(bundle, "config.json")
        self.template_sources = _template_sources(bundle)
        """The sources of the chat templates by name."""
        self.salt = hashlib.sha256(bundle.files["tokenizer.json"]).digest() + bytes(
            [self.tokenizer.encode_special_tokens]
        )
        """Bytes that differ between tokenizers with different token ids."""

    @cached_property
    def layout(self) -> Mapping[str, Any]:
        """The contents of tokenizer.json without the vocabulary."""
        layout: dict[str, Any] = json.loads(_without_model(self.tokenizer))
        return layout

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The special tokens that chat templates may use, by name: those that all models may have, such as bos_token,
        and the model's own, such as image_token. They are the named tokens that transformers passes to a template."""
        return {name: value for name, value in self.config.items() if isinstance(value, str) and name not in _NO_TOKENS}

    @property
    def control_tokens(self) -> ControlTokens | None:
        """The control tokens that are escaped in the contents of messages; None if there are none."""
        tokens = self.config.get(ESCAPED_TOKENS)
        return ControlTokens(tokens, self.config[ESCAPE_SEPARATOR]) if tokens else None

    @property
    def cuts_left(self) -> bool:
        """Whether a long input of a pooling request is cut on the left. If not, it is cut on the right."""
        return self.config.get(TRUNCATION_SIDE) == "left"

    @property
    def renderer(self) -> str:
        """Name of vLLM's renderer with which workers make prompts of chats; "" if only the chat template makes them."""
        return str(self.config.get(RENDERER, ""))

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary according to the model's configuration. If the configuration does not state the size,
        it is the size of the tokenizer's vocabulary."""
        return int(self._model_config.get("vocab_size") or self.tokenizer.get_vocab_size())

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Token ids that end a generation: first the tokenizer's EOS, then the other ids in the generation config."""
        name = self.config.get("eos_token")
        own = self.tokenizer.token_to_id(str(name)) if name is not None else None
        listed = self._generation_config.get("eos_token_id")
        others = [listed] if isinstance(listed, int) else list(listed or ())
        return tuple(dict.fromkeys(number for number in (own, *others) if number is not None))

    @property
    def family(self) -> str:
        """The model_type in config.json, for example llama, mistral or falcon; "" if unknown."""
        return str(self._model_config.get("model_type", ""))


def _tokenizer(bundle: Bundle, config: Mapping[str, Any]) -> Tokenizer:
    try:
        tokenizer = read_tokenizer(bundle.files["tokenizer.json"])
    except KeyError:
        raise ValueError("bundle has no tokenizer.json: build it again from the model's folder") from None
    except Exception as e:  # the Rust side raises plain Exception
        raise ValueError(f"bundle's tokenizer.json cannot be read: {e}") from e
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
    tokenizer.no_truncation()  # transformers, too, ignores both settings of the file
    tokenizer.no_padding()
    return tokenizer


def _json(bundle: Bundle, name: str) -> dict[str, Any]:
    try:
        content = json.loads(bundle.files.get(name, b"{}"))
    except ValueError as e:
        raise ValueError(f"bundle's {name} is not JSON: {e}") from e
    if not isinstance(content, dict):
        raise ValueError(f"bundle's {name} must hold a JSON object")
    return content


def _template_sources(bundle: Bundle) -> dict[str, str]:
    """Return the sources of the chat templates by name. The file chat_template.jinja has the name `default`. A file
    chat_template.NAME.jinja has the name NAME."""
    sources = {}
    for name, content in bundle.files.items():
        if name == "chat_template.jinja":
            sources["default"] = content.decode()
        elif name.startswith("chat_template.") and name.endswith(".jinja"):
            sources[name.removeprefix("chat_template.").removesuffix(".jinja")] = content.decode()
    return sources


def _without_model(tokenizer: Tokenizer) -> str:
    """Return the tokenizer as JSON without the vocabulary, since serializing a large vocabulary takes a tenth of a
    second."""
    shell = Tokenizer.from_str('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    if tokenizer.normalizer is not None:
        shell.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        shell.pre_tokenizer = tokenizer.pre_tokenizer
    if tokenizer.decoder is not None:
        shell.decoder = tokenizer.decoder
    return str(shell.to_str())
