"""Generator of wrong configuration files. Each is a good file with one typical human mistake. Equal seeds give equal
files."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Mutant:
    """Text of a file with one mistake, and a description of the mistake."""

    text: str
    mistake: str


def mutant(good: str, rng: random.Random) -> Mutant:
    """Return a copy of a valid configuration file with one mistake in it, and a description of the mistake."""
    while True:
        data = yaml.safe_load(good)
        mistake = rng.choice(MISTAKES)
        description = mistake(data, rng)
        if description.startswith("text:"):
            return Mutant(_twice(good, data, rng), "a key twice")
        if description:
            return Mutant(yaml.safe_dump(data, sort_keys=False), description)


def places(data: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the path and the value of every item in a document, at all depths. The document itself is not yielded."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key), value
        yield from places(value, (*path, key))


def _parent(data: Any, path: Path) -> Any:
    for key in path[:-1]:
        data = data[key]
    return data


def _pick(data: Any, rng: random.Random, wanted: Callable[[Path, Any], bool]) -> Path | None:
    paths = [path for path, value in places(data) if wanted(path, value)]
    return rng.choice(paths) if paths else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def misspell(data: Any, rng: random.Random) -> str:
    """Drop, double or swap a letter of a key."""
    path = _pick(data, rng, lambda p, v: isinstance(p[-1], str) and len(p[-1]) > 3 and p[-1].islower())
    if path is None:
        return ""
    key = str(path[-1])
    at = rng.randrange(len(key) - 1)
    wrong = rng.choice([key[:at] + key[at + 1 :], key[:at] + key[at] + key[at:], key.replace("_", "-"), key + "s"])
    parent = _parent(data, path)
    if wrong in parent:
        return ""
    parent[wrong] = parent.pop(key)
    return f"{path}: spelt {wrong}"


def unit(data: Any, rng: random.Random) -> str:
    """Add a unit to a number."""
    path = _pick(data, rng, lambda p, v: _is_number(v))
    if path is None:
        return ""
    parent = _parent(data, path)
    parent[path[-1]] = f"{parent[path[-1]]}{rng.choice(['s', 'Mi', 'k', ' seconds', 'GB', '%'])}"
    return f"{path}: {parent[path[-1]]!r}"


def out_of_range(data: Any, rng: random.Random) -> str:
    """Put a number out of range."""
    path = _pick(data, rng, lambda p, v: _is_number(v))
    if path is None:
        return ""
    parent = _parent(data, path)
    parent[path[-1]] = rng.choice([-1, 0, 0.5, 3, 92, 1000, 10**12, float("nan"), float("inf")])
    return f"{path}: {parent[path[-1]]!r}"


def another_type(data: Any, rng: random.Random) -> str:
    """Replace a value at a random place by a value that usually has another type."""
    path = _pick(data, rng, lambda p, v: True)
    if path is None:
        return ""
    parent = _parent(data, path)
    parent[path[-1]] = rng.choice([[], {}, "text", 7, True, [1], {"a": 1}, None, ["x", "y"]])
    return f"{path}: {parent[path[-1]]!r}"


def lose(data: Any, rng: random.Random) -> str:
    """Remove a key."""
    path = _pick(data, rng, lambda p, v: isinstance(p[-1], str))
    if path is None:
        return ""
    del _parent(data, path)[path[-1]]
    return f"{path}: lost"


def _config(data: Any) -> Any:
    return data.setdefault("config", {}) if "api_version" not in data else data


def _model(data: Any, rng: random.Random) -> Any:
    models = _config(data).get("models")
    return rng.choice(models) if models else None


def model_twice(data: Any, rng: random.Random) -> str:
    """Give two entries the same name."""
    entry = _model(data, rng)
    if entry is None:
        return ""
    _config(data)["models"].append(copy.deepcopy(entry))
    return f"{entry['name']} twice"


def alias_clash(data: Any, rng: random.Random) -> str:
    """Add a second model with the alias or name of the first."""
    entry = _model(data, rng)
    if entry is None:
        return ""
    name = rng.choice([entry["name"], *entry.get("aliases", [])])
    _config(data)["models"].append({**copy.deepcopy(entry), "name": "another", "aliases": [name]})
    return f"alias {name} twice"


WRONG_KEYS: tuple[dict[str, Any], ...] = (
    {"replicas": {"min": 4, "max": 2}},
    {"replicas": {"min": 900, "max": 900}},
    {"fallback": ["nobody"]},
    {"tensor_parallel_size": 3},
    {"tensor_parallel_size": 64},
    {"pipeline_parallel_size": 64},
    {"gpu": "H999"},
    {"source": "huggingface://o/m"},
    {"source": "meta-llama/Llama-3.1-8B"},
    {"source": "hf://o"},
    {"source": "demo://other"},
    {"aliases": ["My Model!"]},
    {"dtype": "int3"},
    {"load_format": "pt"},
    {"trust_remote_code": True},
    {"canary": {"version": "v1"}},
    {"canary": {"version": "v2", "source": "nope://x"}},
    {"ray": "elsewhere"},
    {"version": "Ä"},
    {"digest": "sha256:1"},
    {"engine": {"gpu_memory_utilization": 92}},
    {"engine": {"gpu_memory_utilization": "90%"}},
    {"engine": {"gpu_memory_utilisation": 0.9}},
    {"engine": {"max-num-seqs": 8}},
    {"engine": {"max_num_seqs": 0}},
    {"engine": {"max_num_seqs": "8k"}},
    {"engine": {"kv_cache_dtype": "fp7"}},
    {"engine": {"block_size": -1}},
    {"engine": {"enforce_eager": "maybe"}},
    {"engine": {"stream_interval": 0}},
    {"engine": {"max_logprobs": "many"}},
    {"engine": {"swap_space": 4}},
    {"engine": {"compilation_config": {"cudagraph_mod": "FULL"}}},
    {"engine": {"structured_outputs_config": {"backend": "xgramar"}}},
    {"engine": {"tensor_parallel_size": 2}},
    {"engine": {"port": 8000}},
    {"engine": {"worker_cls": "os.system"}},
    {"engine": {"scheduler_cls": "a.B"}},
    {"engine": {"logits_processors": ["a:B"]}},
)


def wrong_model(data: Any, rng: random.Random) -> str:
    """Set a model's key to an invalid value."""
    entry = _model(data, rng)
    if entry is None:
        return ""
    keys = copy.deepcopy(rng.choice(WRONG_KEYS))
    entry |= keys
    return f"models[{entry['name']}]: {keys}"


