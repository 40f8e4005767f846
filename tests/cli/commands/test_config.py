"""`headrace config check` refuses every file that a restarted process would refuse, with path, line and remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import Result

from cluster.cli.config_check import check
from cluster.cli.config_inputs import CHART_VALUES, merge_values
from cluster.config.checks import source_problem
from cluster.config.document import parse

ROOT = Path(__file__).resolve().parents[3]
Run = Callable[..., Result]
HEAD = "api_version: headrace/v1\nname: c\n"
RAY = (
    "auth: {{api_keys: {{}}, cluster_secret_file: /s}}\n"
    "ray: [{{name: a, dashboard_url: '{0}'}}, {{name: b, dashboard_url: '{1}'}}]\n"
)
MODEL = "models: [{name: m, source: hf://o/m}]\n"
CIRCLE = HEAD + "models: [{name: a, source: hf://o/m, fallback: [b]}, {name: b, source: hf://o/m, fallback: [a]}]"


def model(keys: str) -> str:
    """Return a cluster.yaml with one model that has the given keys."""
    return f"{HEAD}models: [{{name: m, source: hf://o/m, {keys}}}]\n"


def values(keys: str) -> str:
    """Return values of the chart: one model with the given keys, and a worker group with two nodes of four GPUs."""
    group = "{name: g, gpuType: H100, gpusPerNode: 4, minReplicas: 0, maxReplicas: 2}"
    entry = f"{{name: m, source: hf://o/m, {keys}}}"
    return f"config: {{models: [{entry}]}}\nray: {{clusters: [{{name: blue, workerGroups: [{group}]}}]}}"


def test_sets_of_hosts_count_as_their_nodes() -> None:
    """`config check` counts a replica of a Ray worker group as `numOfHosts` nodes. So a model that needs several nodes
    is accepted if `numOfHosts` gives the group enough nodes."""
    text = values("tensor_parallel_size: 4, pipeline_parallel_size: 4")
    assert any("needs 16 GPUs" in str(finding) for finding in check(text, "f.yaml").errors)
    assert not check(text.replace("maxReplicas: 2", "maxReplicas: 2, numOfHosts: 2"), "f.yaml").errors


def test_the_sum_of_least_replicas_and_requests_above_limits() -> None:
    """Values of the chart are refused if all models together need more GPUs than there are, or if a pod requests more
    than its limit. Each error says by how much."""
    text = values("gpu: H100, tensor_parallel_size: 4, replicas: {min: 1}")
    assert not check(text, "f.yaml").errors
    more = text.replace("models: [", "models: [{name: n, source: hf://o/n, gpu: H100, replicas: {min: 6}}, ")
    (error,) = check(more, "f.yaml").errors
    assert "config.models: at replicas.min they need 10 GPUs of type H100 together" in str(error)
    assert "have 8 at most, 2 too few" in str(error)
    above = "gateway: {resources: {requests: {memory: 3Gi}, limits: {memory: 3000M}}}\n" + text
    (error,) = check(above, "f.yaml").errors
    assert str(error).startswith("gateway.resources.requests.memory: is 3Gi, above the limit of 3000M: raise")
    assert error.line == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD + "models: []\n" + MODEL, "models: the key appears again here, first in line 3"),
        (model("dtype: auto, dtype: float16"), "models[0].dtype: the key appears again here"),
        (HEAD + "models: [{name: m, source: huggingface://o/m}]", "did you mean hf://o/m?"),
        (HEAD + "models: [{name: m, source: meta-llama/Llama-3.1-8B}]", "did you mean hf://meta-llama/Llama-3.1-8B?"),
        (HEAD + "models: [{name: m, source: hf://m}]", "expected hf://organisation/name"),
        (HEAD + "models: [{name: m, source: demo://smol}]", "demo://smollm2"),
        (HEAD + "models: [{name: m, source: 'sim:///?decode=1'}]", "'decode' is no parameter of a simulated engine"),
        (
            HEAD + "weights: {allow: {sources: ['/models/*']}}\n" + MODEL,
            "models[0].source: 'hf://o/m' is not among weights.allow.sources (/models/*)",
        ),
        (model("engine: {gpu_memory_utilization: 92}"), "not 92: a part, not a percentage; write 0.92"),
        (model("engine: {gpu_memory_utilisation: 0.9}"), "did you mean `gpu_memory_utilization`?"),
        (model("engine: {max-num-seqs: 8}"), "models[0].engine.max-num-seqs: vLLM has no such engine argument; did"),
        (model("engine: {max_num_seqs: many}"), "must be a whole number or null, not 'many'"),
        (model("engine: {max_num_seqs: 0}"), "must be at least 1, not 0"),
        (model("engine: {kv_cache_dtype: fp7}"), "engine.kv_cache_dtype: must be one of auto"),
        (model("engine: {compilation_config: {cudagraph_mod: 1}}"), "did you mean `cudagraph_mode`?"),
        (model("engine: {tensor_parallel_size: 2}"), "set `tensor_parallel_size` beside `source`"),
        (model("engine: {worker_cls: a.B}"), "only where weights.allow.remote_code is true"),
        (model("gpu: [{type: L4, engine: {scheduler_cls: a.B}}]"), "models[0].gpu[0].engine.scheduler_cls: names code"),
        (model("canary: {version: v2, engine: {logits_processors: [a.B]}}"), "models[0].canary.engine.logits_proc"),
        (model("aliases: ['My Model!']"), "models[0].aliases[0]: 'My Model!' must be letters"),
        (model("aliases: [m]"), "models[0].aliases[0]: the name 'm' is used by 'm' twice"),
        (model("gpu: L4, tensor_parallel_size: 8") + "scaling: {gpu_budget: {L4: 4}}", "scaling.gpu_budget.L4 is 4"),
        (model("gpu: L4, replicas: {min: 5}") + "scaling: {gpu_budget: {L4: 4}}", "together need 5 GPUs of type L4"),
        (model("tensor_paralel_size: 2"), "unknown key; did you mean `tensor_parallel_size`?"),
        (model("slo: {ttft_s: 300ms}"), "models[0].slo.ttft_s: must be seconds, a number without a unit"),
        (HEAD + "gateway: {drain_timeout_s: 5m}\n" + MODEL, "not '5m': write 300"),
        (HEAD + "gateway: {max_message_bytes: 16Mi}\n" + MODEL, "not '16Mi': write 16777216"),
        (HEAD + "gateway: {queue: {max_tokens: 500k}}\n" + MODEL, "not '500k': write 500000"),
        (HEAD + "gateway: {drain_timeout_s: .inf}\n" + MODEL, "gateway.drain_timeout_s"),
        (
            HEAD + "gateway: {listen: {grpc: '127.0.0.1:8000'}}\n" + MODEL,
            "gateway.listen.http: 127.0.0.1:8000: port 8000 is listen.grpc's too",
        ),
        (HEAD + "gateway: {listen: {http: '127.0.0.1:99999'}}\n" + MODEL, "a port is 0 to 65535"),
        (HEAD + "gateway: {listen: {http: '127.0.0.999:80'}}\n" + MODEL, "127.0.0.999 is no IP address"),
        (HEAD + "gateway: {processes: 3, listen: {http: '127.0.0.1:50062'}}\n" + MODEL, "link of process 2"),
        (HEAD + "link: {gateways: ['gateway:0']}\n" + MODEL, "link.gateways[0]: gateway:0: a port is 1 to 65535"),
        (HEAD + "store: {limits_url: 'redis://h:port'}\n" + MODEL, "store.limits_url: is no URL"),
        ("api_version: headrace/v0\nname: c\n" + MODEL, "write `api_version: headrace/v1`"),
        (HEAD + "models: [{name: m, source: demo://smollm2, tensor_parallel_size: 2}]", "which 2 does not divide"),
        (HEAD + "models: [{name: m, source: hf://o/m, version: 1.0}]", 'write it in quotes, "1.0"'),
        (HEAD + "models: [{name: m, source: hf://o/m, replicas: 3}]", "must be a mapping of keys, not 3"),
        (CIRCLE, "leads back to 'a' (a -> b -> a)"),
        (HEAD + "models: [{name: m, source: hf://o /m}]", "is no name that the hub has"),
        (HEAD + "models: [{name: m, source: 'hf://o/m?x=1'}]", "is no name that the hub has"),
        (HEAD + "models: [{name: m, source: hf://o/m@main}]", "write source: hf://o/m and revision: main"),
        (HEAD + "models: [{name: m, source: https://huggingface.co/o/m}]", "write hf://o/m"),
        (model("revision: 'a branch'"), "models[0].revision: 'a branch' is no branch"),
        (HEAD + "weights: {hugging_face: {endpoint: mirror.local}}\n" + MODEL, "is no URL of a web server"),
        (
            HEAD + "weights: {allow: {licenses: [apache-2.0]}}\n" + model("license: MIT").removeprefix(HEAD),
            "models[0].license: 'MIT' is not among weights.allow.licenses (apache-2.0)",
        ),
        (
            HEAD + "weights: {allow: {formats: [gguf]}}\n" + model("load_format: gguf").removeprefix(HEAD),
            "models[0].load_format: gguf files are not served yet",
        ),
        (HEAD + RAY.format("http://h:99999", "http://i:8265") + MODEL, "ray[0].dashboard_url: is no URL"),
        (HEAD + RAY.format("http://", "http://i:8265") + MODEL, "ray[0].dashboard_url: 'http://' is no URL"),
        (HEAD + RAY.format("http://h:8265", "http://h:8265/") + MODEL, "ray: two entries have the dashboard_url"),
        (HEAD + "store: {limits_url: 'redis://h/0?socket_timeout=abc'}\n" + MODEL, "store.limits_url: cannot be used"),
        (HEAD + "store: {limits_url: 'redis://h/0?banana=3s'}\n" + MODEL, "store.limits_url: cannot be used"),
        (HEAD + "store: {database_url: 'postgresql://u@h/d?ssl_mode=require'}\n" + MODEL, "did you mean sslmode?"),
        (HEAD + "store: {database_url: 'postgresql://u@h/d?sslmode=full'}\n" + MODEL, "sslmode=full is unknown"),
        (HEAD + "gateway: {listen: {metrics: 'a!b:9400'}}\n" + MODEL, "'a!b' is no host name"),
        (HEAD + "gateway: {listen: {metrics: '127.0.0.1:٣٤٥٦'}}\n" + MODEL, "must be host:port"),
        (HEAD + "gateway: {listen: {metrics: '::1:9400'}}\n" + MODEL, "of an IPv6 address [address]:port"),
        (HEAD + 'cost: {currency: "USD\\n", gpu_hour: {L4: 1}}\n' + MODEL, "must be three capital letters"),
        (HEAD + 'classes: [{name: "standard\\n", rank: 0}]\n' + MODEL, "classes[0].name"),
        (HEAD + 'models: [{name: m, source: "/models/\\0"}]', "models[0].source: '/models/\\x00' holds a zero byte"),
        (HEAD + "models: [{name: m, source: hf://o/m, engine: &e {hf_overrides: *e}}]", "which never ends"),
        (
            HEAD + "models: [{name: m, source: demo://smollm2, pipeline_parallel_size: 31}]",
            "].pipeline_parallel_size: is 31",
        ),
        (
            HEAD + "models: [{name: m, source: demo://smollm2, gpu: [{type: L4}, {type: H, tensor_parallel_size: 2}]}]",
            "models[0].gpu[1].tensor_parallel_size: is 2",
        ),
        (model("engine: {speculative_config: {}}"), "engine.speculative_config: names neither a method nor a model"),
        (model("engine: {speculative_config: {method: ngram}}"), "num_speculative_tokens: is needed by the method"),
        (model("engine: {kv_transfer_config: {}}"), "engine.kv_transfer_config.kv_connector: is not set"),
        (HEAD + "gateway: {drain_timeout_s: 1.0e+300}\n" + MODEL, "gateway.drain_timeout_s"),
        (HEAD + "gateway:\n" + MODEL, "gateway: must be a mapping of keys, not null: the key has no value"),
        (values("gpu: H200"), "no worker group has this type; there are H100"),
        (values("tensor_parallel_size: 8"), "the largest worker group has 4 a node"),
        (values("replicas: {min: 9}"), "the worker groups hold 8 at most"),
        ("config: {models: [], models: []}", "config.models: the key appears again here"),
        ("config: {gateway: {processes: 2}}", "a container holds one process"),
        ("config: {link: {gateways: []}}", "link.gateways"),
    ],
)
def test_what_a_process_would_refuse_is_refused(text: str, words: str) -> None:
    """The check reports an error for a file with which a process would not start."""
    errors = [str(finding) for finding in check(text, "f.yaml").errors]
    assert any(words in error for error in errors), errors


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (model("tensor_parallel_size: 3"), "no power of two"),
        (HEAD + "models: [{name: m, source: /nowhere/m}]", "there is no folder /nowhere/m on this machine"),
        (HEAD + "auth: {api_keys: {}}\ntenants: [{name: t, models: [gpt-4]}]\n" + MODEL, "'gpt-4' is no model"),
        (HEAD + "auth: {api_keys: {}}\ntenants: [{name: t}]\n" + MODEL, "default is no model of this file"),
        (HEAD + "models: [{name: m, source: demo://smollm2, revision: v1}]", "is for hf:// sources"),
        (HEAD + "models: [{name: m, source: demo://smollm2, max_model_len: 9000}]", "made for 8192 positions"),
    ],
)
def test_likely_mistakes_are_warnings(run: Run, tmp_path: Path, text: str, words: str) -> None:
    """A likely mistake is printed as a warning, and the check exits with code 0."""
    file = tmp_path / "f.yaml"
    file.write_text(text)
    done = run("config", "check", str(file))
    assert done.exit_code == 0
    assert f"warning: {file}: " in done.stderr
    assert words in done.stderr
    assert [
        words in warning["message"]
        for warning in json.loads(run("config", "check", str(file), "--json").stdout)["warnings"]
    ]


@pytest.mark.parametrize(
    "text",
    [
        model("aliases: [claude-3-5-haiku@20241022, '@cf/meta/llama-3', 'ft:gpt-3.5-turbo:org::id', Qwen3+]"),
        HEAD + "models:\n  - &a {name: a, source: hf://o/m, slo: &s {ttft_s: 3}}\n  - {<<: *a, name: b, slo: *s}\n",
        HEAD + "store: {database_url: 'postgresql+psycopg://u@/d?host=/run/postgresql'}\n" + MODEL,
        HEAD + "store: {database_url: 'postgresql://u@/d?host=a:5432&host=b:5432&target_session_attrs=any'}\n" + MODEL,
        HEAD + "store: {database_url: 'postgresql://u@h/d?sslmode=verify-full&sslrootcert=/ca.crt'}\n" + MODEL,
        HEAD + "store: {limits_url: 'rediss://u:p@h:6380/2?ssl_cert_reqs=required&health_check_interval=5'}\n" + MODEL,
        HEAD + "weights: {hugging_face: {endpoint: 'https://mirror.local/hf'}}\n" + MODEL,
        "\ufeff---\r\n" + (HEAD + MODEL).replace("\n", "\r\n") + "...\r\n",
        HEAD
        + "auth: {api_keys: {}}\ntenants: [{name: t, models: ['ft:m:x']}]\n"
        + model("aliases: ['ft:m:x']").removeprefix(HEAD),
    ],
)
def test_what_every_process_takes_passes_without_a_warning(text: str) -> None:
    """The check of a valid file reports no errors and no warnings."""
    report = check(text, "f.yaml")
    assert not report.errors
    assert not report.warnings


@given(name=st.from_regex(r"[a-z-][.a-z@-]{0,4}/[a-z._-]{1,5}(\.git)?", fullmatch=True))
@example(name="o/a" + "b" * 96)
def test_names_of_repositories_are_judged_as_the_hubs_client_does(name: str) -> None:
    """The check accepts exactly the repository names that huggingface_hub accepts.

    A replica with any other name cannot start.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        valid = True
    except HFValidationError:
        valid = False
    assert (not source_problem(f"hf://{name}")) == valid


