"""A gateway with two toy models, for all tests of this folder. The first model has every model name that the suites
use."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import pytest

from cluster.api.types import CatalogEntry, ModelState
from cluster.worker.parsing.kit import KitSettings, load_kit
from cluster.worker.parsing.output_parser import OutputParser
from cluster.worker.parsing.port import ParserNames
from loadtests.agents import prepare
from loadtests.agents.scripted import ScriptedEngine
from tests.suites.runs import MISSING, is_installed
from tests.suites.toy_model import FAMILY, ToyScripts
from tests.support.cluster import TestCluster, bundle_of, running_cluster
from tests.worker.parsing.hosts import thread_host

MODEL, OTHER = "toy", "another-toy"
ALIASES = ("gpt-6-astra", "gpt-3.5-turbo-instruct", "claude-opus-5-5", "model_id")
"""The names that the suites use, but for those of deprecated_models."""


@pytest.fixture(scope="session")
async def toy(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[TestCluster]:
    """Start a gateway with two models. The worker of each has a scripted engine, and vLLM's own parsers in a thread."""
    if not is_installed():
        pytest.skip(MISSING)
    folder = tmp_path_factory.mktemp("toy")
    tokenizer = prepare.write_model(FAMILY, folder / "model")
    names = ParserNames(FAMILY.tools, FAMILY.reasoning)
    kit = load_kit(KitSettings(str(folder / "model"), names))
    bundle = bundle_of(folder / "model")
    async with running_cluster(folder) as cluster:
        for model in (MODEL, OTHER):
            engine = ScriptedEngine(ToyScripts.of(tokenizer))
            parser = OutputParser(names, lambda: thread_host(kit))
            await cluster.add_worker(engine, bundle, model=model, parser=parser)
        name_model(cluster)
        yield cluster
        await cluster.until_idle()


def name_model(cluster: TestCluster, more: Sequence[str] = ()) -> None:
    """Give the first model all names that the suites use, and the names in `more`."""
    entries = [CatalogEntry(MODEL, (*ALIASES, *more), state=ModelState.READY), CatalogEntry(OTHER)]
    cluster.gateway.directory.apply_catalog(entries)
