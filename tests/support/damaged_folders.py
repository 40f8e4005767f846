"""Damaged model folders: each case damages the folder of a small whole Llama model, and has a text that the error must
contain, which is the name of the damaged file or field."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS, CONFIG, GENERATION = "model.safetensors", "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
INDEX = "model.safetensors.index.json"
JSON_FILES = (CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG)
Damage = Callable[[Path], object]


@dataclass(frozen=True, slots=True)
class Case:
    """A damaged folder. `named`: the text that the error must contain."""

    id: str
    damage: Damage
    named: str


def _write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def _changed(name: str, *path: str, value: Any) -> Damage:
    """Set a field of a JSON file. `path`: the names of the nested fields; a value of `...` removes the field."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        inner = content
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        if value is ...:
            inner.pop(path[-1], None)
        else:
            inner[path[-1]] = value
        (folder / name).write_text(json.dumps(content))

    return damage


def _replaced(name: str, make: Callable[[Path], object]) -> Damage:
    """Replace a file by what `make` makes at its path."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def _listening(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{here}/{path.name}")  # the path itself may be too long for a socket
    finally:
        os.close(here)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "named pipe": os.mkfifo,
    "socket": _listening,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
}

HUGE = 10**12
_COUNTS = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_hidden_layers",
    "vocab_size",
    "intermediate_size",
    "max_position_embeddings",
)
_FIELDS: tuple[tuple[str, Any], ...] = (
    *((name, value) for name in _COUNTS for value in (0, -1, HUGE, "128", 2.5, [4], True)),
    ("num_attention_heads", 3),
    ("num_key_value_heads", 3),
    ("num_key_value_heads", 8),
    ("rms_norm_eps", "small"),
    ("rms_norm_eps", -1.0),
    ("hidden_act", 7),
    ("dtype", "float99"),
    ("dtype", 32),
    ("architectures", ...),
    ("architectures", []),
    ("architectures", "LlamaForCausalLM"),
    ("architectures", [5]),
    ("model_type", 5),
    ("quantization_config", "fp8"),
    ("quantization_config", {}),
    ("eos_token_id", 768),
    ("eos_token_id", -5),
    ("eos_token_id", [764, 10**9]),
    ("eos_token_id", "764"),
    ("eos_token_id", {"id": 764}),
    ("bos_token_id", "760"),
    ("auto_map", {"AutoModelForCausalLM": "modeling.Own"}),
    ("tie_word_embeddings", "no"),
    ("attention_bias", "no"),
    ("mlp_bias", 3),
)
_ROPE: tuple[Any, ...] = (
    "default",
    [],
    {"rope_type": "default", "rope_theta": "large"},
    {"rope_type": "default", "rope_theta": -1.0},
    {"rope_type": "default", "rope_theta": 0},
    {"rope_type": "linear", "rope_theta": 10000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": "two"},
    {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0},
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": -4.0},
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": None},
)
_GENERATION: tuple[tuple[str, Any], ...] = (
    ("temperature", -1.0),
    ("temperature", "warm"),
    ("temperature", [0.6]),
    ("temperature", 1e30),
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_p", "most"),
    ("top_k", -7),
    ("top_k", 2.5),
    ("top_k", "few"),
    ("min_p", -0.1),
    ("min_p", 2),
    ("repetition_penalty", 0),
    ("repetition_penalty", -2.0),
    ("repetition_penalty", "strong"),
    ("presence_penalty", 9.0),
    ("frequency_penalty", "none"),
    ("eos_token_id", [761, 768]),
    ("eos_token_id", -1),
    ("eos_token_id", "761"),
    ("eos_token_id", [None]),
    ("max_new_tokens", -5),
    ("max_new_tokens", "many"),
)
_TEMPLATES = (
    "{% for m in messages %}{{ m.content }}",
    "{{ messages[0].content",
    "{% no_such_tag %}",
    "{{ 'a' | b c }}",
)
_DEEP = b"[" * 200_000 + b"]" * 200_000
_JSON: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{'a': 1}",
    "a list": b"[]",
    "cut": b'{"a": {"b": 1',
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "deep": b'{"a": ' + _DEEP + b"}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    "web page": b"<!DOCTYPE html><html><body>404</body></html>",
}


def _header(content: object, data: bytes = b"") -> Damage:
    head = content if isinstance(content, bytes) else json.dumps(content).encode()
    return _write(WEIGHTS, struct.pack("<Q", len(head)) + head + data)


def _tensor(**changes: Any) -> dict[str, Any]:
    return {"model.norm.weight": {"dtype": "F32", "shape": [128], "data_offsets": [0, 512]} | changes}


def _cut(keep: Callable[[int], int]) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[: keep(len(data))])

    return damage


def _tensors(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)

    return damage


def _wider(name: str, rows: int) -> Damage:
    def change(tensors: dict[str, Any]) -> None:
        import torch

        tensors[name] = torch.zeros(rows, *tensors[name].shape[1:])

    return _tensors(change)


def _filled(name: str, number: float) -> Damage:
    return _tensors(lambda tensors: tensors[name].view(-1)[0:1].fill_(number))


def _indexed(content: object) -> Damage:
    return _write(INDEX, content if isinstance(content, bytes) else json.dumps(content).encode())


_KEY = "model.layers.1.self_attn.k_proj.weight"
_WEIGHTS: dict[str, tuple[Damage, str]] = {
    "empty": (_write(WEIGHTS, b""), WEIGHTS),
    "seven bytes": (_write(WEIGHTS, b"\0" * 7), WEIGHTS),
    "zeros": (_write(WEIGHTS, bytes(4096)), WEIGHTS),
    "huge header": (_write(WEIGHTS, struct.pack("<Q", 1 << 62) + b"{}"), WEIGHTS),
    "header beyond the file": (_write(WEIGHTS, struct.pack("<Q", 9999) + b"{}"), WEIGHTS),
    "header is a list": (_header([]), WEIGHTS),
    "header is no JSON": (_header(b"{a}"), WEIGHTS),
    "header is deep": (_header(b'{"a":' + _DEEP + b"}"), WEIGHTS),
    "offsets overlap": (_header(_tensor() | {"b": _tensor()["model.norm.weight"]}, bytes(512)), WEIGHTS),
    "offsets beyond the file": (_header(_tensor(data_offsets=[0, 1 << 40])), WEIGHTS),
    "offsets backwards": (_header(_tensor(data_offsets=[512, 0]), bytes(512)), WEIGHTS),
    "negative shape": (_header(_tensor(shape=[-128]), bytes(512)), WEIGHTS),
    "unknown dtype": (_header(_tensor(dtype="F31"), bytes(512)), WEIGHTS),
    "no tensors": (_header({}), WEIGHTS),
    "cut by a byte": (_cut(lambda size: size - 1), WEIGHTS),
    "half": (_cut(lambda size: size // 2), WEIGHTS),
    "pointer": (_write(WEIGHTS, _JSON["pointer"]), WEIGHTS),
    "web page": (_write(WEIGHTS, _JSON["web page"]), WEIGHTS),
    "without a tensor": (_tensors(lambda tensors: tensors.pop(_KEY)), _KEY),
    "without the norm": (_tensors(lambda tensors: tensors.pop("model.norm.weight")), "model.norm.weight"),
    "without the embeddings": (
        _tensors(lambda tensors: tensors.pop("model.embed_tokens.weight")),
        "model.embed_tokens.weight",
    ),
    "without the output": (_tensors(lambda tensors: tensors.pop("lm_head.weight")), "lm_head.weight"),
    "tensor of another shape": (_wider(_KEY, 65), _KEY),
    "embeddings of another size": (_wider("model.embed_tokens.weight", 700), "model.embed_tokens.weight"),
    "a scalar": (_tensors(lambda tensors: tensors.update({_KEY: tensors[_KEY].sum()})), _KEY),
    "NaN": (_filled("model.norm.weight", float("nan")), "model.norm.weight"),
    "infinite": (_filled("lm_head.weight", float("inf")), "lm_head.weight"),
    "pickled": (_replaced(WEIGHTS, lambda path: (path.parent / "pytorch_model.bin").write_bytes(b"\x80\x02.")), "safe"),
    "index empty": (_indexed(b""), INDEX),
    "index without a map": (_indexed({}), INDEX),
    "index deep": (_indexed(_DEEP), INDEX),
    "index names a lacking file": (_indexed({"weight_map": {"a": "b.safetensors"}}), "b.safetensors"),
    "index names a file outside": (_indexed({"weight_map": {"a": "../b.safetensors"}}), INDEX),
    "index names a lacking tensor": (_indexed({"weight_map": {"a": WEIGHTS}}), INDEX),
    "index with numbers": (_indexed({"weight_map": {"a": 1}}), INDEX),
    "one of two shards": (
        lambda folder: (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors"),
        "model-00002-of-00002.safetensors",
    ),
}
_TOKENIZER_FIELDS: dict[str, tuple[Damage, str]] = {
    "lacking": (_replaced(TOKENIZER, lambda path: None), "tokenizer"),
    "without a model": (_changed(TOKENIZER, "model", value=...), TOKENIZER),
    "unknown model": (_changed(TOKENIZER, "model", "type", value="Nothing"), TOKENIZER),
    "no vocabulary": (_changed(TOKENIZER, "model", "vocab", value={}), "token"),
    "id beyond the vocabulary": (_changed(TOKENIZER, "model", "vocab", "beyond", value=5000), "vocab_size"),
    "negative id": (_changed(TOKENIZER, "model", "vocab", "below", value=-1), TOKENIZER),
    "merges of unknown tokens": (_changed(TOKENIZER, "model", "merges", value=[["zz", "qq"]]), TOKENIZER),
    "template is a number": (
        _replaced(TEMPLATE, lambda path: _changed(TOKENIZER_CONFIG, "chat_template", value=5)(path.parent)),
        "chat_template",
    ),
    "class is a number": (_changed(TOKENIZER_CONFIG, "tokenizer_class", value=5), "tokenizer"),
    "token is a number": (_changed(TOKENIZER_CONFIG, "eos_token", value=5), "token"),
}


def engine_cases() -> list[Case]:
    """Return the cases that only the engine can find, since it knows more architectures than any check here."""
    fields = {
        "hidden_act": ("no_such_activation", "ctivation"),
        "architectures": (["NoSuchModelForCausalLM"], "NoSuchModelForCausalLM"),
        "model_type": ("no_such_model", "no_such_model"),
        "rope_parameters": ({"rope_type": "no_such_rope", "rope_theta": 10000.0}, "no_such_rope"),
        "quantization_config": ({"quant_method": "no_such_method"}, "no_such_method"),
    }
    renamed = _tensors(lambda tensors: [tensors.update({f"x.{name}": tensors.pop(name)}) for name in list(tensors)])
    return [Case(name, _changed(CONFIG, name, value=value), named) for name, (value, named) in fields.items()] + [
        Case("tensors of other names", renamed, "'x'")
    ]


def cases() -> list[Case]:
    """Return the cases that are found before an engine starts."""
    made = [
        Case(f"{name} is a {kind}", _replaced(name, make), name)
        for name in (CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, WEIGHTS, INDEX, "README.md")
        for kind, make in SPECIAL.items()
    ]
    made += [
        Case(f"{name} is {kind}", _write(name, content), name) for name in JSON_FILES for kind, content in _JSON.items()
    ]
    made += [
        Case(f"{CONFIG} is absent", _replaced(CONFIG, lambda path: None), CONFIG),
        Case(f"{CONFIG} hidden_size=130", _changed(CONFIG, "hidden_size", value=130), f"{CONFIG}: "),
    ]
    made += [
        Case(f"{CONFIG} {field}={value!r}"[:80], _changed(CONFIG, field, value=value), field)
        for field, value in _FIELDS
    ]
    made += [
        Case(f"{CONFIG} rope_parameters={value!r}"[:80], _changed(CONFIG, "rope_parameters", value=value), "rope")
        for value in _ROPE
    ]
    made += [
        Case(f"{GENERATION} {field}={value!r}"[:80], _changed(GENERATION, field, value=value), field)
        for field, value in _GENERATION
    ]
    made += [
        Case(f"template {at}", _write(TEMPLATE, source.encode()), TEMPLATE) for at, source in enumerate(_TEMPLATES)
    ]
    made += [Case("template is no UTF-8", _write(TEMPLATE, b"\xff\xfe{{ a }}"), TEMPLATE)]
    made += [Case(f"weights: {kind}", damage, named) for kind, (damage, named) in _WEIGHTS.items()]
    made += [Case(f"tokenizer: {kind}", damage, named) for kind, (damage, named) in _TOKENIZER_FIELDS.items()]
    return made
