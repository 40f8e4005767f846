"""Tests that the table of engine arguments equals that of the pinned vLLM, and that CODE lists every argument that runs
code.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.config.document import ConfigError, parse
from cluster.config.engine import (
    CODE,
    OWNED_ENGINE_ARGS,
    arguments,
    code_arguments,
    engine_problems,
    together_problems,
)

ROOT = Path(__file__).resolve().parents[2]
SUSPICIOUS = re.compile(r"(_cls|_class|class_overrides|plugin|processors|module_path|_path|_file|inductor_passes)$")
HARMLESS = {
    "compilation_config.debug_dump_path",
    "allowed_local_media_path",
    "hf_config_path",
    "mm_encoder_fp8_scale_path",
    "mm_encoder_fp8_scale_save_path",
}
"""Arguments that are paths of data which vLLM reads but does not run."""


@pytest.mark.engine
def test_the_tables_are_the_installed_vllms() -> None:
    """The tables of engine arguments and of output parsers match the installed vLLM. One process checks both tables,
    since most of its time is the import of vLLM."""
    check = (
        "import sys; sys.path.insert(0, 'scripts'); import engine_arguments, output_parsers; "
        "sys.exit(engine_arguments.main(['--check']) + output_parsers.main(['--check']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", check],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def rows(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the path of every argument in a table, and of every key inside an argument."""
    for name, row in table.items():
        yield prefix + name
        for form in row.get("any", ()):
            yield from rows(form.get("fields", {}), f"{prefix}{name}.")


def test_every_argument_that_names_code_is_known() -> None:
    """Every vLLM argument whose name suggests that it loads code is listed in CODE or in HARMLESS."""
    suspicious = {path for path in rows(arguments()) if SUSPICIOUS.search(path)}
    assert suspicious - CODE - HARMLESS == set()
    assert {*rows(arguments())} >= CODE


@pytest.mark.parametrize(
    ("engine", "path"),
    [
        ({"worker_cls": "a.B"}, "worker_cls"),
        ({"worker_extension_cls": "a.B"}, "worker_extension_cls"),
        ({"scheduler_cls": "a.B"}, "scheduler_cls"),
        ({"logits_processors": ["a:B"]}, "logits_processors"),
        ({"model_class_overrides": {"X": "a:B"}}, "model_class_overrides"),
        ({"io_processor_plugin": "x"}, "io_processor_plugin"),
        ({"reasoning_parser_plugin": "/x.py"}, "reasoning_parser_plugin"),
        ({"structured_outputs_config": {"reasoning_parser_plugin": "/x.py"}}, "structured_outputs_config.reasoning_p"),
        ({"logging_config": {"pylogging_config_file": "/x.json"}}, "logging_config.pylogging_config_file"),
        ({"compilation_config": {"backend": "a.b"}}, "compilation_config.backend"),
        ({"compilation_config": {"inductor_passes": {"x": "a.b"}}}, "compilation_config.inductor_passes"),
        ({"ec_manager_config": {"encoder_cache_manager_cls": "a.B"}}, "ec_manager_config.encoder_cache_manager_cls"),
        ({"kv_transfer_config": {"kv_connector_module_path": "a"}}, "kv_transfer_config.kv_connector_module_path"),
        (
            {"kv_transfer_config": {"kv_connector_extra_config": {"spec_module_path": "a"}}},
            "kv_transfer_config.kv_connector_extra_config.spec_module_path",
        ),
        (
            {"speculative_config": {"draft_model_config": {"logits_processors": ["a.B"]}}},
            "speculative_config.draft_model_config.logits_processors",
        ),
        ({"speculative_config": {"model": "a.B"}}, "speculative_config.model"),
        ({"speculative_config": {"method": "custom_class", "model": "B"}}, "speculative_config.model"),
    ],
)
def test_arguments_that_run_code_are_told_apart(engine: dict[str, Any], path: str) -> None:
    """Every argument that makes vLLM import code that the configuration names is reported."""
    (found,) = code_arguments(engine)
    assert found[0].startswith(path)


