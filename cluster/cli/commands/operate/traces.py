"""The command `traces`, which receives spans from gateways and prints each call as a tree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli import terminal
from cluster.cli.common import USAGE, fail
from cluster.cli.local.step_lines import say
from cluster.config.schema import Config
from cluster.config.tracing import Tracing

if TYPE_CHECKING:
    from cluster.observe.otlp_receiver import OtlpReceiver

DEFAULT_LISTEN = "127.0.0.1:4317"


def traces(
    listen: Annotated[str, typer.Option("--listen", help="Address for OTLP over gRPC, host:port.")] = DEFAULT_LISTEN,
) -> None:
    """Receive spans and print each call as a tree, until Ctrl-C. Gateways send spans with `observe: {tracing:
    {endpoint: "http://127.0.0.1:4317", sample_ratio: 1}}`. No span is stored: to keep spans, use a tracing system."""
    receiver = start_receiver(listen)
    say(f"waiting for spans at http://{receiver.address}; Ctrl-C ends")
    try:
        receiver.wait()
    except KeyboardInterrupt:
        receiver.stop()


def start_receiver(listen: str) -> OtlpReceiver:
    """Start a receiver that prints the spans of each call. Exits with an error if the address cannot be bound."""
    from cluster.cli.span_trees import trees
    from cluster.observe.otlp_receiver import OtlpReceiver

    try:
        receiver = OtlpReceiver(listen, lambda spans: terminal.say("\n\n".join(("", *trees(spans)))))
    except RuntimeError as error:
        fail(f"--listen: {error}", USAGE)
    receiver.start()
    return receiver


def with_tracing(config: Config, address: str) -> Config:
    """Return `config` with tracing: gateways send the spans of all calls to the receiver at `address` on this host."""
    tracing = Tracing(endpoint=f"http://{address}", sample_ratio=1.0)
    return config.model_copy(update={"observe": config.observe.model_copy(update={"tracing": tracing})})
