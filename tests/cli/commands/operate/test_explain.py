"""The command `explain request` prints how a call was routed, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable

from typer.testing import Result

from cluster.admin.v1 import routing_pb2 as pb
from cluster.cli.target.access import console_url
from cluster.config.document import parse
from tests.support.scripted_gateway import ScriptedGateway

Run = Callable[..., Result]


def explained_call() -> pb.ExplainedCall:
    """Return a call that was resumed on a second worker after its first worker was lost."""
    first = pb.ExplainedRoute(
        after_s=0.0021, worker="sim-w2", reason="cached_prefix", why="sim-w2 held most.", tokens=700,
        prediction="exact", predicted_cached_tokens=640, cached_tokens=624, first_output_s=0.05, compared=18,
        dropped={"draining": 1}, pod="gpu-0", node="ip-10-0-3-7",
    )  # fmt: skip
    first.candidates.add(
        worker="sim-w2", total=0.8125, parts=[pb.RouteScore(name="free_places", value=0.5)], cached_tokens=640
    )
    first.candidates.add(
        worker="sim-w1", total=0.25, parts=[pb.RouteScore(name="free_places", value=0.25)], cached_tokens=0
    )
    first.candidates.add(worker="sim-w3", dropped="draining", cached_tokens=0)
    second = pb.ExplainedRoute(
        after_s=1.5, worker="sim-w1", reason="only_choice", why="It was lost.", tokens=720, node="host-1"
    )
    return pb.ExplainedCall(
        id="chatcmpl-1", request_id="r-1", tenant="acme", model="sim", gateway="gw-1", arrived_at_s=1e9, outcome="ok",
        duration_s=2.0, routes=[first, second],
    )  # fmt: skip


def test_explain_request(run: Run, gateway: ScriptedGateway) -> None:
    """The text shows why each worker was chosen, and the predicted and the actual number of cached tokens.

    A table lists the candidate workers, the best first, and marks the chosen worker.
    """
    gateway.script.explained = [explained_call()]
    done = run("explain", "request", "r-1", "--tenant", "acme", "--admin", gateway.endpoint)
    assert done.exit_code == 0
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert lines[0] == "call chatcmpl-1 (x-request-id r-1)   tenant acme   model sim   gateway gw-1"
    assert lines[1].startswith("arrived 2001-09-0")
    assert lines[1].endswith(", ended with ok after 2.00 s")
    assert lines[2:] == [
        "",
        "output 0, 2.1 ms after the arrival: sim-w2 held most.",
        "sim-w2 runs in pod gpu-0 on node ip-10-0-3-7",
        "predicted 640 cached tokens (exact); the engine found 624 of 700; first output after 50.0 ms",
        "worker    cached  total  free_places  dropped",
        "sim-w2 *  640     0.812  0.500",
        "sim-w1    0       0.250  0.250",
        "sim-w3    0                           draining",
        "and 15 more workers",
        "",
        "output 0, 1.50 s after the arrival: It was lost.",
        "sim-w1 runs on node host-1",
        "no prediction of cached tokens; no output yet from this worker",
    ]
    (request,) = gateway.script.requests
    assert (request.request_id, request.parent) == ("r-1", "tenants/acme")


def test_explain_request_as_json(run: Run, gateway: ScriptedGateway) -> None:
    """The JSON has the fields of the admin API's answer. Unknown numbers are left out."""
    gateway.script.explained = [explained_call()]
    done = run("explain", "request", "r-1", "--json", "--admin", gateway.endpoint)
    assert done.exit_code == 0, done.output
    (call,) = json.loads(done.stdout)
    first, second = call["routes"]
    assert (call["gateway"], first["cached_tokens"], first["dropped"]) == ("gw-1", 624, {"draining": 1})
    assert first["candidates"][0]["parts"] == [{"name": "free_places", "value": 0.5}]
    assert "cached_tokens" not in second


def test_an_unknown_call(run: Run, gateway: ScriptedGateway) -> None:
    """Every gateway given with --admin is asked. If no gateway knows the call, the exit code is 1.

    If a gateway is unreachable, the exit code is 3.
    """
    at = ("--admin", gateway.endpoint)
    done = run("explain", "request", "r-1", *at, *at)
    assert (done.exit_code, "remembers no such call" in done.stderr) == (1, True)
    assert len(gateway.script.requests) == 2
    assert run("explain", "request", "r-1", "--admin", "127.0.0.1:1").exit_code == 3
    done = run("explain", "request", "r-1", "--admin", "127.0.0.1:1", *at)
    assert (done.exit_code, "127.0.0.1:1" in done.stderr) == (3, True)


def test_an_unreachable_gateway_hides_no_answer(run: Run, gateway: ScriptedGateway) -> None:
    """If one of several gateways is unreachable, the answers of the others are printed, with a warning."""
    gateway.script.explained = [explained_call()]
    for first, second in ((gateway.endpoint, "127.0.0.1:1"), ("127.0.0.1:1", gateway.endpoint)):
        done = run("explain", "request", "r-1", "--admin", first, "--admin", second)
        assert (done.exit_code, "call chatcmpl-1" in done.stdout) == (0, True)
        assert "127.0.0.1:1 gave no answer" in done.stderr


def test_all_admin_addresses_of_a_context_are_asked(run: Run, gateway: ScriptedGateway) -> None:
    """A context may have the admin addresses of several gateways, and any of them may have the call."""
    gateway.script.explained = [explained_call()]
    run("context", "add", "c", "--endpoint", "a:1", "--admin", f"127.0.0.1:1,{gateway.endpoint}")
    done = run("explain", "request", "r-1", "--context", "c")
    assert (done.exit_code, "call chatcmpl-1" in done.stdout) == (0, True)


def test_links_to_the_console(run: Run, gateway: ScriptedGateway) -> None:
    """If the context has a console URL, `explain request` and `explain scaling` end with a link to the console."""
    gateway.script.explained = [explained_call()]
    added = run("context", "add", "c", "--endpoint", gateway.endpoint, "--admin", gateway.endpoint, "--console",
                "https://llm.example.com/")  # fmt: skip
    assert added.exit_code == 0, added.stderr
    done = run("explain", "request", "r-1", "--context", "c")
    assert done.stdout.splitlines()[-1] == "in the console: https://llm.example.com/#/calls/chatcmpl-1"
    done = run("explain", "scaling", "sim", "--context", "c")
    assert done.stdout.splitlines()[-1] == "in the console: https://llm.example.com/#/scaling"
    wrong = run("context", "add", "d", "--endpoint", "a:1", "--console", "llm.example.com")
    assert (wrong.exit_code, "--console" in wrong.stderr) == (2, True)


def test_the_console_of_a_local_cluster() -> None:
    """`console_url` returns the public URL, else the address of the HTTP port; empty if the console is off."""
    text = "api_version: headrace/v1\nname: x\nmodels: []\ngateway: {console: %s}\n"
    assert console_url(parse(text % "{}"), "127.0.0.1:8000") == "http://127.0.0.1:8000"
    assert console_url(parse(text % "{public_url: 'https://a.example'}"), "127.0.0.1:8000") == "https://a.example"
    assert console_url(parse(text % "{enabled: false}"), "127.0.0.1:8000") == ""
