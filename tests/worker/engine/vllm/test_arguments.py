"""Conversion of a catalog entry to vLLM's arguments and environment variables."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.api.ports import EngineDead
from cluster.api.types import ModelSpec, without_seed_noise
from cluster.config.engine import PARSER_KEYS, TABLE
from cluster.worker.engine.vllm import arguments
from cluster.worker.engine.vllm.core_processes import CoreProcesses, with_remedy
from cluster.worker.engine.vllm.engine import VllmEngine
from tests.support.checkpoints import build_tokenizer
from tests.worker.engine.contract import request

pytestmark = pytest.mark.engine


def spec(**changes: object) -> ModelSpec:
    """Return a catalog entry with the given fields changed."""
    return ModelSpec("m", "unused", **changes)  # type: ignore[arg-type]


def test_an_entry_becomes_arguments(llama_folder: Path) -> None:
    """The fields of an entry and of its `engine` section become vLLM arguments, and override Headrace's defaults."""
    entry = spec(dtype="float32", max_model_len=99, engine={"max_num_seqs": 3, "enforce_eager": False})
    args = arguments.engine_arguments(entry, llama_folder, "ray")
    assert (args.model, args.dtype, args.max_model_len, args.max_num_seqs) == (
        str(llama_folder),
        "float32",
        99,
        3,
    )
    assert (args.scheduling_policy, args.disable_log_stats, args.load_format) == ("priority", False, "safetensors")
    assert args.enforce_eager is False
    assert args.kv_cache_memory_bytes == arguments.CPU_KV_CACHE_BYTES
    assert args.distributed_executor_backend is None


def test_grammars_have_one_backend(llama_folder: Path) -> None:
    """The backend for grammars is xgrammar unless the catalog entry names another backend. Other settings of
    `structured_outputs_config` are kept."""
    for section, backend in (
        ({}, "xgrammar"),
        ({"enable_in_reasoning": True}, "xgrammar"),
        ({"backend": "auto"}, "auto"),
    ):
        engine: dict[str, object] = {"structured_outputs_config": section} if section else {}
        config = arguments.engine_arguments(spec(engine=engine), llama_folder, "ray").structured_outputs_config
        assert config.backend == backend
        assert config.enable_in_reasoning == ("enable_in_reasoning" in section)
    with pytest.raises(ValueError, match=r"engine: structured_outputs_config: must be"):
        arguments.engine_arguments(spec(engine={"structured_outputs_config": "x"}), llama_folder, "ray")


def test_tekken_models_have_their_own_mode_and_backend(tmp_path: Path, llama_folder: Path) -> None:
    """A tokenizer mode that the model needs is passed to vLLM, unless the catalog entry sets another mode.

    For a folder with tekken.json in mode `mistral`, the default backend for grammars is guidance.
    """
    (tmp_path / "tekken.json").write_text("{}")
    for folder, engine, mode, backend in (
        (tmp_path, {}, "mistral", "guidance"),
        (tmp_path, {"tokenizer_mode": "hf"}, "hf", "xgrammar"),
        (tmp_path, {"structured_outputs_config": {"backend": "auto"}}, "mistral", "auto"),
        (llama_folder, {}, "mistral", "xgrammar"),
    ):
        args = arguments.engine_arguments(spec(engine=engine), folder, "ray", tokenizer_mode="mistral")
        assert (args.tokenizer_mode, args.structured_outputs_config.backend) == (mode, backend)
    assert arguments.engine_arguments(spec(), llama_folder, "ray").tokenizer_mode == "auto"


@pytest.mark.parametrize("executor", ["ray", "mp"])
def test_a_world_larger_than_one_takes_the_executor(llama_folder: Path, executor: str) -> None:
    """With tensor or pipeline parallelism, vLLM's executor backend is the one in `executor`."""
    for entry in (spec(tensor_parallel_size=2), spec(pipeline_parallel_size=2)):
        assert arguments.engine_arguments(entry, llama_folder, executor).distributed_executor_backend == executor


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ({"max_num_seq": 3}, r"engine\.max_num_seq: .* did you mean `engine\.max_num_seqs`"),
        ({"qqqqq": 3}, r"engine\.qqqqq: vLLM has no such engine argument$"),
    ],
)
async def test_an_unknown_argument_is_named(engine: dict[str, object], says: str, tmp_path: Path) -> None:
    """start() refuses an unknown argument before the model is loaded, and names the most similar known argument."""
    with pytest.raises(ValueError, match=says):
        await VllmEngine(spec(engine=engine), tmp_path).start()


