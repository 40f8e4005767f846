"""No command prints control characters of untrusted texts on an operator's terminal."""

from __future__ import annotations

import ast
import json
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from typer.testing import Result

from cluster.cli import terminal
from cluster.cli.base import fail
from cluster.cli.commands.operate.status import worker_table
from cluster.cli.common import SafeConsole, print_json
from cluster.ledger.audit.audit import AuditEvent
from cluster.ledger.store import Ledger
from cluster.policy.tenants.policy import TenantPolicy
from tests.ledger.samples import record

Run = Callable[..., Result]
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b1A\u202e\ud800\r"
CLI = Path(terminal.__file__).parent
WRITES_ITSELF = {"terminal.py", "step_lines.py"}
"""Modules that write to the terminal directly: the module that escapes text, and the module that redraws lines."""


def unsafe(text: str) -> list[str]:
    """Return the control characters and surrogates in a text, except line ends and tabs."""
    rest = text.replace("\r\n", "")
    return [char for char in rest if unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t"]


@given(st.text(st.characters(exclude_categories=[])))
def test_no_control_character_is_left(text: str) -> None:
    """An escaped text contains no control character, so it cannot move the cursor or set the window's title."""
    assert unsafe(terminal.safe(text)) == []


@given(st.text(st.characters(exclude_categories=[])))
def test_json_means_the_same_to_a_program(text: str) -> None:
    """An escaped JSON text has the same value as the original text when parsed."""
    written = terminal.safe_json(json.dumps(text, ensure_ascii=False))
    assert json.loads(written) == text
    assert unsafe(written) == []


def test_plain_text_stays_as_it_is() -> None:
    """Texts in other languages, emoji, tabs and line ends are printed unchanged."""
    text = "naïve 日本語 עברית \U0001f469\u200d\U0001f4bb\n\tindent\r\n"
    assert terminal.safe(text) == text


def test_tables_and_lines_are_safe(capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters from workers and callers are escaped in tables, lines, JSON and error messages."""
    console = SafeConsole(highlight=False)
    table = Table("name", title=EVIL)
    table.add_row(EVIL)
    console.print(table)
    console.print(f"[red]{EVIL}[/red]")
    console.print(EVIL, markup=False)
    row = dict.fromkeys(("worker_id", "model", "state", "engine_path", "engine_path_reason"), EVIL)
    console.print(worker_table([{**row, "running": 0, "max_num_seqs": 1, "waiting": 0, "kv_usage": 0, "step_ms": 0}]))
    print_json({EVIL: EVIL})
    with pytest.raises(Exception, match="2"):
        fail(EVIL, 2)
    shown = capsys.readouterr()
    assert unsafe(shown.out) == []
    assert unsafe(shown.err) == []


@pytest.mark.slow
def test_the_ledgers_commands_are_safe(run: Run, tmp_path: Path) -> None:
    """Commands of the ledger escape control characters in token subjects, labels and names of tenants."""
    url, evil = f"sqlite:///{tmp_path / 'ledger.db'}", EVIL.replace("\ud800", "")
    ledger = Ledger(url, peppers=(b"p" * 32,))
    ledger.upgrade()
    ledger.tenants.create(TenantPolicy("acme", labels={"team": evil}))
    ledger.keys.create("acme", "k")
    ledger.usage.insert([record("a", tenant="acme", labels={"team": evil})])
    ledger.audit.insert(
        [AuditEvent(time.time(), "admin", "x", f"jwt:{evil}", "acme", evil, "ok", evil, evil, {"a": evil})]
    )
    ledger.close()
    for words in (
        ("audit",),
        ("audit", "--json"),
        ("keys", "list", "acme"),
        ("tenants", "get", "acme"),
        ("tenants", "list", "--json"),
        ("usage", "--group-by", "label:team"),
        ("usage", "--records", "--json"),
        ("tenants", "get", f"nobody{EVIL}"),
    ):
        done = run(*words, "--database-url", url)
        assert unsafe(done.stdout) == [], words
        assert unsafe(done.stderr) == [], words
        assert done.stdout + done.stderr, words


def test_every_command_prints_by_one_module() -> None:
    """Outside of terminal.py and step_lines.py, commands print only with functions that escape control characters, such
    as `out`, `err`, `fail` and `warn`. The only exception is the JSON of `prepare`, which is ASCII."""
    calls = []
    for file in sorted(CLI.rglob("*.py")):
        if file.name in WRITES_ITSELF:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name in ("print", "sys.stdout.write", "sys.stderr.write", "typer.echo", "typer.secho", "Console"):
                    calls.append(f"{file.name}:{node.lineno}: {ast.unparse(node)[:80]}")
    allowed = ("base.py", "processes.py")  # `fail` and `warn` escape messages; the JSON of `prepare` is ASCII
    assert [call for call in calls if not call.startswith(allowed)] == []
