"""Invalid models in the configuration. The gateway serves its last catalog, reports the errors, and checks the file
again."""

from __future__ import annotations

import asyncio
import urllib.request
from functools import partial
from pathlib import Path

import pytest

from cluster.api.types import CatalogEntry, ModelState
from cluster.gateway.config_state import ConfigState
from cluster.gateway.models.directory import ModelDirectory
from cluster.v1 import inference_pb2 as pb
from tests.support.cluster import LOOPBACK, until
from tests.support.gateway_process import gateway_process

WRONG = LOOPBACK + '  - {name: sim, source: "sim:///elsewhere"}\n'


async def no_bundle(_: str) -> object:
    """Raise LookupError: the gateway can fetch no bundle in this test."""
    raise LookupError


@pytest.mark.slow
async def test_a_gateway_with_wrong_models_serves_its_last_catalog(tmp_path: Path) -> None:
    """A gateway with an invalid configuration file starts and serves its last catalog. If it did not start, a wrong
    file would end one gateway after another, each at its next restart."""
    folder = tmp_path / "gateway"
    ModelDirectory(folder, no_bundle).apply_catalog([CatalogEntry("m", ("default",), state=ModelState.READY)])  # type: ignore[arg-type]
    async with gateway_process(folder, WRONG) as process:
        answer = await process.stub.ListModels(pb.ListModelsRequest(), timeout=60)
        assert [(one.name, list(one.aliases)) for one in answer.models] == [("m", ["default"])]
        url = f"http://{process.endpoints['metrics']}/metrics"
        page = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=60).read().decode())
        (line,) = (one for one in page.splitlines() if one.startswith("headrace_config_valid{"))
        assert line.endswith(" 0.0")


def seen(state: ConfigState, valid: bool) -> bool:
    """Return whether the reported state of the file equals `valid`."""
    return state.valid is valid


async def test_a_file_that_becomes_wrong_is_seen_before_a_restart(tmp_path: Path) -> None:
    """A configuration file that becomes invalid, or valid again, is reported without a restart. An alarm at the next
    restart would be too late."""
    file = tmp_path / "cluster.yaml"
    file.write_text(LOOPBACK)
    state = ConfigState(file, look_s=0.01)
    watching = asyncio.create_task(state.watch())
    try:
        assert state.valid
        for text, valid in ((WRONG, False), (LOOPBACK, True), ("gateway: [", False)):
            (draft := tmp_path / "new").write_text(text)
            draft.replace(file)
            await until(partial(seen, state, valid), "the change is seen")
    finally:
        watching.cancel()
