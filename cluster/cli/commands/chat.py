"""Commands for callers: chat, complete."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from rich.markup import escape

from cluster.cli import terminal
from cluster.cli.common import (
    USAGE,
    JsonOption,
    TimeoutOption,
    err,
    fail,
    make_client,
    out,
    print_json,
    target_errors,
)
from cluster.cli.target.contexts import ClusterTarget
from cluster.cli.target.target_options import with_target
from cluster.client import ChatParams, Client, SamplingParams, Stream
from cluster.v1 import inference_pb2 as pb

ModelArgument = Annotated[str, typer.Argument(help="A model's name or alias.", show_default=False)]
CHAT_TOKENS = 512
"""Default maximum of an answer: less than a minute on the demo's CPU."""

ChatTokensOption = Annotated[int, typer.Option("--max-tokens", help="Longest answer in tokens.")]
CompleteTokensOption = Annotated[
    int | None, typer.Option("--max-tokens", help="Longest answer in tokens.", show_default="the model's, else 16")
]
TemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", help="Randomness; 0 takes the likeliest token.", show_default="the model's"),
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", help="Seed, for answers that can be repeated.", show_default=False)
]


@with_target
def chat(
    target: ClusterTarget,
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Argument(help="The question; without it, an interactive chat.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="The system message.", show_default=False)] = None,
    max_tokens: ChatTokensOption = CHAT_TOKENS,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    timeout_s: TimeoutOption = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Ask a model, and print the answer as it is generated."""
    params: ChatParams = _without_unset(max_tokens=max_tokens, temperature=temperature, seed=seed)
    messages = [pb.Message(role="system", content=system)] if system else []
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            fail("no prompt: give one as an argument or on standard input", USAGE)
    with make_client(target, timeout_s) as client:
        if prompt is None:
            _converse(client, target, model, messages, params)
            return
        messages.append(pb.Message(role="user", content=prompt))
        with target_errors(target):
            if as_json:
                _print_message(client.chat(model, messages, **params).raw)
            else:
                _print_stream(client.stream_chat(model, messages, **params), max_tokens)


@with_target
def complete(
    target: ClusterTarget,
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The text to continue.", show_default=False)],
    max_tokens: CompleteTokensOption = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    timeout_s: TimeoutOption = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Continue a text, without a chat template."""
    params: SamplingParams = _without_unset(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with make_client(target, timeout_s) as client, target_errors(target):
        if as_json:
            _print_message(client.complete(model, prompt, **params).raw)
        else:
            _print_stream(client.stream_complete(model, prompt, **params))


def _without_unset(**values: Any) -> Any:
    return {name: value for name, value in values.items() if value is not None}


def _print_message(message: pb.ChatResponse | pb.CompleteResponse) -> None:
    print_json(MessageToDict(message, preserving_proto_field_name=True))


def _print_stream(stream: Stream[Any], max_tokens: int | None = None) -> None:
    """Print each text of a stream as soon as the text arrives.

    If the answer was cut, a note on standard error says where, and whether a higher `max_tokens` helps.
    """
    ended = False
    try:
        for text in stream:
            terminal.write(text)
        ended = True
    except KeyboardInterrupt:
        stream.cancel()
        raise typer.Exit(130) from None
    finally:
        if stream.text and not stream.text.endswith("\n"):
            terminal.write("\n")
    if ended and stream.finish_reason == "length":
        tokens = stream.usage.completion_tokens if stream.usage else 0
        full = max_tokens is not None and 0 < tokens < max_tokens
        remedy = "the context or the tenant's limit holds no more" if full else "--max-tokens N for more"
        err.print(f"[dim](cut after {tokens or max_tokens} tokens; {remedy})[/dim]")


def _converse(
    client: Client, target: ClusterTarget, model: str, messages: list[pb.Message], params: ChatParams
) -> None:
    """Chat until the user enters an empty line or the input ends. Ctrl-C stops an answer, but not the chat."""
    out.print(f"[dim]chat with {escape(model)}; an empty line or Ctrl-D ends it, Ctrl-C stops an answer[/dim]")
    with target_errors(target):
        client.model(model)
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            terminal.write("\n")
            return
        if not question:
            return
        messages.append(pb.Message(role="user", content=question))
        stream = client.stream_chat(model, messages, **params)
        try:
            with target_errors(target):
                _print_stream(stream, params["max_tokens"])
        except typer.Exit as ended:
            if ended.exit_code != 130:
                messages.pop()
                continue
        messages.append(pb.Message(role="assistant", content=stream.text))