@pytest.mark.parametrize(
    "engine",
    [
        {"worker_cls": "auto"},
        {"logits_processors": None},
        {"compilation_config": {"backend": "inductor", "cudagraph_mode": "PIECEWISE"}},
        {"speculative_config": {"model": "/models/draft", "num_speculative_tokens": 3}},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
        {"gpu_memory_utilization": 0.92, "kv_cache_dtype": "fp8", "enable_expert_parallel": True, "max_num_seqs": 4},
        {"attention_backend": "FLASH_ATTN", "optimization_level": 2, "enforce_eager": True, "quantization": None},
        {"limit_mm_per_prompt": {"image": 2}, "hf_overrides": {"x": 1}, "kv_cache_memory_bytes": 1 << 30},
        {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"},
        {"tool_call_parser": "none", "reasoning_parser": "none"},
    ],
)
def test_right_arguments_pass(engine: dict[str, Any]) -> None:
    """Arguments that vLLM accepts are not reported."""
    assert [*engine_problems(engine)] == []
    assert [*code_arguments(engine)] == []


@pytest.mark.parametrize(
    ("whole", "name"),
    [
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "max_num_seqs"),
        (
            {"max_num_batched_tokens": 64, "max_model_len": 128, "enable_chunked_prefill": False},
            "max_num_batched_tokens",
        ),
        ({"max_num_active_seqs": 64, "max_num_seqs": 32}, "max_num_active_seqs"),
        ({"long_prefill_token_threshold": 64, "max_model_len": 32}, "long_prefill_token_threshold"),
        ({"max_loras": 8, "max_cpu_loras": 4}, "max_cpu_loras"),
        ({"decode_context_parallel_size": 4, "tensor_parallel_size": 6}, "decode_context_parallel_size"),
    ],
)
def test_arguments_that_cannot_stand_together(whole: dict[str, Any], name: str) -> None:
    """Arguments that are valid alone are reported if vLLM refuses the combination."""
    assert [key for key, _ in together_problems(whole)] == [name]
    for key in whole:
        assert not [*together_problems({other: value for other, value in whole.items() if other != key})]


@pytest.mark.parametrize(
    ("keys", "path"),
    [
        (
            "max_model_len: 8, engine: {long_prefill_token_threshold: 9}",
            "models[0].engine.long_prefill_token_threshold",
        ),
        (
            "engine: {max_num_batched_tokens: 8}, gpu: [{type: A}, {type: B, engine: {max_num_seqs: 9}}]",
            "models[0].gpu[1].engine.max_num_seqs",
        ),
        (
            "max_model_len: 8, canary: {version: v2, engine: {long_prefill_token_threshold: 9}}",
            "models[0].canary.engine.long_prefill_token_threshold",
        ),
    ],
)
def test_an_engine_is_checked_with_all_it_starts_with(keys: str, path: str) -> None:
    """The model's engine arguments are checked together with those of a GPU type, and together with those of the
    canary."""
    with pytest.raises(ConfigError) as caught:
        parse(f"api_version: headrace/v1\nname: c\nmodels: [{{name: m, source: hf://o/m, {keys}}}]")
    assert f": {path}" in str(caught.value)


def test_what_headrace_sets_is_named() -> None:
    """Every argument that Headrace sets itself is refused."""
    problems = dict(engine_problems(dict.fromkeys(OWNED_ENGINE_ARGS)))
    assert problems.keys() == OWNED_ENGINE_ARGS.keys()


@pytest.mark.parametrize(
    ("engine", "text"),
    [
        ({"tool_call_parser": "hermse"}, "did you mean `hermes`?"),
        ({"tool_call_parser": "qwen3-coder"}, "did you mean `qwen3_coder`?"),
        ({"reasoning_parser": "deepseek-r1"}, "did you mean `deepseek_r1`?"),
        ({"reasoning_parser": "hermes"}, "known are cohere_command3"),
        ({"tool_call_parser": ["hermes"]}, "must be the name of a parser"),
        ({"tool_call_parser": ""}, "must be the name of a parser"),
    ],
)
def test_an_unknown_parser_is_a_problem_with_near_names(engine: dict[str, Any], text: str) -> None:
    """A parser that vLLM does not have is reported under its key, with the nearest name or all names."""
    ((path, problem),) = engine_problems(engine)
    assert path in engine
    assert text in problem


def test_parsers_of_simulated_engines_are_checked_too() -> None:
    """The entry of a simulated engine may name parsers. An unknown name is reported."""
    text = (
        'api_version: headrace/v1\nname: t\nmodels: [{name: m, source: "sim:///x", engine: {tool_call_parser: %s}}]\n'
    )
    assert parse(text % "hermes").models[0].engine == {"tool_call_parser": "hermes"}
    with pytest.raises(ConfigError, match="did you mean `hermes`"):
        parse(text % "hermse")
