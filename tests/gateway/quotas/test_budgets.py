"""Budget notices. Each notice is signed, retried, and delivered once by one gateway, even if the database or the
receiver is unreachable for a time."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import grpc
import pytest
from prometheus_client import generate_latest

from cluster.config.tenants import BudgetWebhook
from cluster.gateway.quotas.budgets import BudgetWatch
from cluster.ledger.store import Ledger
from cluster.ledger.usage.budget_notices import FIRST_PAUSE_S, LONGEST_PAUSE_S, retry_delay_s
from cluster.observe.metrics import Metrics
from cluster.policy.limits.budgets import BudgetUse, crossed, day_name
from cluster.policy.tenants.policy import TenantLimits, TenantPolicy
from cluster.wire.bundle import Bundle
from tests.ledger.samples import record
from tests.support import postgres
from tests.support.calls import Answer, complete
from tests.support.cluster import sim_engine
from tests.support.keyed import bearer, eventually, keyed_cluster

pytestmark = pytest.mark.slow

SECRET = b"w" * 32
NOON = 1_795_608_000.0


class Receiver:
    """A web server that records requests and answers each request with `status`."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.status = 204
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(receiver.status)
                if receiver.status == 302:
                    self.send_header("location", "http://127.0.0.1:1/elsewhere")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/hook"

    @property
    def notices(self) -> list[tuple[str, str, float]]:
        """Tenant, budget and threshold of each received notice."""
        bodies = [json.loads(body) for _, body in self.got]
        return sorted((one["tenant"], one["budget"], one["threshold"]) for one in bodies)

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Provide a web server on loopback."""
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """Provide a SQLite ledger with its tables."""
    made = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    made.upgrade()
    yield made
    made.close()


class Clock:
    """The wall clock of a budget watch."""

    def __init__(self) -> None:
        self.now_s = NOON

    def __call__(self) -> float:
        return self.now_s


def watch_of(ledger: Ledger, receiver: Receiver, clock: Clock, *thresholds: float) -> BudgetWatch:
    """Return a gateway's budget watch for a tenant with 1000 tokens a day and 10,000 tokens a month."""
    policy = TenantPolicy("acme", limits=TenantLimits(daily_tokens=1000, monthly_tokens=10_000))
    webhook = BudgetWebhook(url=receiver.url, secret_file=Path("unread"), thresholds=thresholds or (0.8, 1.0))
    return BudgetWatch(
        "test", ledger, lambda: [policy], Metrics("test"), lambda *_: None, webhook=webhook, secret=SECRET, wall=clock
    )


def use(ledger: Ledger, name: str, tokens: int, at_s: float = NOON) -> None:
    """Record an ended call of the tenant `name` with this number of tokens."""
    ledger.usage.insert([record(name, opened_at_s=at_s, prompt_tokens=tokens, cached_tokens=0, completion_tokens=0)])


def test_each_threshold_once_a_period(ledger: Ledger, receiver: Receiver) -> None:
    """Each threshold of a daily budget (80 %, 100 %) causes at most one notice a day. On the next day it can cause a
    notice again. The thresholds of a monthly budget cause separate notices."""
    clock = Clock()
    watch = watch_of(ledger, receiver, clock)
    watch.check()
    assert receiver.notices == []
    use(ledger, "1", 800)
    watch.check()
    watch.check()
    assert receiver.notices == [("acme", "daily_tokens", 0.8)]
    use(ledger, "2", 150)
    watch.check()
    assert len(receiver.notices) == 1
    use(ledger, "3", 60)
    watch.check()
    assert receiver.notices == [("acme", "daily_tokens", 0.8), ("acme", "daily_tokens", 1.0)]
    assert {(t, b): ratio for _, (t, b), ratio in watch.gauges()} == {
        ("acme", "daily_tokens"): 1.01,
        ("acme", "monthly_tokens"): 0.101,
    }
    clock.now_s += 86_400
    use(ledger, "4", 900, clock.now_s)
    watch.check()
    assert len(receiver.notices) == 3
    use(ledger, "5", 6200, clock.now_s)
    watch.check()
    assert receiver.notices.count(("acme", "monthly_tokens", 0.8)) == 1