def test_a_wrong_section_brings_no_errors_about_its_defaults() -> None:
    """An invalid section causes no further errors about default values that the file does not contain."""
    names = "[{san: a.b, tenant: t}, {san: A.B., tenant: u}]"
    report = check(f"config: {{auth: {{client_certificates: {names}}}}}", "values.yaml")
    assert [finding.path for finding in report.errors] == ["config.auth"]


def test_all_errors_come_at_once() -> None:
    """A check reports all errors of a file, and each error has a line number."""
    text = (
        HEAD + "observe: {log_level: loud}\ngateway: {drain_timeout_s: 5m}\nmodels:\n"
        " - {name: A, source: hf://o/m}\n - {name: b, source: nope://x, engine: {port: 1, sed: 0}, fallback: [zz]}\n"
        " - {name: c, source: hf://o/m, aliases: [b], replicas: {min: 3, max: 2}, load_format: pt}\n"
    )
    errors = [(finding.path, finding.line) for finding in check(text, "f").errors]
    assert sorted(errors) == sorted(
        [
            ("gateway.drain_timeout_s", 4),
            ("observe.log_level", 3),
            ("models[0].name", 6),
            ("models[1].source", 7),
            ("models[1].engine.port", 7),
            ("models[1].engine.sed", 7),
            ("models[1].fallback[0]", 7),
            ("models[2].aliases[0]", 8),
            ("models[2].replicas", 8),
            ("models[2].load_format", 8),
        ]
    )


