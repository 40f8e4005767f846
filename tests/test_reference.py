"""Tests that docs/reference agrees with the code. `make reference` writes these pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config.schema import Config
from scripts import reference

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", sorted(reference.PAGES))
def test_pages_are_current(name: str) -> None:
    """Each page is equal to the page that the code generates."""
    page = reference.FOLDER / f"{name}.md"
    assert page.read_text() == reference.PAGES[name](), f"{page} is stale: run `{reference.COMMAND}` and commit it"


def test_a_stale_page_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If a page differs from the code, `--check` reports the page and the command that writes the page. It changes no
    file."""
    assert reference.main([], tmp_path) == 0
    assert reference.main(["--check"], tmp_path) == 0
    stale = tmp_path / "errors.md"
    stale.write_text("old")
    assert reference.main(["--check"], tmp_path) == 1
    assert capsys.readouterr().err == f"{stale}: differs from the code; run `make reference`\n"
    assert stale.read_text() == "old"


def test_every_key_is_described() -> None:
    """Each configuration key has a description."""
    assert [key for key, *_, text in reference.keys(Config) if not text] == []


def test_every_error_says_what_to_do() -> None:
    """The docstring of each error has two sentences: the meaning and the remedy."""
    rows = [line for line in reference.errors().splitlines() if line.startswith("| `")]
    assert rows
    assert [row for row in rows if row.endswith("|  |")] == []


@pytest.mark.parametrize("name", sorted(reference.PAGES))
def test_make_reference_is_named(name: str) -> None:
    """Each page names the command that writes it, and the Makefile has that command."""
    assert f"`{reference.COMMAND}`" in (reference.FOLDER / f"{name}.md").read_text()
    target = reference.COMMAND.removeprefix("make ")
    assert f"\n{target}: setup ## " in (reference.FOLDER.parents[1] / "Makefile").read_text()
