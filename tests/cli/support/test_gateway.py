"""A support bundle of a real gateway has the gateway's state and decisions, but no secrets and no prompts."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from cluster.admin.v1 import admin_pb2
from tests.support.admin import AdminClient, role_key, until_known
from tests.support.calls import chat
from tests.support.checkpoints import build_checkpoint
from tests.support.cluster import bundle_of, sim_engine
from tests.support.keyed import PEPPER, SECRET, bearer, keyed_cluster
from tests.support.shell import headrace

PROMPT = "The password of the vault is swordfish"


@pytest.mark.slow
async def test_a_bundle_of_a_real_gateway(tmp_path: Path) -> None:
    """The bundle has state, routes, metrics and configuration, but no keys, secrets or prompts.

    With --hash-names, the names of tenants are hashed.
    """
    checkpoint = build_checkpoint("llama", tmp_path / "llama")
    async with keyed_cluster(tmp_path / "gateway", "tenants: [{name: fixed, log_prompts: true}]\n") as keyed:
        await keyed.cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle_of(checkpoint))
        key = await keyed.key("acme")
        answer = await keyed.cluster.stub.Chat(chat(PROMPT, max_tokens=5), metadata=bearer(key))
        operator, endpoints = await role_key(keyed.ledger, "ops", "operator"), keyed.gateway.endpoints
        async with AdminClient(endpoints["admin"], operator) as client:
            await until_known(client, "Fleet.GetOverview", admin_pb2.GetOverviewRequest())
        key_file, target = tmp_path / "key", tmp_path / "bundle.tar.gz"
        key_file.write_text(operator)
        done = await asyncio.to_thread(
            headrace, "support-bundle", "-o", str(target), "-f", str(keyed.file), "--admin", endpoints["admin"],
            "--api-key-file", str(key_file), "--metrics", endpoints["metrics"], "--hash-names",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = gzip.decompress(target.read_bytes())
    for text in (key, operator, SECRET, PEPPER, "swordfish", "acme"):
        assert text.encode() not in data
    files: dict[str, Any] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for entry in archive:
            opened = archive.extractfile(entry)
            assert opened is not None
            name, text = entry.name.partition("/")[2], opened.read().decode()
            files[name] = json.loads(text) if name.endswith(".json") else text
    (call,), (explained,) = files["overview.json"]["calls"], files["routing.json"]
    assert call["id"] == explained["id"] == answer.id
    assert call["tenant"] == explained["tenant"]
    assert call["tenant"].startswith("tenant-")
    assert f'tenant="{call["tenant"]}"' in files["metrics-0.prom"]
    assert files["configuration.json"]["auth"]["cluster_secret_file"].endswith("secret")
    assert "scaling.json" in {each["name"] for each in files["manifest.json"]["left_out"]}, "no controller has answered"