@pytest.mark.parametrize("text", ["a: [", "", "- 1", HEAD + "models: 3", "a: 1\n---\nb: 2", HEAD + "x: 2024-99-99"])
def test_json_is_printed_whatever_is_wrong(run: Run, text: str) -> None:
    """`config check --json` prints JSON and exits with code 2 for any invalid input."""
    done = run("config", "check", "-", "--json", input=text)
    assert done.exit_code == 2
    answer = json.loads(done.stdout)
    assert answer["ok"] is False
    assert answer["errors"]
    assert answer["config"] is None


def test_json_of_a_file_that_is_not_there(run: Run) -> None:
    """`config check --json` prints JSON and exits with code 2 for a path that cannot be read."""
    done = run("config", "check", "/nowhere.yaml", "--json")
    assert (done.exit_code, json.loads(done.stdout)["ok"]) == (2, False)


@pytest.mark.parametrize("file", sorted((ROOT / "deploy" / "presets").glob("*.yaml")), ids=lambda file: file.stem)
def test_values_are_read_over_the_charts_own(run: Run, file: Path) -> None:
    """Every preset of the Helm chart passes the check.

    From a values file, the check reads the same configuration that Helm renders into the ConfigMap.
    """
    done = run("config", "check", str(file))
    assert done.exit_code == 0, done.stderr
    merged = merge_values(json.loads(CHART_VALUES.read_text()), yaml.safe_load(file.read_text()))["config"]
    manifest = {"kind": "ConfigMap", "apiVersion": "v1", "data": {"cluster.yaml": yaml.safe_dump(merged)}}
    text = yaml.safe_dump_all([{"kind": "Service"}, manifest])
    from_map = json.loads(run("config", "check", "-", "--json", input=text).stdout)
    from_values = json.loads(run("config", "check", str(file), "--json").stdout)
    assert from_map["config"] == from_values["config"]


