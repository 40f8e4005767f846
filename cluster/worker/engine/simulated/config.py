"""Configuration of a simulated engine: a URL, completed from the files of a model folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from cluster.api.pooling import MAX_DIMENSIONS
from cluster.config.engine import PARSER_KEYS
from cluster.wire.bundle import sampling_defaults
from cluster.worker.engine.simulated.faults import SimFault

SCHEME = "sim://"


@dataclass(frozen=True, slots=True)
class SimConfig:
    """Speed, capacity and tokens of a simulated engine. The fields' names are the parameters of the URL.

    `folder` has the tokenizer and the configuration; "" for none. If `vocab`, `token_hi` or `max_model_len` is 0, or
    `eos` is -1, `resolved` takes the value from the folder. Output tokens are drawn from [token_lo, token_hi). If
    `salted` is 1, the cache salt changes the tokens, so that a test detects a lost salt. If `salted` is 0, the cache
    salt does not change the tokens, as in a real engine. `max_loras`, `max_cpu_loras`: maximum numbers of adapters in a
    step and in memory; 0 for an engine without adapters. `adapter_load_ms`: time to load an adapter, in milliseconds.

    If `embed_dimensions` is above 0, the engine is a pooling model that computes vectors of this length. If
    `any_dimensions` is 1, it also computes vectors of every shorter length. If `scores` is 1, it computes scores of
    pairs of texts. A pooling model generates no tokens.
    """

    folder: str = ""
    decode_ms: float = 20.0
    prefill_tokens_per_s: float = 20_000.0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    kv_blocks: int = 4096
    block_size: int = 16
    max_model_len: int = 0
    vocab: int = 0
    token_lo: int = 0
    token_hi: int = 0
    eos: int = -1
    eos_ratio: float = 0.0
    seed: int = 0
    load_s: float = 0.0
    salted: int = 1
    embed_dimensions: int = 0
    any_dimensions: int = 0
    scores: int = 0
    max_loras: int = 0
    max_cpu_loras: int = 0
    adapter_load_ms: float = 0.0
    faults: tuple[SimFault, ...] = ()
    default_sampling: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "kv_blocks", "block_size"):
            _check(getattr(self, name) >= 1, name, "must be 1 or more")
        for name in ("salted", "any_dimensions", "scores"):
            _check(getattr(self, name) in (0, 1), name, "must be 0 or 1")
        _check(0 <= self.embed_dimensions <= MAX_DIMENSIONS, "embed_dimensions", f"must be 0 to {MAX_DIMENSIONS}")
        for name in ("max_loras", "max_cpu_loras", "adapter_load_ms"):
            _check(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("decode_ms", "load_s", "max_model_len", "vocab", "token_lo", "token_hi"):
            _check(getattr(self, name) >= 0, name, "must not be negative")
        _check(self.prefill_tokens_per_s > 0, "prefill_tokens_per_s", "must be above 0")
        _check(0.0 <= self.eos_ratio <= 1.0, "eos_ratio", "must lie in [0, 1]")
        _check(
            self.max_num_seqs <= self.max_num_batched_tokens,
            "max_num_batched_tokens",
            f"must be at least max_num_seqs ({self.max_num_seqs}), so that every sequence gets a token in each step",
        )
        _check(
            self.max_model_len <= self.kv_blocks * self.block_size,
            "kv_blocks",
            f"x block_size must hold one sequence of max_model_len ({self.max_model_len}) tokens",
        )
        if self.vocab:
            _check(self.token_hi <= self.vocab, "token_hi", f"must not exceed the vocabulary ({self.vocab})")
            _check(self.eos < self.vocab, "eos", f"must lie in the vocabulary ({self.vocab})")
        if self.token_hi:
            _check(self.token_lo < self.token_hi, "token_lo", f"must be below token_hi ({self.token_hi})")

    @property
    def weight_digest(self) -> str:
        """Digest of the fields that determine the tokens, used in place of a digest of weights.

        Fields for speed are left out.
        """
        shapes = (
            self.folder,
            self.vocab,
            self.token_lo,
            self.token_hi,
            self.eos,
            self.eos_ratio,
            self.seed,
            self.salted,
            *((self.embed_dimensions, self.scores) if self.embed_dimensions or self.scores else ()),
        )
        return "sha256:" + hashlib.sha256(repr(shapes).encode()).hexdigest()

    @classmethod
    def from_source(cls, source: str, overrides: Mapping[str, object] | None = None) -> SimConfig:
        """Parse a URL such as `sim:///folder?decode_ms=20&fault=die@step:5`. Parameters in `overrides` take precedence.

        `fault` may be repeated. Overrides that name output parsers (PARSER_KEYS) are ignored. Raises ValueError, which
        names the wrong parameter.
        """
        if not source.startswith(SCHEME):
            raise ValueError(f"source {source!r}: the source of a simulated engine begins with {SCHEME}")
        url = urlsplit(source)
        if url.netloc:
            raise ValueError(f"source {source!r}: use three slashes before an absolute folder: sim:///{url.netloc}...")
        values: dict[str, Any] = {}
        faults: list[SimFault] = []
        given = [
            *parse_qsl(url.query, keep_blank_values=True),
            *((k, str(v)) for k, v in _adapter_defaults(overrides or {}).items() if k not in PARSER_KEYS),
        ]
        for name, text in given:
            if name == "fault":
                faults.append(SimFault.parse(text))
            else:
                values[name] = _parse(name, text)
        return cls(folder=unquote(url.path), faults=tuple(faults), **values)

    def resolved(self) -> SimConfig:
        """Return a copy with the missing values filled in from the folder's files.

        Raises ValueError if the files lack a value.
        """
        if not self.folder:
            return self._complete({}, {}, {})
        folder = Path(self.folder)
        if not folder.is_dir():
            raise ValueError(f"source sim://{self.folder}: no such folder; it must hold a tokenizer")
        return self._complete(*(_read(folder / f"{n}.json") for n in ("config", "generation_config", "tokenizer")))

    def _complete(self, model: dict[str, Any], generation: dict[str, Any], tokenizer: dict[str, Any]) -> SimConfig:
        ids = _token_ids(tokenizer)
        vocab = self.vocab or int(model.get("vocab_size") or (max(ids.values()) + 1 if ids else 0))
        if not vocab:
            raise ValueError(
                "source: vocab is not given, and there is no folder whose config.json or tokenizer.json has it"
            )
        length = self.max_model_len or min(
            int(model.get("max_position_embeddings") or 2048), self.kv_blocks * self.block_size
        )
        eos = self.eos if self.eos >= 0 else _first(generation.get("eos_token_id", model.get("eos_token_id")))
        if self.eos_ratio and eos < 0:
            raise ValueError("eos_ratio is set, but neither eos nor the folder defines which token EOS is")
        lo, hi = self.token_lo, self.token_hi
        if not hi:
            lo, hi = _ordinary_range(ids, tokenizer) if ids else (lo, vocab)
        return dataclasses.replace(
            self,
            vocab=vocab,
            max_model_len=length,
            eos=eos,
            token_lo=lo,
            token_hi=min(hi, vocab),
            default_sampling=dict(self.default_sampling) or sampling_defaults(generation),
        )


def _adapter_defaults(overrides: Mapping[str, object]) -> Mapping[str, object]:
    """Return the overrides with vLLM's settings of adapters converted to parameters of a simulated engine.

    `enable_lora` and `max_lora_rank` are left out. `max_loras` and `max_cpu_loras` are kept only if adapters are
    enabled.
    """
    kept = {name: value for name, value in overrides.items() if name not in ("enable_lora", "max_lora_rank")}
    if not overrides.get("enable_lora", "max_loras" in overrides):
        return {name: value for name, value in kept.items() if name not in ("max_loras", "max_cpu_loras")}
    slots = kept.get("max_loras", 1)
    return {**kept, "max_loras": slots, "max_cpu_loras": kept.get("max_cpu_loras", slots)}


def _check(holds: bool, name: str, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{name} {remedy}")


_TYPES = {f.name: f.type for f in dataclasses.fields(SimConfig) if f.type in ("int", "float")}


def _parse(name: str, text: str) -> int | float:
    kind = _TYPES.get(name)
    if kind is None:
        raise ValueError(
            f"source: {name!r} is no parameter of a simulated engine; there are {', '.join(_TYPES)}, fault"
        )
    try:
        value = int(text) if kind == "int" else float(text)
    except ValueError:
        word = "an integer" if kind == "int" else "a number"
        raise ValueError(f"source: {name}={text!r} is not {word}") from None
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"source: {name}={text!r} must be finite")
    return value


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    data = json.loads(path.read_text())
    if not isinstance(data, dict):
        raise ValueError(f"{path.name}: expected a JSON object")
    return data


def _first(value: object) -> int:
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, int) else -1


def _token_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    vocab = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocab, list):  # unigram: [piece, score] in order of id
        return {piece: i for i, (piece, _) in enumerate(vocab)}
    return dict(vocab)


def _ordinary_range(ids: dict[str, int], tokenizer: dict[str, Any]) -> tuple[int, int]:
    """Return the longest range of ids whose tokens are words or parts of words, as (first, last + 1).

    No id in the range is an added token, a byte or a single character.
    """
    added = {int(token["id"]) for token in tokenizer.get("added_tokens", ())}
    ordinary = sorted(
        i for piece, i in ids.items() if i not in added and len(piece) > 1 and not piece.startswith("<0x")
    )
    best, start = (0, max(ids.values()) + 1), 0
    longest = 0
    for at in range(1, len(ordinary) + 1):
        if at == len(ordinary) or ordinary[at] != ordinary[at - 1] + 1:
            if at - start > longest:
                longest, best = at - start, (ordinary[start], ordinary[at - 1] + 1)
            start = at
    return best
