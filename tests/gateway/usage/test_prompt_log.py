"""The prompt log. It holds only prompts of tenants whose policy asks for logging, for as long as the policy says."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cluster.gateway.usage.prompt_log import PromptLog
from cluster.observe.metrics import Metrics
from cluster.policy.tenants.policy import Retention, TenantPolicy
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from tests.support.calls import chat, complete
from tests.support.cluster import sim_engine
from tests.support.http import chat_body
from tests.support.keyed import Keyed, bearer, eventually, keyed_cluster

pytestmark = pytest.mark.slow

NOON = 1_795_608_000.0  # 2026-11-25
WORDS = "a sentence that nobody else says"


@pytest.fixture(scope="module")
async def keyed(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, bundle: Bundle) -> AsyncIterator[Keyed]:
    """Provide a gateway that requires API keys, with one worker."""
    async with keyed_cluster(tmp_path_factory.mktemp("prompts")) as keyed:
        await keyed.cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
        yield keyed


async def lines_of(keyed: Keyed, tenant: str, count: int) -> list[dict[str, Any]]:
    """Wait until `count` log lines of a tenant are written, and return these lines."""
    folder = keyed.file.parent / "gateway" / "prompts" / tenant
    found: list[dict[str, Any]] = []

    async def there() -> bool:
        found[:] = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
        return len(found) >= count

    await eventually(there, f"{count} calls of {tenant} are written")
    return found


async def test_prompt_and_output_of_a_tenant_that_wants_it(keyed: Keyed) -> None:
    """Prompts and outputs of calls over gRPC and HTTP are logged with request id and outcome. API keys in the texts are
    hidden, and only the owner can read the files."""
    key = await keyed.key("wants-it", log_prompts=True)
    answer = await keyed.cluster.stub.Chat(chat(WORDS), metadata=bearer(key))
    await keyed.cluster.stub.Complete(complete(f"{WORDS} {key}"), metadata=bearer(key))
    reply = await keyed.fetch("/v1/chat/completions", chat_body(), key=key)
    assert reply.status == 200
    lines = await lines_of(keyed, "wants-it", 3)
    assert lines[0]["prompt"] == [{"role": "user", "content": WORDS}]
    assert lines[0]["outputs"] == [
        {"index": 0, "text": answer.choices[0].message.content, "finish_reason": answer.choices[0].finish_reason}
    ]
    assert (lines[0]["outcome"], lines[0]["tenant"]) == ("ok", "wants-it")
    assert lines[1]["prompt"] == f"{WORDS} [hidden]"
    (file,) = (keyed.file.parent / "gateway" / "prompts" / "wants-it").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert key not in file.read_text()


async def test_of_all_others_no_byte_rests_anywhere(keyed: Keyed, capfd: pytest.CaptureFixture[str]) -> None:
    """If a tenant has no prompt log, the text of its calls, even of failed ones, is in no file of the gateway, the
    ledger or the spool, and in no log line."""
    key = await keyed.key("says-nothing")
    rare = "zanzibarquokka"
    await keyed.cluster.stub.Chat(chat(rare), metadata=bearer(key))
    for body in (chat_body(temperature=9), chat_body(model=rare), {"model": "sim", "messages": rare}):
        assert (await keyed.fetch("/v1/chat/completions", body | {"user": rare}, key=key)).status >= 400
    request = pb.CompleteRequest(model="sim", prompt=rare, max_tokens=2, stop=[rare])
    await keyed.cluster.stub.Complete(request, metadata=bearer(key))
    await keyed.cluster.until_idle()
    written = [path for path in keyed.file.parent.rglob("*") if path.is_file()]
    assert len(written) > 3
    assert not [path for path in written if rare.encode() in path.read_bytes()]
    printed = capfd.readouterr()
    assert rare not in printed.out + printed.err


def test_what_is_too_old_goes(tmp_path: Path) -> None:
    """Files are removed after the tenant's retention, or after the cluster's retention if the tenant has none. All
    files of an erased tenant are removed."""
    policies = {
        "plain": TenantPolicy("plain", log_prompts=True),
        "short": TenantPolicy("short", log_prompts=True, retention=Retention(prompts_days=1)),
        "off": TenantPolicy("off"),
    }
    for tenant in (*policies, "gone"):
        (tmp_path / tenant).mkdir()
        for day in ("2026-10-01", "2026-11-23", "2026-11-24", "2026-11-25"):
            (tmp_path / tenant / f"{day}.jsonl").write_text("{}\n")
    PromptLog(tmp_path, lambda: policies, 30, Metrics("t"), lambda: NOON).sweep()
    left = {folder.name: sorted(file.stem for file in folder.iterdir()) for folder in tmp_path.iterdir()}
    newest = ["2026-11-23", "2026-11-24", "2026-11-25"]
    assert left == {"plain": newest, "short": newest[1:], "off": newest}


async def test_a_disk_that_cannot_be_written_stops_no_call(keyed: Keyed) -> None:
    """If the disk cannot be written, calls are still answered, and the lost log entries are counted."""
    key = await keyed.key("no-disk", log_prompts=True)
    folder = keyed.file.parent / "gateway" / "prompts"
    folder.mkdir(exist_ok=True)
    (folder / "no-disk").write_text("a file where a folder must be")
    await keyed.cluster.stub.Chat(chat(WORDS), metadata=bearer(key))

    async def counted() -> bool:
        families = {family.name: family for family in keyed.gateway.metrics.collect()}
        return any(sample.value >= 1 for sample in families["headrace_prompt_log_lost"].samples)

    await eventually(counted, "the loss is counted")
    os.unlink(folder / "no-disk")
