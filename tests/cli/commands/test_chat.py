"""Tests of the commands `chat`, `complete` and `models` with a real gRPC server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from google.rpc import code_pb2
from typer.testing import Result

from cluster.v1 import inference_pb2 as pb
from tests.support.scripted_gateway import WORDS, ScriptedGateway, refusal

TEXT = "".join(WORDS)
Run = Callable[..., Result]


def test_chat_prints_the_answer(run: Run, gateway: ScriptedGateway) -> None:
    """`chat` prints the answer to standard output with a final newline, and the request has the given options."""
    options = ("--temperature", "0", "--max-tokens", "9", "--seed", "4", "--system", "Be brief")
    done = run("chat", "tiny", "Where?", *options, "--endpoint", gateway.endpoint)
    assert (done.exit_code, done.stdout) == (0, TEXT + "\n")
    (request,) = gateway.script.requests
    messages = [pb.Message(role="system", content="Be brief"), pb.Message(role="user", content="Where?")]
    wanted = pb.ChatRequest(model="tiny", messages=messages, temperature=0, max_tokens=9, seed=4, resumable=True)
    assert request == wanted


@pytest.mark.parametrize(
    ("options", "tokens", "note"),
    [
        ((), 512, "(cut after 512 tokens; --max-tokens N for more)\n"),
        (("--max-tokens", "9"), 9, "(cut after 9 tokens; --max-tokens N for more)\n"),
        ((), 7, "(cut after 7 tokens; the context or the tenant's limit holds no more)\n"),
    ],
)
def test_chat_says_where_it_cut(
    run: Run, gateway: ScriptedGateway, options: tuple[str, ...], tokens: int, note: str
) -> None:
    """`chat` bounds an answer by itself. If an answer was cut, a note says where, and whether --max-tokens helps."""
    gateway.script.finish_reason, gateway.script.completion_tokens = "length", tokens
    done = run("chat", "tiny", "Where?", *options, "--endpoint", gateway.endpoint)
    assert (done.stdout, done.stderr) == (TEXT + "\n", note)
    assert gateway.script.requests[0].max_tokens == (9 if options else 512)


def test_chat_json_is_the_message(run: Run, gateway: ScriptedGateway) -> None:
    """`chat --json` prints the whole response message."""
    done = run("chat", "tiny", "Where?", "--json", "--endpoint", gateway.endpoint)
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"] == TEXT
    assert answer["usage"]["total_tokens"] == 10


def test_chat_reads_a_piped_prompt(run: Run, gateway: ScriptedGateway) -> None:
    """Without a terminal, `chat` reads the prompt from standard input. An empty prompt is refused as bad usage."""
    assert run("chat", "tiny", "--endpoint", gateway.endpoint, input="From a pipe\n").exit_code == 0
    assert gateway.script.requests[0].messages[0].content == "From a pipe"
    assert run("chat", "tiny", "--endpoint", gateway.endpoint, input="").exit_code == 2


def test_complete_continues(run: Run, gateway: ScriptedGateway) -> None:
    """`complete` prints the completion as text, or as JSON with --json."""
    done = run("complete", "tiny", "Once", "--endpoint", gateway.endpoint)
    assert done.stdout == TEXT + "\n"
    done = run("complete", "tiny", "Once", "--json", "--endpoint", gateway.endpoint)
    assert json.loads(done.stdout)["choices"][0]["text"] == TEXT


def test_models_lists_names_aliases_and_states(run: Run, gateway: ScriptedGateway) -> None:
    """`models` prints a table of models with the reason of each failure. With --json, states have no STATE_ prefix."""
    gateway.script.models = [
        pb.Model(name="tiny", aliases=["default"], state=pb.Model.STATE_READY, max_model_len=64),
        pb.Model(name="big", state=pb.Model.STATE_FAILED, state_reason="models[big].source: no folder"),
    ]
    done = run("models", "--endpoint", gateway.endpoint)
    assert "tiny" in done.stdout
    assert "FAILED (models[big].source: no folder)" in done.stdout
    rows = json.loads(run("models", "--json", "--endpoint", gateway.endpoint).stdout)
    assert [(row["name"], row["aliases"], row["state"]) for row in rows] == [
        ("tiny", ["default"], "READY"),
        ("big", [], "FAILED"),
    ]


def test_an_error_is_one_line_and_exit_code_one(run: Run, gateway: ScriptedGateway) -> None:
    """A failed command prints one error line with the reason, the message and the retry delay, and no traceback."""
    gateway.script.refusals = [refusal(code_pb2.RESOURCE_EXHAUSTED, "QUEUE_FULL", "the queue is full", retry_after_s=2)]
    done = run("chat", "tiny", "x", "--endpoint", gateway.endpoint)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "error: QUEUE_FULL: the queue is full (try again in 2 s)\n"


def test_a_wrong_port_is_named(run: Run, gateway: ScriptedGateway) -> None:
    """If a port does not serve the method of a command, the error names the port and the right ones."""
    gateway.script.refusals = [refusal(code_pb2.UNIMPLEMENTED, "UNIMPLEMENTED", "there is no method")]
    done = run("chat", "tiny", "x", "--endpoint", gateway.endpoint)
    assert f"{gateway.endpoint} may be the wrong port" in done.stderr
    assert "gateway.listen.grpc" in done.stderr


@pytest.mark.slow
def test_nobody_there_is_exit_code_three(run: Run) -> None:
    """A command exits with code 3 if the gateway is unreachable, and the error has the gateway's address."""
    done = run("models", "--endpoint", "127.0.0.1:1")
    assert done.exit_code == 3
    assert "no gateway answers at 127.0.0.1:1 (Connection refused)" in done.stderr


@pytest.mark.parametrize(
    "arguments", [("chat",), ("models", "--nope"), ("chat", "tiny", "x", "--endpoint", "http://localhost:1")]
)
def test_bad_usage_is_exit_code_two(run: Run, arguments: tuple[str, ...]) -> None:
    """A command exits with code 2 for a missing argument, an unknown option or an address with a scheme."""
    assert run(*arguments).exit_code == 2


def test_the_key_comes_from_its_file(run: Run, gateway: ScriptedGateway, tmp_path: Path) -> None:
    """The API key is read from the file of --api-key-file, without the newline at the end."""
    (tmp_path / "key").write_text("sk-7\n")
    run("models", "--endpoint", gateway.endpoint, "--api-key-file", str(tmp_path / "key"))
    assert gateway.script.metadata[0]["authorization"] == "Bearer sk-7"
