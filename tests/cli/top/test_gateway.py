"""The command `top` shows the overview of a real gateway, limited to what the caller's role may see."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.admin.v1 import admin_pb2
from tests.support.admin import AdminClient, role_key, until_known
from tests.support.calls import chat
from tests.support.checkpoints import build_checkpoint
from tests.support.cluster import bundle_of, sim_engine
from tests.support.keyed import bearer, keyed_cluster
from tests.support.shell import headrace


@pytest.mark.slow
async def test_top_of_a_real_gateway(tmp_path: Path) -> None:
    """An operator sees a tenant's call and its worker. The tenant's administrator sees the call without the worker.

    With a wrong key the exit code is 1.
    """
    checkpoint = build_checkpoint("llama", tmp_path / "llama")
    async with keyed_cluster(tmp_path / "gateway") as keyed:
        await keyed.cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle_of(checkpoint))
        key = await keyed.key("acme")
        await keyed.cluster.stub.Chat(chat(max_tokens=5), metadata=bearer(key))
        admin = keyed.gateway.endpoints["admin"]
        found: dict[str, Any] = {}
        for role in ("operator", "tenant_admin"):
            role_file = tmp_path / role
            role_file.write_text(await role_key(keyed.ledger, "acme", role))
            async with AdminClient(admin, role_file.read_text()) as client:
                await until_known(client, "Fleet.GetOverview", admin_pb2.GetOverviewRequest())
            at = ("top", "--admin", admin, "--api-key-file", str(role_file))
            done = await asyncio.to_thread(headrace, *at, "--json")
            assert done.returncode == 0, done.stderr
            found[role] = json.loads(done.stdout)
            text = (await asyncio.to_thread(headrace, *at)).stdout
            assert found[role]["calls"][0]["id"] in text
        (worker,), (call,) = found["operator"]["workers"], found["operator"]["calls"]
        assert (worker["state"], call["tenant"], call["worker"]) == ("READY", "acme", worker["id"])
        assert [row["tenant"] for row in found["tenant_admin"]["calls"]] == ["acme"]
        assert worker["id"] not in json.dumps(found["tenant_admin"])
        (tmp_path / "wrong").write_text("hr_x_y")
        done = await asyncio.to_thread(headrace, "top", "--admin", admin, "--api-key-file", str(tmp_path / "wrong"))
        assert (done.returncode, done.stdout) == (1, "")
