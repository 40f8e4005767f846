"""The commands embed and rerank work with a real gRPC server."""

from __future__ import annotations

import json
from collections.abc import Callable

from google.rpc import code_pb2
from typer.testing import Result

from cluster.cli.commands.embed import TEXTS_A_CALL
from cluster.v1 import inference_pb2 as pb
from tests.support.scripted_gateway import ScriptedGateway, refusal

Run = Callable[..., Result]


def test_embed_prints_a_row_for_each_text(run: Run, gateway: ScriptedGateway) -> None:
    """`embed` prints each text with its vector, and sends the given options."""
    done = run("embed", "tiny", "one", "three", "--dimensions", "2", "--truncate", "--endpoint", gateway.endpoint)
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows == [
        ["text", "values", "vector"],
        ["one", "2", "+3.0000", "+0.0000"],
        ["three", "2", "+5.0000", "+1.0000"],
    ]
    (request,) = gateway.script.requests
    assert request == pb.EmbedRequest(model="tiny", texts=["one", "three"], dimensions=2, truncate=True)


def test_embed_reads_lines(run: Run, gateway: ScriptedGateway) -> None:
    """With `-`, `embed` reads one text per line from standard input, and `--json` prints all values.

    If a line is empty, `embed` exits with code 2 and names the line.
    """
    done = run("embed", "tiny", "-", "--json", "--endpoint", gateway.endpoint, input="one\r\nthree\n")
    assert json.loads(done.stdout) == {"model": "tiny", "embeddings": [[3.0, 0.0], [5.0, 1.0]], "prompt_tokens": 7}
    for given, number in (("\n", 1), ("", 1), ("one\n\nthree\n", 2)):
        done = run("embed", "tiny", "-", "--endpoint", gateway.endpoint, input=given)
        assert done.exit_code == 2
        assert f"line {number} of standard input" in done.stderr


def test_embed_sends_many_lines_in_several_calls(run: Run, gateway: ScriptedGateway) -> None:
    """More texts than one call takes are sent in several calls. The vectors are in the order of the lines, and the
    tokens of all calls are added."""
    gateway.script.requests.clear()
    given = ["x" * (1 + number % 7) for number in range(TEXTS_A_CALL + 3)]
    done = run("embed", "tiny", "-", "--json", "--endpoint", gateway.endpoint, input="\n".join(given))
    answer = json.loads(done.stdout)
    assert [vector[0] for vector in answer["embeddings"]] == [len(text) for text in given]
    assert [len(request.texts) for request in gateway.script.requests] == [TEXTS_A_CALL, 3]


def test_rerank_prints_the_best_first(run: Run, gateway: ScriptedGateway) -> None:
    """`rerank` prints the documents by score, each with its position among the arguments, as a table or as JSON."""
    done = run("rerank", "tiny", "q", "b", "long one", "--top-n", "2", "--endpoint", gateway.endpoint)
    assert [line.split() for line in done.stdout.splitlines()[1:]] == [
        ["+1.0000", "1", "long", "one"],
        ["+0.1250", "0", "b"],
    ]
    (request,) = gateway.script.requests
    assert (request.query, list(request.documents), request.top_n) == ("q", ["b", "long one"], 2)
    done = run("rerank", "tiny", "q", "-", "--json", "--endpoint", gateway.endpoint, input="b\nlong one\n")
    assert [row["document"] for row in json.loads(done.stdout)["results"]] == ["long one", "b"]


def test_a_refusal_is_one_line(run: Run, gateway: ScriptedGateway) -> None:
    """If a call is refused, the command prints one error line with the reason and the message."""
    gateway.script.refusals = [refusal(code_pb2.UNIMPLEMENTED, "UNSUPPORTED_FEATURE", "no task embed")]
    done = run("embed", "tiny", "one", "--endpoint", gateway.endpoint)
    assert (done.exit_code, done.stderr) == (1, "error: UNSUPPORTED_FEATURE: no task embed\n")
