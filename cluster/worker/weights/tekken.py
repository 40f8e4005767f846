"""Mistral's own tokenizer file, tekken.json, loaded as a tokenizer with a Rust backend.

The file is a table of byte strings by rank; the lowest ids are special tokens. transformers converts it to a byte pair
encoding with the same ids. The conversion omits two things, which are added here: the BOS token before a text, and the
rule that a text never contains special tokens. So `<s>` in a prompt is three characters, as in mistral-common.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

TEKKEN_FILE: Final = "tekken.json"
_ROLES: Final = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def load_tekken(folder: Path) -> Any:
    """Return the tokenizer in a folder's tekken.json. Raises ValueError, which names the file."""
    from tokenizers import processors
    from transformers import TokenizersBackend
    from transformers.integrations.mistral.tokenizer import MistralConverter

    file = folder / TEKKEN_FILE
    try:
        backend = MistralConverter(str(file)).converted()
    except Exception as error:  # KeyError, binascii.Error and others, for any damage
        raise ValueError(
            f"{file} cannot be read ({type(error).__name__}: {error}): copy it again from the model's own folder"
        ) from error
    roles = {role: token for role, token in _ROLES.items() if backend.token_to_id(token) is not None}
    if bos := roles.get("bos_token"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    backend.encode_special_tokens = True
    return TokenizersBackend(tokenizer_object=backend, split_special_tokens=True, add_bos_token=True, **roles)
