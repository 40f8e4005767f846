"""The examples of docs/embeddings.md run unchanged, except for the addresses in them."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.all_commands import app
from cluster.gateway.calls.pooling.pooling_request import MAX_INPUTS
from tests.support.cluster import TestCluster
from tests.support.http import fetch

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "embeddings.md").read_text()


def blocks(language: str) -> list[str]:
    """Return the code blocks in `language` from the docs page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


async def test_the_python_examples_run(pooling: TestCluster) -> None:
    """Each Python example in the docs page about pooling runs, and its assertions hold."""
    found = blocks("python")
    assert len(found) >= 3
    for source in found:
        for port, name in (("8000", "http"), ("50051", "grpc")):
            source = source.replace(f"localhost:{port}", pooling.gateway.endpoints[name])
        await asyncio.to_thread(exec, compile(source, "docs/embeddings.md", "exec"), {})


async def test_the_commands_run(pooling: TestCluster, tmp_path: Path) -> None:
    """Each command line of the page succeeds. `headrace` runs as written, and `curl` is replaced by the request that it
    would send."""
    lines = [line for block in blocks("console") for line in re.split(r"^\$ ", block, flags=re.M) if line]
    assert len(lines) >= 5
    ran = 0
    for line in lines:
        if line.startswith("curl"):
            path, body = re.findall(r"localhost:8000(\S+) .* -d '(.*)'", line, re.S)[0]
            reply = await fetch(pooling, path, json.loads(body))
            assert reply.status == 200, reply.body
            assert reply.json["usage"]["prompt_tokens"] > 0
        else:
            words = [word for word in shlex.split(line.split("<")[0]) if word != "headrace"]
            done = await asyncio.to_thread(
                CliRunner().invoke,
                app,
                [*words, "--endpoint", pooling.gateway.endpoints["grpc"]],
                input="a cat\na dog\n" if "<" in line else None,
            )
            assert done.exit_code == 0, done.output
            if "a cat" not in done.output:
                answer = done.output[done.output.index("{\n") :]  # after a log line of the gateway in this process
                assert len(json.loads(answer)["embeddings"]) == 2
        ran += 1
    assert ran == len(lines)


def test_the_page_has_the_limit() -> None:
    """The docs page on pooling states the maximum number of inputs of a request."""
    assert f"{MAX_INPUTS:,} inputs" in PAGE