def test_experts_on_several_ranks_are_refused_on_cpus(llama_folder: Path) -> None:
    """On CPUs, expert parallelism is refused on several ranks, since the kernels would crash. It is allowed on one
    rank."""
    parallel = {"enable_expert_parallel": True}
    for entry in (
        spec(tensor_parallel_size=2, engine=parallel),
        spec(engine=parallel | {"data_parallel_size": 2}),
    ):
        with pytest.raises(ValueError, match=r"models\[m\]\.engine\.enable_expert_parallel: .* leave it out"):
            arguments.engine_arguments(entry, llama_folder, "mp")
    arguments.engine_arguments(spec(engine=parallel), llama_folder, "mp")
    arguments.engine_arguments(spec(tensor_parallel_size=2), llama_folder, "mp")


async def test_values_that_vllm_refuses_name_the_model(llama_folder: Path) -> None:
    """A value that vLLM refuses raises a ValueError that names the catalog entry."""
    for changes in ({"max_model_len": 10**9}, {"engine": {"max_num_seqs": "many"}}, {"tensor_parallel_size": 3}):
        with pytest.raises(ValueError, match=r"models\[m\]"):
            await VllmEngine(spec(**changes), llama_folder, executor="mp").start()


def test_the_environment_is_made_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment variables for vLLM's child processes are set.

    VLLM_CPU_KVCACHE_SPACE is removed if it is empty, since the empty value would end these processes.
    """
    for name in ("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_CPU_OMP_THREADS_BIND", "SPT_NOENV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "")
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY", "FIRST_")
    arguments.prepare_environment(spec(tensor_parallel_size=2), "mp")
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert os.environ["VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"] == "FIRST_,HEADRACE_"
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ


def test_engine_class_is_one_word() -> None:
    """The engine class is one word, made of dtype, quantization and parallelism."""
    assert arguments.engine_class("float32", None, spec()) == "float32-tp1-pp1"
    assert arguments.engine_class("bfloat16", "fp8", spec(tensor_parallel_size=8)) == "bfloat16-fp8-tp8-pp1"


@pytest.mark.parametrize(
    ("why", "text"),
    [
        ("AttributeError: '_OpNamespace' '_C' object has no attribute 'selective_scan_fwd'", "serve it on GPUs"),
        ("AssertionError: CPU GDN attention requires BF16.", "set `dtype: bfloat16`"),
        ("RuntimeError: expect weight to be bfloat16, float16, int8", "set `dtype: bfloat16`"),
        ("the engine core was killed by SIGSEGV", "set another `dtype`"),
        ("Layer 0 (linear_attention) does not dispatch through the attention interface", "no layers of its own"),
        ("KeyError: 'layers.1.mlp.gate.e_score_correction_bias'", "check that config.json belongs to them"),
        ("ValueError: There is no module or parameter named 'lm_head' in Bloom", "check that config.json belongs"),
        ("AttributeError: 'MiniMaxM2Config' object has no attribute 'rotary_dim'", "a field that config.json lacks"),
        ("RuntimeError: shape '[-1, 2, 32]' is invalid for input of size 96", "does not fit the sizes in config.json"),
        ("ValueError: too many values to unpack (expected 3)", "does not fit the sizes in config.json"),
    ],
)
def test_an_architecture_that_vllm_does_not_run_is_named_with_the_remedy(why: str, text: str) -> None:
    """If an engine ends because vLLM does not run its architecture, the reason names the architecture, the cause and
    the remedy. Any other reason stays as it is, and a long one is cut."""
    reason = with_remedy("JambaForCausalLM", why)
    assert "JambaForCausalLM" in reason
    assert text in reason
    assert reason.startswith(f"{why}; ")
    assert with_remedy("JambaForCausalLM", f"{why}; log: /a.log") == f"{reason}; log: /a.log"
    assert with_remedy("JambaForCausalLM", "ValueError: x") == "ValueError: x"
    assert len(with_remedy("JambaForCausalLM", why + "y" * 3000)) < 700


def test_no_prefixes_of_hybrid_models_are_cached_on_cpus(tmp_path: Path) -> None:
    """On CPUs, a model with Mamba layers runs without prefix caching, which vLLM switches on, and an entry that asks
    for it is refused by the argument's name."""
    from transformers import AutoConfig

    build_tokenizer("llama", tmp_path)
    layers = ["mamba", "attention"]
    config = AutoConfig.for_model(
        "granitemoehybrid", num_hidden_layers=2, layer_types=layers, layers_block_type=layers, vocab_size=768
    )
    config.architectures = ["GraniteMoeHybridForCausalLM"]
    config.save_pretrained(tmp_path)

    def made(**engine: object) -> bool:
        entry = spec(dtype="float32", max_model_len=512, engine=engine)
        return bool(CoreProcesses(entry, tmp_path, "mp", "", "")._config().cache_config.enable_prefix_caching)

    assert not made()
    assert not made(enable_prefix_caching=False)
    with pytest.raises(ValueError, match=r"enable_prefix_caching: .*; leave it out, or set it to false"):
        made(enable_prefix_caching=True)


