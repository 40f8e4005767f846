"""Checks of docs/kubernetes.md: arithmetic, command lines, files and links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.all_commands import app
from tests.support import helm
from tests.support.helm import ROOT

DOCS = [ROOT / "docs" / name for name in ("kubernetes.md", "kubernetes-recipes.md", "migrate.md", "untested.md")]
NOTES = helm.CHART / "templates" / "NOTES.txt"
UTILIZATION, OVERHEAD_GIB, BYTES_A_VALUE = 0.92, 2, 2


def rows() -> list[list[str]]:
    """Return the rows of the table of model sizes, each as a list of cells."""
    table = DOCS[0].read_text().split("| model | parameters")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_sizes_follow_the_formula() -> None:
    """In docs/kubernetes.md, each row of the table of model sizes agrees with the formula above the table, within the
    table's rounding."""
    table = rows()
    assert len(table) >= 8
    for name, parameters, width, weights, shape, a_token, gpus, room, tokens in table:
        tensor, memory = re.fullmatch(r"(\d+) x \S+ (\d+)", gpus).groups()  # type: ignore[union-attr]
        layers, heads, dimension = map(int, shape.split(" x "))
        gib = float(parameters) * 1e9 * int(width) / 2**30
        kib = 2 * layers * heads * dimension * BYTES_A_VALUE / 1024
        kv_gib = UTILIZATION * int(memory) * int(tensor) - gib - OVERHEAD_GIB * int(tensor)
        assert weights == f"{gib:.1f}", name
        assert a_token == f"{kib:.0f}", name
        assert room == f"{kv_gib:.0f}", name
        assert tokens == f"{round(kv_gib * 2**20 / kib, -3):,.0f}", name


def command_lines() -> list[tuple[str, list[str]]]:
    """Return (file, words) of every documented `headrace ...` command line."""
    lines = []
    for file in (*DOCS, NOTES):
        for words in re.findall(r"(?:^|[\s`'>-])headrace ((?:[a-z-]+ ?)(?:[^`\n|'&]*))", file.read_text()):
            lines.append((file.name, words.split("{{")[0].split("...")[0].strip(" .,;:)")))
    known = []
    for name, words in lines:
        try:
            split = shlex.split(words.replace('"', "").replace("$", ""))
        except ValueError:
            continue
        if split and split[0] in {command.name for command in app.registered_commands} | GROUPS:
            known.append((name, split))
    return known


GROUPS = {group.name for group in app.registered_groups} | {"status", "chat", "usage"}


@pytest.mark.parametrize(
    ("file", "words"), command_lines(), ids=lambda value: value if isinstance(value, str) else " ".join(value)[:40]
)
def test_command_lines_are_known(file: str, words: list[str]) -> None:
    """Each command in the docs exists and has the options that the docs use."""
    path = [words[0]]
    if words[0] in {group.name for group in app.registered_groups} and len(words) > 1 and words[1].isalpha():
        path.append(words[1])
    shown = CliRunner().invoke(app, [*path, "--help"])
    assert shown.exit_code == 0, f"{file}: headrace {' '.join(words)}: {shown.output}"
    for option in (word for word in words if word.startswith("--")):
        assert option.split("=")[0] in shown.output, f"{file}: headrace {' '.join(words)}"


def test_enough_command_lines_were_seen() -> None:
    """`command_lines` finds the command lines in the docs, among them the six commands that this test lists."""
    commands = {" ".join(words[:2]) for _, words in command_lines()}
    assert {"pod secrets", "tenants create", "keys create", "chat default", "db upgrade", "import litellm"} <= commands


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_links_lead_somewhere(file: Path) -> None:
    """Every link to a file of this repository leads to an existing file."""
    for target in re.findall(r"\]\(([^)#]+)", file.read_text()):
        assert (file.parent / target).exists(), target
    for target in re.findall(r"`(tests/[\w/.]+|deploy/[\w/.-]+)`", file.read_text()):
        assert (ROOT / target).exists(), target
