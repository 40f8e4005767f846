"""`headrace plan` shows what fits, and `headrace config check` refuses what cannot fit, with by how much."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from cluster.cli.config_check import check
from cluster.policy.capacity.gpus import GIB
from tests.support.checkpoints import build_checkpoint

Run = Callable[..., Result]
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
TOO_LARGE = [
    (f"hf://o/{name}", gpu, more)
    for name, gpus in {
        "Llama-3.1-70B-Instruct": ("T4", "L4", "A10G", "L40S", "A100-40G", "A100", "H100", "H20"),
        "Llama-3.1-405B": ("A100", "H100", "H200", "B200", "MI300X"),
        "Qwen2.5-32B": ("T4", "L4", "A10G", "L40S", "A100-40G"),
        "Mixtral-8x7B-v0.1": ("L4", "L40S", "A100-40G", "H100"),
        "Mixtral-8x22B": ("A100", "H100", "H200", "B200"),
        "falcon-180B": ("A100", "H100", "H200"),
        "Llama-3.1-405B-FP8": ("A100", "H100", "H200"),
        "Llama-3.1-405B-AWQ": ("A100", "H100", "H200"),
    }.items()
    for gpu in gpus
    for more in (("", ", tensor_parallel_size: 2") if name == "Llama-3.1-405B" else ("",))
]
FITTING = [
    ("Llama-3.1-8B", "L4", ""),
    ("Llama-3.1-70B", "H100", ", tensor_parallel_size: 2"),
    ("Llama-3.1-70B", "H100", ", tensor_parallel_size: 4, pipeline_parallel_size: 2"),
    ("Llama-3.1-70B-AWQ", "L40S", ""),
    ("Llama-3.1-70B", "H100", ", engine: {quantization: fp8}"),
    ("Llama-3.1-70B", "H100", ", engine: {cpu_offload_gb: 80}"),
    ("gpt-oss-120b", "H100", ""),
    ("Qwen3-30B-A3B", "H100", ""),
    ("a-model-without-a-size", "T4", ""),
    ("Llama-3.1-70B", "an-unknown-type", ""),
]


def config(source: str, gpu: str, more: str = "") -> str:
    """Return a cluster.yaml with one model."""
    return f"api_version: headrace/v1\nname: c\nmodels: [{{name: m, source: {source}, gpu: {gpu}{more}}}]\n"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Return a folder with the config.json of Llama 3.1 8B, without weights."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path


@pytest.mark.parametrize(("source", "gpu", "more"), TOO_LARGE)
def test_what_cannot_fit_is_refused(source: str, gpu: str, more: str) -> None:
    """A model whose name announces more weights than its GPUs hold is refused by its GPU, with what it lacks."""
    (error,) = check(config(source, gpu, more), "f.yaml").errors
    assert error.path == "models[0].gpu"
    assert re.search(r"its weights take at least [\d.]+ GiB on .* with [\d.]+ GiB, [\d.]+ GiB too much: ", str(error))


@pytest.mark.parametrize(("name", "gpu", "more"), FITTING)
def test_what_may_fit_is_accepted(name: str, gpu: str, more: str) -> None:
    """A model that fits, or of which too little is known, is accepted."""
    assert not check(config(f"hf://o/{name}", gpu, more), "f.yaml").errors


def test_a_choice_of_gpus_is_refused_by_its_place() -> None:
    """An error names the GPU type that is too small, where the model may run on several."""
    choices = "[{type: H100, tensor_parallel_size: 4}, {type: L4, tensor_parallel_size: 4}]"
    (error,) = check(config("hf://o/Llama-3.1-70B", choices), "f.yaml").errors
    assert error.path == "models[0].gpu[1].type"
    assert "on each of 4 L4" in error.message
    assert error.message.endswith("of at least 8")


def test_a_checkpoint_here_is_calculated(run: Run, llama: Path) -> None:
    """The cache of one call counts too where the checkpoint is on this machine: with a shorter length, it fits."""
    build_checkpoint("llama", llama / "weights")
    (llama / "weights" / "config.json").write_text(json.dumps({**LLAMA_8B, "num_hidden_layers": 900}))
    (error,) = check(config(str(llama / "weights"), "L4"), "f.yaml").errors
    assert "one call of 131,072 tokens 450.0 GiB on one L4" in error.message
    assert "lower max_model_len" in error.message
    shorter = check(config(str(llama / "weights"), "L4", ", max_model_len: 1024"), "f.yaml").errors
    assert not shorter


def test_a_model_is_planned(run: Run, llama: Path) -> None:
    """The sizes are those of the checkpoint: 8.03 billion parameters and 128 KiB a token. Each division is listed."""
    done = run("plan", str(llama), "--gpu", "H100x4", "--context", "32768", "--concurrency", "40", "--json")
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["models"][0]["weights_bytes"] == 8_030_261_248 * 2
    assert shown["models"][0]["kv_bytes_per_token"] == 128 * 1024
    assert [plan["tensor_parallel_size"] for plan in shown["plans"]] == [1, 2, 4]
    for plan in shown["plans"]:
        assert plan["kv_cache_bytes"] == plan["gpu_bytes"] - plan["weights_bytes"] - plan["reserve_bytes"]
        assert plan["replicas"][0] * int(plan["calls"]) >= 40
    text = run("plan", str(llama), "--gpu", "H100x4", "--context", "32768", "--concurrency", "40").stdout
    assert "fewest GPUs for 40 calls at once" in text
    assert "tensor_parallel_size: 1" in text


def test_a_model_of_the_hub_is_planned_by_its_index(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config.json of a model on the hub and the index of its weights are enough."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "o/m is not in" in run("plan", "hf://o/m").stderr
    commit = "0" * 40
    snapshot = tmp_path / "hub" / "models--o--m" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "models--o--m" / "refs").mkdir()
    (tmp_path / "hub" / "models--o--m" / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text(json.dumps(LLAMA_8B))
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 16_060_522_496}}))
    shown = json.loads(run("plan", "hf://o/m", "--json").stdout)
    assert shown["models"][0]["weights_bytes"] == 16_060_522_496
    assert shown["models"][0]["weights_from"] == "model.safetensors.index.json"


def test_what_does_not_fit_says_by_how_much(run: Run, llama: Path) -> None:
    """If no division fits, the exit code is 1 and the table names what is lacking."""
    done = run("plan", str(llama), "--gpu", "T4x1")
    assert done.exit_code == 1
    assert "does not fit: lacks" in done.stdout


def test_a_file_is_planned(run: Run, llama: Path, tmp_path: Path) -> None:
    """Each model of a file is planned on its own GPUs, and the GPUs are added up."""
    file = tmp_path / "cluster.yaml"
    text = config(str(llama), "H100", ", max_model_len: 8192, replicas: {min: 2, max: 5}")
    file.write_text(text.replace("max_model_len", "tensor_parallel_size: 2, max_model_len"))
    done = run("plan", str(file))
    assert done.exit_code == 0, done.output
    assert "at replicas.min, on the preferred types: 4 H100" in done.stdout
    (plan,) = json.loads(run("plan", str(file), "--json").stdout)["plans"]
    assert plan["gpus"] == [4, 10]
    assert plan["gpu_bytes"] == pytest.approx(79.1 * 0.92 * GIB, rel=1e-6)


def test_alternatives_are_planned_but_not_added_up(run: Run, llama: Path, tmp_path: Path) -> None:
    """Each GPU type is planned with its own engine arguments. Only the preferred type of the stable version counts."""
    choices = "[{type: H100}, {type: L4, tensor_parallel_size: 4, engine: {kv_cache_dtype: fp8}}]"
    file = tmp_path / "cluster.yaml"
    file.write_text(config(str(llama), choices, f", canary: {{version: v2, source: {llama}, weight: 0.1}}"))
    done = run("plan", str(file))
    assert "on the preferred types: 1 H100\n" in done.stdout
    plans = json.loads(run("plan", str(file), "--json").stdout)["plans"]
    assert [(plan["model"], plan["gpu"]) for plan in plans] == [
        ("m", "H100"), ("m", "L4"), ("m v2", "H100"), ("m v2", "L4"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [{"num_attention_heads": 0}, {"hidden_size": []}, {"num_hidden_layers": "many"}, {"layer_types": 7}],
)
def test_a_damaged_config_json_is_refused(run: Run, llama: Path, wrong: dict[str, object]) -> None:
    """A config.json with a value that no model has is refused with exit code 2 and its path."""
    (llama / "config.json").write_text(json.dumps({**LLAMA_8B, **wrong}))
    done = run("plan", str(llama))
    assert done.exit_code == 2
    assert str(llama) in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no/model",), "for a model on the hub write hf://no/model"),
        (("{llama}", "--gpu", "H1000"), "--gpu H1000: unknown; take T4, "),
        (("s3://bucket/model",), "only a folder, a config.json, hf://org/name or a demo model"),
        (("{llama}/none.yaml",), "there is no folder or file"),
    ],
)
def test_wrong_arguments(run: Run, llama: Path, arguments: tuple[str, ...], words: str) -> None:
    """A wrong argument is refused with exit code 2 and its remedy."""
    done = run("plan", *(argument.format(llama=llama) for argument in arguments))
    assert done.exit_code == 2
    assert words in done.stderr
