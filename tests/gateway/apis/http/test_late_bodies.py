"""Request bodies that arrive long after their heads: the caller is authenticated once more when they are complete."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from cluster.gateway.apis.http.calls import LATE_BODY_S
from tests.support.http import Wire, chat_body
from tests.support.keyed import eventually, keyed_cluster

pytestmark = pytest.mark.slow


async def test_a_revoked_key_opens_no_call_with_a_late_body(tmp_path: Path) -> None:
    """A request whose key is revoked while its body arrives is refused, as a new request with the key is."""
    async with keyed_cluster(tmp_path) as keyed:
        key = await keyed.key("acme")
        body = json.dumps(chat_body()).encode() + b" " * 200
        wire = await Wire.open(keyed.cluster)
        headers = {"content_type": "application/json", "authorization": f"Bearer {key}"}
        wire.ask("/v1/chat/completions", body[:-100], **headers, content_length=str(len(body)))
        await asyncio.sleep(LATE_BODY_S)
        (row,) = keyed.ledger.keys.list("acme")
        keyed.ledger.keys.revoke("acme", row.id)
        keyed.door.refresh()

        async def refused() -> bool:
            return (await keyed.fetch("/v1/models", key=key)).status == 401

        await eventually(refused, "the gateway knows that the key is revoked")
        wire.writer.write(body[-100:])
        assert (await wire.reply()).status == 401
        await wire.close()
