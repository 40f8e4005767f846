"""Commands for callers of pooling models: embed, rerank."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cluster.cli.commands.chat import ModelArgument
from cluster.cli.common import (
    USAGE,
    JsonOption,
    TimeoutOption,
    fail,
    make_client,
    out,
    print_json,
    target_errors,
)
from cluster.cli.target.contexts import ClusterTarget
from cluster.cli.target.target_options import with_target

SHOWN_VALUES = 6
SHOWN_CHARS = 60
TEXTS_A_CALL = 256
"""Number of texts in one call of `embed`. Their vectors of 4,096 values fit into the largest message of a client."""
TruncateOption = Annotated[bool, typer.Option("--truncate", help="Cut longer texts instead of refusing them.")]


@with_target
def embed(
    target: ClusterTarget,
    model: ModelArgument,
    texts: Annotated[list[str], typer.Argument(help="The texts; - reads one text a line.", show_default=False)],
    dimensions: Annotated[
        int | None, typer.Option("--dimensions", help="Length of the vectors.", show_default="the model's")
    ] = None,
    truncate: TruncateOption = False,
    timeout_s: TimeoutOption = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Print the vectors of texts."""
    texts = _texts(texts)
    with make_client(target, timeout_s) as client, target_errors(target):
        answers = [
            client.embed(model, texts[at : at + TEXTS_A_CALL], dimensions=dimensions, truncate=truncate)
            for at in range(0, len(texts), TEXTS_A_CALL)
        ]
    vectors = [vector for answer in answers for vector in answer]
    if as_json:
        rounded = [[float(f"{value:.9g}") for value in vector] for vector in vectors]
        prompt_tokens = sum(answer.usage.prompt_tokens for answer in answers)
        print_json({"model": answers[0].model, "embeddings": rounded, "prompt_tokens": prompt_tokens})
        return
    table = Table("text", "values", "vector", box=None, pad_edge=False)
    for text, vector in zip(texts, vectors, strict=True):
        shown = " ".join(f"{value:+.4f}" for value in vector[:SHOWN_VALUES])
        more = " ..." if len(vector) > SHOWN_VALUES else ""
        table.add_row(escape(_short(text)), str(len(vector)), shown + more)
    out.print(table)


@with_target
def rerank(
    target: ClusterTarget,
    model: ModelArgument,
    query: Annotated[str, typer.Argument(help="The query.", show_default=False)],
    documents: Annotated[
        list[str], typer.Argument(help="The documents; - reads one document a line.", show_default=False)
    ],
    top_n: Annotated[int, typer.Option("--top-n", help="Print only the best so many; 0: all.", min=0)] = 0,
    truncate: TruncateOption = False,
    timeout_s: TimeoutOption = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Print documents by relevance to a query, the best first."""
    documents = _texts(documents)
    with make_client(target, timeout_s) as client, target_errors(target):
        answer = client.rerank(model, query, documents, top_n=top_n, truncate=truncate)
    if as_json:
        results = [
            {"index": result.index, "score": float(f"{result.score:.9g}"), "document": documents[result.index]}
            for result in answer
        ]
        print_json({"model": answer.model, "results": results, "prompt_tokens": answer.usage.prompt_tokens})
        return
    table = Table("score", "index", "document", box=None, pad_edge=False)
    for result in answer:
        table.add_row(f"{result.score:+.4f}", str(result.index), escape(_short(documents[result.index])))
    out.print(table)


def _texts(given: list[str]) -> list[str]:
    """Return the texts of the arguments. If the only argument is `-`, return the lines of standard input instead. The
    n-th answer belongs to the n-th line, so an empty line is an error."""
    if given != ["-"]:
        return given
    lines = [line.removesuffix("\r") for line in sys.stdin.read().removesuffix("\n").split("\n")]
    for number, line in enumerate(lines, 1):
        if not line:
            fail(f"line {number} of standard input is empty: give one text a line, and remove empty lines", USAGE)
    return lines


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "..."
