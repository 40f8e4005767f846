"""Run a load test: `python -m loadtests SCENARIO [--json FILE] [--plot DIR]`. Exit code 0: the report is complete; 1:
it is partial; 2: the command line is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from loadtests import plots
from loadtests.children import Children, DidNotStart
from loadtests.report import Report
from loadtests.scenarios import endpoint
from loadtests.scenarios.common import PEERS, Options, Stage
from loadtests.show import Screen
from loadtests.traces import NoData

SCENARIOS = {
    "endpoint": "load any server that runs already: gRPC, OpenAI-compatible HTTP, Ray Serve's gRPC proxy",
    "smoke": "each of our APIs over a simulated engine, in seconds; no threshold on time",
    "relay": "CPU per relayed token at 256 streams of a simulated engine, beside vllm-router",
    "longprompt": "220 KB prompts at concurrency 50 over a simulated engine, beside vllm-router",
    "processes": "CPU per token of two gateway processes on one port against one, 256 streams",
    "startup": "gateway exec to first routed request with a 128k tokenizer",
    "fairness": "fairness between tenants over eight simulated workers, in virtual time, beside FIFO",
    "routing": "routing by cached prefix over simulated workers with KV caches, in virtual time, beside plain policies",
    "autoscale": "the autoscaler in virtual time, beside the optimum, Ray Serve's policy and static placement",
    "faults": "thousands of faults, recovery, overload and a soak: the effect on callers",
    "hosts": "the rendered chart on network namespaces as hosts: kills, cuts and rolls under load (root)",
    "hostile": "attacks by anonymous clients, tenants and routine procedures: the effect on everyone else",
    "agents": "tool calls and reasoning in ten formats beside vLLM's own server; real clients while workers die",
    "adapters": "embedding models and adapters beside vLLM's own server",
    "observe": "cost of metrics, traces and logs in the gateway, and its memory with many tenants",
    "console": "the console in the browser: cost in the gateway, times, accessibility, hostile texts, roles, clicks",
    "peers": "ours beside vLLM's server, vllm-router, SMG, LiteLLM and Ray Serve on one tiny model",
}
RUNNER_PARTS = {"faults": "engines", "adapters": "rows"}
"""By scenario, the part in which vLLM's model runner can be chosen."""
ADAPTER_SCENARIOS = ("fairness", "routing", "peers")
OK, PARTIAL, USAGE = 0, 1, 2
PLAIN_WIDTH = 160


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", type=Path, metavar="FILE", help="write the whole report")
    shared.add_argument("--plot", type=Path, metavar="DIR", help="write PNG plots")
    shared.add_argument("--seed", type=int, default=1, help="seed of prompts, arrivals and engines (default 1)")
    played = argparse.ArgumentParser(add_help=False)
    played.add_argument("--rounds", type=positive, help="rounds of each arm; below 10 no bound counts as met")
    played.add_argument("--concurrency", type=positive, help="concurrent calls, in place of the scenario's")
    played.add_argument("--tokens", type=positive, help="tokens per call, in place of the scenario's")
    played.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="run only this arm or part; may be repeated (a wrong name gets the list)",
    )
    played.add_argument("--no-pin", action="store_true", help="do not bind processes to cores")
    played.add_argument("--peers", type=Path, default=PEERS, help="environment of the peers (`make bench-peers`)")
    played.add_argument("--logs", type=Path, metavar="DIR", help="folder for the logs of all processes")
    out = argparse.ArgumentParser(prog="python -m loadtests", description="Load tests, beside the peers in one run.")
    scenarios = out.add_subparsers(dest="scenario", required=True, metavar="SCENARIO")
    for name, text in SCENARIOS.items():
        subparser = scenarios.add_parser(
            name, help=text, description=text, parents=[shared] + [played] * (name != "endpoint")
        )
        if name == "endpoint":
            endpoint.add_arguments(subparser)
        if name == "faults":
            subparser.add_argument("--points", type=positive, help="number of faults in the part mass (default 1000)")
            subparser.add_argument("--soak-s", type=positive, help="duration of the part soak in seconds (default 300)")
        if name in RUNNER_PARTS:
            subparser.add_argument(
                "--runner", choices=("v1", "v2"), default="v1",
                help=f"vLLM's model runner in the part {RUNNER_PARTS[name]}",
            )  # fmt: skip
        if name in ADAPTER_SCENARIOS:
            subparser.add_argument(
                "--adapters", type=share, metavar="SHARE", help="share of the calls that name an adapter (default 0)"
            )
        if name == "hostile":
            subparser.add_argument(
                "--against",
                type=Path,
                metavar="CHECKOUT",
                help="checkout to compare with in the part cost (CPU per token)",
            )
        if name == "agents":
            subparser.add_argument("--cases", type=positive, help="number of BFCL's cases (default all 1040)")
            subparser.add_argument(
                "--client", action="append", default=[], metavar="NAME",
                help="run only this client in the part clients; may be repeated",
            )  # fmt: skip
        if name == "hosts":
            subparser.add_argument(
                "--speed", type=positive, help="factor by which streams are shorter (default 1: 5 to 120 s)"
            )
    return out