@pytest.mark.parametrize(
    "engine",
    [
        {"hf_overrides": {"rope_parameters": {"rope_theta": 5.0}}},
        {"kv_cache_dtype": "fp8"},
        {"disable_sliding_window": True},
        {"an_argument_of_a_later_release": 1},
    ],
)
def test_arguments_that_change_the_arithmetic_are_part_of_the_engine_class(engine: dict[str, object]) -> None:
    """Two entries have equal engine classes only if their arguments that change what the model computes are equal. The
    order of the arguments is without effect, and a gateway still finds the noise scheme at the end."""
    memory = {"gpu_memory_utilization": 0.5, "max_num_seqs": 3, "kv_cache_dtype": "auto"} | engine
    own = arguments.engine_class("float32", None, spec(engine=engine), "v2")
    assert own != (plain := arguments.engine_class("float32", None, spec(), "v2"))
    assert own == arguments.engine_class("float32", None, spec(engine=memory), "v2")
    assert without_seed_noise(own) == own.removesuffix("-v2") != without_seed_noise(plain)
    assert own.startswith("float32-")


def test_arguments_of_the_same_arithmetic_leave_the_engine_class_as_it_was() -> None:
    """Arguments that vLLM has and that do not change the arithmetic, and any argument at its default, are no part of
    the engine class."""
    known = json.loads(TABLE.read_text())["arguments"]
    assert not arguments.SAME_ARITHMETIC - known.keys() - set(PARSER_KEYS)
    given = dict.fromkeys(arguments.SAME_ARITHMETIC, "x") | {"kv_cache_dtype": "auto", "enforce_eager": True}
    assert arguments.engine_class("float32", None, spec(engine=given)) == "float32-tp1-pp1"


@pytest.mark.parametrize(
    ("model_type", "rope", "limit", "name"),
    [
        ("phi3", {"rope_type": "longrope", "original_max_position_embeddings": 4096}, 4096, "short"),
        ("phi3", {"rope_type": "longrope", "original_max_position_embeddings": 4096}, 4097, ""),
        ("llama", {"rope_type": "yarn", "original_max_position_embeddings": 4096}, 4096, ""),
        ("llama4_text", None, 32_768, "short"),
        ("llama4_text", None, 65_536, ""),
        ("qwen3", None, 10, ""),
    ],
)
def test_a_context_length_that_changes_the_arithmetic_is_part_of_the_engine_class(
    model_type: str, rope: dict[str, object] | None, limit: int, name: str
) -> None:
    """The engine class names a small context length if vLLM computes otherwise because of it."""
    config = SimpleNamespace(model_type=model_type, rope_parameters=rope)
    assert arguments.length_class(SimpleNamespace(hf_text_config=config, max_model_len=limit)) == name


async def test_an_engine_that_has_not_started_or_is_closed_is_dead(llama_folder: Path) -> None:
    """Calls before start and after close raise EngineDead, and close is idempotent."""
    engine = VllmEngine(spec(), llama_folder)
    for closed in (False, True):
        with pytest.raises(EngineDead):
            await engine.submit(request((1,)))
        with pytest.raises(EngineDead):
            await engine.check()
        if not closed:
            await engine.close()
            await engine.close()


def test_the_engine_gets_the_reasoning_parser_and_no_tool_parser(llama_folder: Path) -> None:
    """vLLM's engine gets the reasoning parser that was chosen for the model, if any. It does not get the parsers that
    the catalog entry names."""
    entry = spec(engine={"tool_call_parser": "hermes", "reasoning_parser": "none"})
    assert arguments.engine_arguments(entry, llama_folder, "ray").reasoning_parser == ""
    assert arguments.engine_arguments(entry, llama_folder, "ray", "qwen3").reasoning_parser == "qwen3"


def test_a_refusal_is_one_sentence(llama_folder: Path, tmp_path: Path) -> None:
    """If vLLM refuses an entry, the error is one line with vLLM's reason, without pydantic's framing."""
    folder = Path(shutil.copytree(llama_folder, tmp_path / "odd"))
    (folder / "config.json").write_text('{"model_type": "nosuch", "architectures": ["NoSuchForCausalLM"]}')
    with pytest.raises(ValueError, match="`nosuch`") as refused:
        CoreProcesses(spec(), folder, "mp", "", "").start(None, fast=False, configured=print)  # type: ignore[arg-type]
    assert "pydantic" not in str(refused.value)
    assert "\n" not in str(refused.value)