WRONG_SETTINGS: tuple[dict[str, Any], ...] = (
    {"gateway": {"listen": {"http": "0.0.0.0:50051"}}},
    {"gateway": {"listen": {"http": "0.0.0.0:99999"}}},
    {"gateway": {"listen": {"http": "0.0.0.300:8000"}}},
    {"gateway": {"listen": {"grpc": "nowhere"}}},
    {"gateway": {"listen": {"metrics": "0.0.0.0:50052"}}},
    {"gateway": {"link_tls": None, "listen": {"link": "0.0.0.0:50052"}}},
    {"gateway": {"processes": 60_000}},
    {"gateway": {"processes": 64, "listen": {"link": "127.0.0.1:65500"}}},
    {"link": {"gateways": ["srv://link.x"]}},
    {"link": {"gateways": ["gateway:99999"]}},
    {"store": {"database_url": "mysql://u@h/d"}},
    {"store": {"database_url": "postgresql+psycopg://u:secret@h/d"}},
    {"store": {"database_url": "postgresql+psycopg://u@h:port/d"}},
    {"store": {"limits_url": "redis://h:port/0"}},
    {"store": {"limits_url": "http://h"}},
    {"auth": {"api_keys": {"pepper_file": "/vault/pepper"}}},
    {"auth": {"oidc": [{"issuer": "http://sso.example.com", "audience": "a", "tenant_claim": "t"}]}},
    {"auth": {"client_certificates": [{"san": "a.example.com", "tenant": "acme"}]}},
    {"tenants": [{"name": "a"}, {"name": "a"}]},
    {"tenants": [{"name": "a", "class": "gold"}]},
    {"tenants": [{"name": "a", "limits": {"daily_tokens": 0}}]},
    {"tenants": [{"name": "a", "guards": [{"builtin": "patterns", "patterns": {"x": "("}}]}]},
    {"classes": [{"name": "standard", "rank": 0}, {"name": "batch", "rank": 0}]},
    {"scaling": {"gpu_budget": {"H100": -1}}},
    {"scaling": {"forecast": False}},
    {"ray": [{"name": "blue", "dashboard_url": "tcp://x"}]},
    {"weights": {"allow": {"sources": ["/nothing/*"]}}},
    {"weights": {"hugging_face": {"token_file": "/secrets/hf_token"}}},
    {"observe": {"log_level": "loud"}},
    {"api_version": "headrace/v0"},
    {"name": "Not A Name"},
)


def wrong_setting(data: Any, rng: random.Random) -> str:
    """Set a setting to an invalid value."""
    keys = copy.deepcopy(rng.choice(WRONG_SETTINGS))
    _merge_into(_config(data), keys)
    return str(keys)


WRONG_VALUES: tuple[dict[str, Any], ...] = (
    {"fullnameOverride": "team-a"},
    {"postgresql": {"embedded": {"enabled": True}}, "config": {"store": {"database_url": "postgresql://u@pg.x/d"}}},
    {"gateway": {"replicas": "two"}},
    {"gateway": {"podDisruptionBudget": {"minAvailable": 1, "maxUnavailable": 1}}},
    {"ray": {"clusters": []}, "config": {"ray": []}},
    {"config": {"link": {"tls": None}}},
    {"config": {"gateway": {"listen": {"http": "127.0.0.1:8000"}}}},
)


def wrong_values(data: Any, rng: random.Random) -> str:
    """Set chart values that contradict each other."""
    if "api_version" in data:
        return ""
    keys = copy.deepcopy(rng.choice(WRONG_VALUES))
    _merge_into(data, keys)
    return str(keys)


def key_twice(data: Any, rng: random.Random) -> str:
    """Write a key twice in the text."""
    return "text:" if "api_version" in data else ""


def _twice(good: str, data: Any, rng: random.Random) -> str:
    key = rng.choice(sorted(data))
    return good.rstrip() + "\n" + yaml.safe_dump({key: data[key]}, sort_keys=False)


def _merge_into(under: Any, over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            _merge_into(under[key], value)
        else:
            under[key] = value


MISTAKES: tuple[Callable[[Any, random.Random], str], ...] = (
    misspell,
    unit,
    out_of_range,
    another_type,
    lose,
    model_twice,
    alias_clash,
    wrong_model,
    wrong_model,
    wrong_model,
    wrong_setting,
    wrong_setting,
    wrong_values,
    key_twice,
)
