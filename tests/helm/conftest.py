"""Fixtures that require Helm and render every preset once."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.support import helm
from tests.support.helm import Rendered


@pytest.fixture(scope="session", autouse=True)
def needs_helm() -> None:
    """Skip all tests of this folder if Helm is absent."""
    try:
        helm.tool("helm")
    except helm.NoHelm as error:
        pytest.skip(str(error))


@functools.cache
def _rendered(preset: Path) -> Rendered:
    return helm.template(preset)


@pytest.fixture(params=helm.PRESETS, ids=lambda file: file.stem)
def preset(request: pytest.FixtureRequest) -> Rendered:
    """Each rendered preset in turn."""
    return _rendered(request.param)