def positive(text: str) -> int:
    """Parse an integer above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def share(text: str) -> float:
    """Parse a share above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


async def play(arguments: argparse.Namespace, screen: Screen, folder: Path) -> Report:
    """Run a scenario and return the report of the run. The report is partial if a step failed."""
    report = Report(arguments.scenario, {"seed": arguments.seed})
    if arguments.scenario == "endpoint":
        await endpoint.play(arguments, screen, report)
        return report
    options = Options(
        rounds=arguments.rounds,
        tokens=arguments.tokens,
        concurrency=arguments.concurrency,
        seed=arguments.seed,
        pin=not arguments.no_pin,
        only=tuple(arguments.only),
        peers=arguments.peers,
        points=getattr(arguments, "points", None),
        runner=getattr(arguments, "runner", "v1"),
        soak_s=getattr(arguments, "soak_s", None),
        speed=getattr(arguments, "speed", None),
        against=getattr(arguments, "against", None),
        adapters=getattr(arguments, "adapters", None),
        cases=getattr(arguments, "cases", None),
        clients=tuple(getattr(arguments, "client", ())),
    )
    report.peers = options.peers
    scenario = importlib.import_module(f"loadtests.scenarios.{arguments.scenario}")
    async with Children(arguments.logs or folder / "logs") as children:
        try:
            await scenario.play(Stage(options, screen, children, folder, report))
        except DidNotStart as error:
            report.problems.append(str(error))
        except asyncio.CancelledError:
            report.problems.append("interrupted")
        else:
            if wrong := options.unknown():
                report.problems.append(wrong)
    return report


async def run(arguments: argparse.Namespace, screen: Screen) -> Report:
    """Run `play` and return its report; SIGINT or SIGTERM ends the scenario early."""
    with tempfile.TemporaryDirectory(prefix="headrace-loadtest-") as folder:
        playing = asyncio.create_task(play(arguments, screen, Path(folder)))
        interrupted = False

        def interrupt() -> None:
            nonlocal interrupted
            if not interrupted:  # a second signal must not interrupt the cleanup that the first has begun
                interrupted = playing.cancel("interrupted")

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, interrupt)
        return await playing


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = parser().parse_args(argv)
    screen = Screen()
    try:
        if arguments.plot is not None:
            plots.check()
        report = asyncio.run(run(arguments, screen))
    except (NoData, plots.NoPlots, endpoint.BadEndpoint, ValueError) as error:
        screen.console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return USAGE
    except asyncio.CancelledError:
        return PARTIAL
    report.show(Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH))
    if arguments.json is not None:
        report.write(arguments.json)
        screen.say(f"report: {arguments.json}")
    if arguments.plot is not None:
        for path in plots.write(report, arguments.plot):
            screen.say(f"plot: {path}")
    return OK if report.complete else PARTIAL


if __name__ == "__main__":
    sys.exit(main())