async def test_one_error_does_not_end_the_checks(ledger: Ledger) -> None:
    """After an unexpected error in a check or in the receiver of the sums, the next check runs and reports the sums."""
    policy = TenantPolicy("acme", limits=TenantLimits(daily_tokens=1000))
    use(ledger, "1", 70)
    problems = ["in the policies", "in the receiver", ""]
    sums: asyncio.Queue[Mapping[str, int]] = asyncio.Queue()

    def policies() -> list[TenantPolicy]:
        if problems[0] == "in the policies":
            raise RuntimeError(problems.pop(0))
        return [policy]

    def on_sums(today: Mapping[str, int], month: Mapping[str, int], now_s: float) -> None:
        if problems[0] == "in the receiver":
            raise RuntimeError(problems.pop(0))
        sums.put_nowait(today)

    watch = BudgetWatch("test", ledger, policies, Metrics("test"), on_sums, interval_s=0.01, wall=Clock())
    running = asyncio.create_task(watch.run())
    try:
        assert await asyncio.wait_for(sums.get(), 30) == {"acme": 70}
    finally:
        running.cancel()


def test_what_is_told_and_its_signature(ledger: Ledger, receiver: Receiver) -> None:
    """The body of a notice names tenant, budget, use and limit, and contains no secret. The signature matches only this
    secret, time and body."""
    use(ledger, "1", 820)
    watch_of(ledger, receiver, Clock()).check()
    ((headers, body),) = receiver.got
    notice = json.loads(body)
    assert notice | {"id": ""} == {
        "id": "",
        "event": "budget.threshold",
        "cluster": "test",
        "tenant": "acme",
        "budget": "daily_tokens",
        "period": day_name(NOON),
        "threshold": 0.8,
        "used_tokens": 820,
        "limit_tokens": 1000,
        "noticed_at": "2026-11-25T12:00:00+00:00",
        "attempt": 1,
    }
    assert headers["x-headrace-id"] == notice["id"]
    stamp, sent = (part.split("=")[1] for part in headers["x-headrace-signature"].split(","))
    assert int(stamp) == NOON
    assert sent == hmac.new(SECRET, f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()
    assert SECRET not in body + str(headers).encode()


@pytest.mark.parametrize("status", [500, 429, 302])
def test_a_receiver_that_fails_is_asked_again(ledger: Ledger, receiver: Receiver, status: int) -> None:
    """Delivery of a notice is retried with growing pauses and the same id until delivery succeeds. Redirects are not
    followed."""
    clock = Clock()
    watch = watch_of(ledger, receiver, clock, 0.8)
    use(ledger, "1", 900)
    receiver.status = status
    watch.check()
    watch.check()
    assert len(receiver.got) == 1, "not at once"
    clock.now_s += FIRST_PAUSE_S
    watch.check()
    clock.now_s += FIRST_PAUSE_S
    watch.check()
    assert len(receiver.got) == 2, "the second pause is longer"
    receiver.status = 200
    clock.now_s += 2 * FIRST_PAUSE_S
    watch.check()
    clock.now_s += LONGEST_PAUSE_S
    watch.check()
    assert [json.loads(body)["attempt"] for _, body in receiver.got] == [1, 2, 3]
    assert len({headers["x-headrace-id"] for headers, _ in receiver.got}) == 1


def test_pauses_grow_to_an_hour() -> None:
    """The delivery of a budget notice is retried without limit. The pauses between the retries grow to an hour."""
    assert [retry_delay_s(n) for n in (1, 2, 3)] == [15.0, 30.0, 60.0]
    assert retry_delay_s(10_000) == LONGEST_PAUSE_S


def test_many_gateways_tell_once(ledger: Ledger, receiver: Receiver, tmp_path: Path) -> None:
    """If eight gateways find a crossed budget threshold at the same moment, one notice is sent in total."""
    use(ledger, "1", 820)
    ledgers = [Ledger(f"sqlite:///{tmp_path / 'ledger.db'}") for _ in range(8)]
    watches = [watch_of(one, receiver, Clock()) for one in ledgers]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            list(pool.map(BudgetWatch.check, watches))
    for one in ledgers:
        one.close()
    assert receiver.notices == [("acme", "daily_tokens", 0.8)]


def test_a_gateway_that_dies_in_a_try_delays_it(ledger: Ledger, receiver: Receiver) -> None:
    """If a gateway has claimed a notice and not sent it, another gateway sends it after the retry pause."""
    clock = Clock()
    use(ledger, "1", 820)
    found = BudgetUse("acme", "daily_tokens", day_name(NOON), 820, 1000)
    ledger.notices.insert_new(crossed([found], [0.8]), NOON)
    assert len(ledger.notices.claim_due(NOON)) == 1
    watch = watch_of(ledger, receiver, clock, 0.8)
    watch.check()
    assert receiver.got == []
    clock.now_s += FIRST_PAUSE_S
    watch.check()
    assert receiver.notices == [("acme", "daily_tokens", 0.8)]


def test_a_database_that_is_away_loses_no_notice(receiver: Receiver) -> None:
    """While the database is down, nothing is sent and the last ratio of use is kept. Thresholds that are crossed
    meanwhile cause notices afterwards."""
    with postgres.running() as server:
        ledger = Ledger(server.new_database())
        ledger.upgrade()
        watch = watch_of(ledger, receiver, Clock())
        use(ledger, "1", 500)
        assert watch.check() is not None
        use(ledger, "2", 400)
        server.kill()
        assert watch.check() is None
        assert receiver.got == []
        assert [ratio for _, (_, budget), ratio in watch.gauges() if budget == "daily_tokens"] == [0.5]
        server.start()
        assert watch.check() is not None
        assert receiver.notices == [("acme", "daily_tokens", 0.8)]
        ledger.close()


def test_an_erased_tenant_leaves_no_notice(ledger: Ledger, receiver: Receiver) -> None:
    """The notices of an erased tenant are erased. Notices of long past periods are deleted."""
    ledger.tenants.create(TenantPolicy("acme"))
    use(ledger, "1", 820)
    watch_of(ledger, receiver, Clock()).check()
    assert ledger.erase("acme") == 3
    assert ledger.notices.claim_due(NOON + 10 * LONGEST_PAUSE_S) == []


@pytest.mark.slow
@pytest.mark.thorough
async def test_a_real_gateway_tells(tmp_path: Path, checkpoint: Path, bundle: Bundle, receiver: Receiver) -> None:
    """A gateway reports a tenant that has used more than half of its budget, even while the store of shared
    limits is down.

    The metric shows the used share, and the operator's server gets a notice. A new gateway on the same ledger
    knows how much is used.
    """
    (tmp_path / "hook").write_text("h" * 32)
    more = (
        f"observe: {{budget_webhook: {{url: '{receiver.url}', secret_file: {tmp_path / 'hook'}, thresholds: [0.5]}}}}\n"
        f"store: {{database_url: 'sqlite:///{tmp_path / 'ledger.db'}', limits_url: 'redis://127.0.0.1:1'}}\n"
    )
    async with keyed_cluster(tmp_path, more) as keyed:
        await keyed.cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
        key = await keyed.key("acme", limits={"daily_tokens": 100})
        request = complete(max_tokens=60, ignore_eos=True)
        await keyed.cluster.stub.Complete(request, metadata=bearer(key))

        async def delivered() -> bool:
            return bool(receiver.got)

        await eventually(delivered, "the operator's server has the notice", timeout_s=30)
        exposed = generate_latest(keyed.gateway.metrics.registry).decode()
        line = next(one for one in exposed.splitlines() if one.startswith("headrace_budget_used_ratio{"))
        assert 'tenant="acme"' in line
        assert 0.6 <= float(line.split()[-1]) < 1
        assert receiver.notices == [("acme", "daily_tokens", 0.5)]
    local = more.replace(", limits_url: 'redis://127.0.0.1:1'", "")
    async with keyed_cluster(tmp_path, local) as keyed:
        await keyed.cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)

        async def refused_now() -> bool:
            try:
                await keyed.cluster.stub.Complete(request, metadata=bearer(key))
            except grpc.aio.AioRpcError as error:
                return Answer(error).reason == "BUDGET_EXHAUSTED"
            return False

        await eventually(refused_now, "the spent budget is known")
        assert len(receiver.got) == 1
