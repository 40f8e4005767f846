"""Scenario `endpoint`: load a server that is already running.

The scheme of the server's address selects the API. The load is an open loop (calls begin at their own times) or a
closed loop (a fixed number of calls runs at once).
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loadtests import arrivals, datasets, traces
from loadtests.driver import Limits
from loadtests.faces import CallFailed, Face, Request
from loadtests.faces.grpc_stream import CHAT, COMPLETE, GrpcStream
from loadtests.faces.openai_sse import OpenAiSse
from loadtests.faces.session import Sessions
from loadtests.figures import mean, plain_figure
from loadtests.records import Slo
from loadtests.report import Report
from loadtests.scenarios.common import Contestant, run_round
from loadtests.show import Screen

SCHEMES = ("grpc", "session", "http", "ray")


class BadEndpoint(ValueError):
    """Raised for an unknown API, or if no server is at the address. The message says what was tried."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this scenario."""
    add = parser.add_argument
    add("--endpoint", required=True, help="grpc://HOST:PORT, session://HOST:PORT, http://HOST:PORT or ray://HOST:PORT")
    add("--model", default="default")
    add("--application", default="", help="application of Ray Serve, for ray://")
    add("--method", default="", help="full path of the streaming method, for grpc:// and ray://")
    add("--api-key", default="", help="for http://")
    add("--dataset", default="fixed", help=f"one of {', '.join(datasets.NAMES)}")
    add("--traces", type=Path, default=traces.DEFAULT_FOLDER, help="the folder of traces and questions")
    add("--requests", type=int, default=100)
    add("--prompt-words", type=int, default=64)
    add("--groups", type=int, default=8, help="shared prefixes, for the dataset `prefixes`")
    add("--tokens", type=int, default=64, help="tokens of each answer; an upper bound for traces, which have their own")
    add("--scale", type=float, default=1.0, help="factor for a trace's lengths")
    add("--complete", action="store_true", help="completion instead of chat")
    add("--concurrency", default="", help="closed loop: concurrent calls; a list such as 1,8,64 makes a sweep")
    add("--rate", type=float, help="open loop: calls a second")
    add("--cv", type=float, default=1.0, help="open loop: burstiness of the gaps; 1 is Poisson")
    add("--speed", type=float, help="open loop: replay the trace's own arrival times, this many times as fast")
    add("--slo-ttft-ms", type=float)
    add("--slo-tpot-ms", type=float)
    add("--slo-e2e-ms", type=float)
    add("--call-timeout-s", type=float, default=120.0)
    add("--run-timeout-s", type=float, default=600.0)


def face_of(arguments: argparse.Namespace) -> Face:
    """Return the client for an address. Raises BadEndpoint."""
    scheme, separator, rest = arguments.endpoint.partition("://")
    host, colon, port = rest.rstrip("/").rpartition(":")
    if scheme not in SCHEMES or not separator:
        raise BadEndpoint(
            f"endpoint {arguments.endpoint!r}: unknown scheme; expected one of {', '.join(s + '://' for s in SCHEMES)}"
        )
    if scheme == "http":
        return OpenAiSse(arguments.endpoint, arguments.model, api_key=arguments.api_key)
    if not colon or not host or not port.isdigit():
        raise BadEndpoint(f"endpoint {arguments.endpoint!r}: expected {scheme}://HOST:PORT")
    if scheme == "session":
        return Sessions(rest.rstrip("/"), arguments.model)
    return GrpcStream(
        rest.rstrip("/"),
        arguments.model,
        metadata=(("application", arguments.application),) if arguments.application else (),
        chat_path=arguments.method or CHAT,
        complete_path=arguments.method or COMPLETE,
    )


def requests_of(arguments: argparse.Namespace) -> tuple[list[Request], list[float] | None]:
    """Return the calls, and the times at which they are due (None: a closed loop). Raises NoData or ValueError."""
    name, count, seed, chat = arguments.dataset, arguments.requests, arguments.seed, not arguments.complete
    datasets.check_name(name)
    if name in traces.TRACES:
        traced = traces.load(name, arguments.traces)[:count]
        requests = datasets.from_trace(traced, arguments.scale, seed, arguments.tokens)
        if arguments.speed is not None:
            return requests, arrivals.replay([request.at_s for request in traced], arguments.speed)
    elif arguments.speed is not None:
        raise ValueError(f"--speed replays a trace's arrivals: --dataset must be one of {', '.join(traces.TRACES)}")
    elif name == "mt-bench":
        requests = datasets.mt_bench(count, arguments.tokens, seed, arguments.traces)
    elif name == "prefixes":
        half = max(arguments.prompt_words // 2, 1)
        requests = datasets.prefixes(count, arguments.groups, half, half, arguments.tokens, seed, chat)
    else:
        requests = datasets.fixed(count, arguments.prompt_words, arguments.tokens, seed, chat)
    if arguments.rate is not None:
        return requests, arrivals.gamma(len(requests), arguments.rate, arguments.cv, seed)
    return requests, None


def levels(text: str) -> Sequence[int]:
    """Parse a list of numbers such as `1,8,64`. Raises ValueError."""
    try:
        concurrencies = [int(part) for part in (text or "8").split(",")]
    except ValueError:
        concurrencies = []
    if not concurrencies or min(concurrencies) < 1:
        raise ValueError(f"--concurrency {text!r}: expected integers above 0, such as 1,8,64")
    return concurrencies


async def play(arguments: argparse.Namespace, screen: Screen, report: Report) -> None:
    """Make one run, or one run for each concurrency. Raises BadEndpoint if the first call finds no server."""
    if arguments.requests < 1 or arguments.tokens < 1:
        raise ValueError("--requests and --tokens must be 1 or more")
    requests, due_s = requests_of(arguments)
    given = (arguments.slo_ttft_ms, arguments.slo_tpot_ms, arguments.slo_e2e_ms)
    report.slo = Slo(*(None if ms is None else ms / 1000 for ms in given)) if any(given) else None
    report.settings |= {name: str(value) for name, value in vars(arguments).items() if name != "api_key"}
    concurrencies = levels(arguments.concurrency)
    limits = Limits(arguments.call_timeout_s, arguments.run_timeout_s)
    face = face_of(arguments)
    arm = Contestant(report.arm(arguments.endpoint, f"{arguments.dataset} over {face.name}"), face, ())
    try:
        await _check_endpoint(face, requests[0], arguments)
        if due_s is not None:
            await run_round(arm, screen, 1, requests, due_s=due_s, limits=limits)
        else:
            for number, concurrency in enumerate(concurrencies, 1):
                if not arm.arm.problem:
                    await run_round(arm, screen, number, requests, concurrency=concurrency, limits=limits)
    finally:
        await face.close()
    rates = [run.tokens / run.duration_s for run in arm.runs if run.tokens]
    if rates:
        report.figures.append(plain_figure("tokens/s", mean(rates), "tokens/s", None, len(rates)))


async def _check_endpoint(face: Face, first: Request, arguments: argparse.Namespace) -> None:
    """Make one short call, so that a wrong address or model gives one clear error line before any run begins."""
    try:
        async with asyncio.timeout(arguments.call_timeout_s):
            await face.run(replace(first, max_tokens=1), lambda text: None)
    except TimeoutError:
        raise BadEndpoint(f"{arguments.endpoint} did not answer within {arguments.call_timeout_s:g} s") from None
    except CallFailed as error:
        what = "nobody answers at" if error.kind == CallFailed.UNREACHABLE else "a first call failed at"
        raise BadEndpoint(f"{what} {arguments.endpoint}: {error}") from None
