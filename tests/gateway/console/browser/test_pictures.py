"""The pictures of docs/console.md: the script can make them, they are small, and all are used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image
from playwright.async_api import Browser

from cluster.wire.bundle import Bundle
from scripts import console_screenshots

pytestmark = [pytest.mark.slow, pytest.mark.needs("chromium")]

ROOT = Path(__file__).resolve().parents[4]
MOST_BYTES = 100_000
NAMES = ("fleet",)


@pytest.mark.thorough
async def test_pictures_are_made(browser: Browser, checkpoint: Path, bundle: Bundle, tmp_path: Path) -> None:
    """The script that makes the pictures in docs/console works. A new picture has the same size in pixels as the
    picture in that folder, and more than 20 colours, so the page is not empty. Only one picture is made here, because
    of the time limit of a test."""
    await console_screenshots.take(browser, checkpoint, bundle, tmp_path, NAMES)
    for name in NAMES:
        made, kept = (Image.open(folder / f"{name}.png") for folder in (tmp_path, console_screenshots.FOLDER))
        assert made.size == kept.size
        assert len(made.convert("RGB").getcolors() or ()) > 20, "an empty page has few colours"


def test_pictures_are_used() -> None:
    """Each picture is small and is shown or linked in docs/console.md. README shows one of them."""
    used = set(re.findall(r"\(console/(\w+\.png)\)", (ROOT / "docs" / "console.md").read_text()))
    files = {file.name: file.stat().st_size for file in console_screenshots.FOLDER.iterdir()}
    assert files.keys() == used
    assert all(size < MOST_BYTES for size in files.values())
    assert len(re.findall(r"\(docs/console/(\w+\.png)\)", (ROOT / "README.md").read_text())) == 1
