"""The installation of the test suites that the client libraries publish (`make suites`)."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest

from scripts import suites


def test_every_source_package_is_pinned() -> None:
    """`suites.pin` returns the pin of each source package: one line with the version and the hashes of its files. It
    raises LookupError for a package without a pin."""
    pins = suites.PINS.read_text()
    for name in suites.SOURCES:
        assert re.fullmatch(rf"{name}==[\d.]+( --hash=sha256:[0-9a-f]{{64}})+", suites.pin(name, pins))
    with pytest.raises(LookupError, match="has no nothing"):
        suites.pin("nothing", pins)


def test_a_source_package_is_unpacked_under_the_librarys_name(tmp_path: Path) -> None:
    """`unpack` extracts the single top folder of an archive to the given path."""
    made = tmp_path / "lib-1.0" / "tests"
    made.mkdir(parents=True)
    (made / "test_it.py").write_text("x = 1\n")
    archive = tmp_path / "lib-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(made.parent, "lib-1.0")
    suites.unpack(archive, tmp_path / "lib")
    assert (tmp_path / "lib" / "tests" / "test_it.py").read_text() == "x = 1\n"
    assert not (tmp_path / "lib.new").exists()


@pytest.mark.parametrize("name", ["openai", "anthropic", "langchain-tests", "langchain-openai", "langchain-anthropic"])
def test_the_page_names_the_pinned_versions(name: str) -> None:
    """docs/api.md names the version of each library whose tests run."""
    version = suites.pin(name, suites.PINS.read_text()).split(" ")[0].partition("==")[2]
    page = " ".join((suites.ROOT / "docs" / "api.md").read_text().split())
    assert f"{name} {version}" in page