def test_files_that_are_named_are_looked_for(run: Run, tmp_path: Path) -> None:
    """With --files, the check reports each file named in the configuration that is missing or too short.

    Without --files there is no error, because the file may be on another machine.
    """
    short = tmp_path / "short"
    short.write_text("x\n")
    guard = "{builtin: patterns, patterns_file: /nowhere/p.yaml}"
    text = (
        HEAD + f"auth: {{cluster_secret_file: {short}, api_keys: {{pepper_file: /nowhere/pepper}}}}\n"
        f"tenants: [{{name: t, models: ['*'], guards: [{guard}]}}]\n" + MODEL
    )
    assert run("config", "check", "-", input=text).exit_code == 0
    done = run("config", "check", "-", "--files", input=text)
    assert done.exit_code == 2
    for words in ("shorter than 32", "auth.api_keys.pepper_file: /nowhere/pepper cannot be read", "/nowhere/p.yaml"):
        assert words in done.stderr


def test_a_local_checkpoint_is_asked_for_its_heads(tmp_path: Path) -> None:
    """For a local checkpoint, `config check` compares the degrees of parallelism with the model. The attention heads
    must be divisible by `tensor_parallel_size`, and there must be enough layers for `pipeline_parallel_size`."""
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 12, "num_hidden_layers": 2}))
    (tmp_path / "model.safetensors").write_bytes(b"x")

    def errors(keys: str) -> list[str]:
        text = f"{HEAD}models: [{{name: m, source: {tmp_path}, {keys}}}]"
        return [finding.message for finding in check(text, "f").errors]

    assert errors("tensor_parallel_size: 3") == []
    assert "12 attention heads, which 8 does not divide" in errors("tensor_parallel_size: 8")[0]
    assert "2 layers" in errors("pipeline_parallel_size: 4")[0]
    (tmp_path / "model.safetensors").unlink()
    assert "holds no weights" in errors("tensor_parallel_size: 3")[0]


YAMLS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(
    key=st.sampled_from(["gateway", "models", "auth", "tenants", "ray", "weights", "classes", "scaling"]), value=YAMLS
)
def test_any_value_anywhere_is_answered(key: str, value: Any) -> None:
    """The check never raises an exception, and a configuration that passes the check can be loaded."""
    text = json.dumps({"api_version": "headrace/v1", "name": "c", "models": [], key: value})
    report = check(text, "f")
    if not report.errors:
        parse(text)
