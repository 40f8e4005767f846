"""Tests of the example deploy/tenants.yaml, with the commands in the comment at the beginning of that file. Secrets are
made once, keys can be created for the example's tenant and for a new tenant, and calls without a key are refused."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cluster.api.types import CatalogEntry, ModelState
from cluster.cli.commands.run.up import make_secrets
from cluster.cli.local.cluster import LocalCluster
from cluster.cli.local.run_folder import RunFolder
from cluster.config.document import load, parse
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from tests.support.calls import chat, refused
from tests.support.cluster import running_cluster, sim_engine
from tests.support.keyed import bearer, eventually
from tests.support.shell import headrace

pytestmark = pytest.mark.slow

FILE = Path(__file__).parents[3] / "deploy" / "tenants.yaml"
MODEL = "smollm2-135m-instruct"
PORTS = '{grpc: "127.0.0.1:0", http: "127.0.0.1:0", link: "127.0.0.1:0", admin: "127.0.0.1:0", metrics: "127.0.0.1:0"}'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the secrets and the ledger of these tests apart from the user's files."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.thorough
async def test_it_works_as_it_says(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """The tenant of the example file and a tenant created with the CLI can call the model with their keys, over the API
    and with the CLI. Calls without a key are refused."""
    text = FILE.read_text() + f"gateway: {{drain_timeout_s: 0, listen: {PORTS}}}\n"
    make_secrets(parse(text))
    async with running_cluster(tmp_path / "gateway", text) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle, model=MODEL)
        cluster.gateway.directory.apply_catalog(
            [CatalogEntry(name=MODEL, aliases=("default",), state=ModelState.READY)]
        )

        async def made(*arguments: str) -> str:
            done = await asyncio.to_thread(headrace, *arguments)
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        await made("tenants", "create", "lab")
        for tenant in ("acme", "lab"):
            key = await made("keys", "create", tenant)

            async def known(key: str = key) -> bool:
                models = cluster.stub.ListModels(pb.ListModelsRequest(), metadata=bearer(key))
                try:
                    return bool((await models).models)
                except Exception:  # not yet
                    return False

            await eventually(known, f"{tenant}'s key works")
            assert (await cluster.stub.Chat(chat(model="default"), metadata=bearer(key))).model == MODEL
            file = tmp_path / tenant
            file.write_text(key + "\n")
            place = ("--endpoint", cluster.gateway.endpoints["grpc"], "--api-key-file", str(file))
            assert await made("chat", "default", "Hello", "--max-tokens", "4", *place)
            assert MODEL in await made("models", *place)
        assert (await refused(cluster.stub.Chat(chat(model="default")))).reason == "UNAUTHENTICATED_KEY"
        nobody = await asyncio.to_thread(headrace, "models", "--endpoint", cluster.gateway.endpoints["grpc"])
        assert (nobody.returncode, "UNAUTHENTICATED_KEY" in nobody.stderr) == (1, True)


def test_secrets_are_made_once(cache: Path) -> None:
    """Existing secrets are kept, since every salt and every key depends on the secrets."""
    make_secrets(load(FILE))
    before = [(cache / name).read_bytes() for name in ("cluster-secret", "key-pepper")]
    make_secrets(load(FILE))
    assert [(cache / name).read_bytes() for name in ("cluster-secret", "key-pepper")] == before
    assert before[0] != before[1]


def test_the_parts_read_what_the_user_wrote() -> None:
    """`up` passes the user's configuration, including sections on tenants, to the processes that it starts."""
    config = load(FILE)
    assert parse(LocalCluster(config, RunFolder("tenants"), lambda text: None).config_text()).tenants == config.tenants
