"""Change settings of models in a YAML text and keep everything else, including comments and layout. Does no I/O.

The YAML parser gives the position of each value, and the new value replaces the text at that position. The result is
parsed again, and rejected if anything but these settings has changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9._/-]*")


def set_keys(text: str, model: str, keys: Mapping[str, str]) -> str:
    """Return the text with `keys` set in the entry of one model.

    Raises ValueError if the text is not YAML. Raises ValueError if the change would affect other parts of the file,
    which may happen with YAML aliases and merge keys.
    """
    try:
        before = yaml.safe_load(text)
        for key, value in keys.items():
            text = _set_key(text, model, key, value)
        after = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from None
    if after != _expected(before, model, keys):
        raise ValueError(f"models[{model}] cannot be changed without touching other parts of the file: edit it by hand")
    return text


def _expected(data: Any, model: str, keys: Mapping[str, str]) -> Any:
    """Return what the edited file must contain when it is parsed: the content `data` of the old file, with `keys` set
    in the entry of one model."""
    return {
        **data,
        "models": [
            {**entry, **keys} if isinstance(entry, dict) and entry.get("name") == model else entry
            for entry in data["models"]
        ],
    }


def _set_key(text: str, model: str, key: str, value: str) -> str:
    """Replace a key's value in the text, or insert the key.

    A new key is inserted after the key `source`. If the entry has no `source`, the new key is inserted after the last
    key.
    """
    entry = _model_node(text, model)
    pairs = {pair[0].value: pair for pair in entry.value if isinstance(pair[0], yaml.ScalarNode)}
    scalar = _scalar(value)
    if key in pairs:
        node = pairs[key][1]
        if not isinstance(node, yaml.ScalarNode):
            raise ValueError(f"models[{model}].{key} must be a plain value, not a list or a mapping")
        return text[: node.start_mark.index] + scalar + text[node.end_mark.index :]
    last = pairs["source"] if "source" in pairs else entry.value[-1]
    end = last[1].end_mark.index
    if entry.flow_style:
        return f"{text[:end]}, {key}: {scalar}{text[end:]}"
    line_end = text.find("\n", end)
    line_end = len(text) if line_end < 0 else line_end
    indent = " " * last[0].start_mark.column
    return f"{text[:line_end]}\n{indent}{key}: {scalar}{text[line_end:]}"


def _model_node(text: str, model: str) -> yaml.MappingNode:
    """Find the entry of a model in the text. Raises ValueError if the text has no such entry."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    models = next(
        (value for key, value in (root.value if isinstance(root, yaml.MappingNode) else ()) if key.value == "models"),
        None,
    )
    for entry in models.value if isinstance(models, yaml.SequenceNode) else ():
        if isinstance(entry, yaml.MappingNode):
            for key, value in entry.value:
                if key.value == "name" and value.value == model:
                    return entry
    raise ValueError(f"models: there is no entry {model!r}")


def _scalar(value: str) -> str:
    return (
        value if _PLAIN.fullmatch(value) and yaml.safe_load(value) == value else json.dumps(value, ensure_ascii=False)
    )
