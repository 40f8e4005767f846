"""Data that the console gets from other parts of a gateway: costs, limits, and explanations of scaling decisions."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cluster.admin.v1 import scaling_pb2
from cluster.api.outcomes import CallError, Outcome
from cluster.api.types import CatalogEntry
from cluster.gateway.console.build import _charger
from cluster.gateway.console.overview.parts import Limits, LimitUses
from cluster.gateway.console.overview.recent_calls import RecentCalls
from cluster.gateway.console.overview.scaling_reasons import MAX_ASKED, REFRESH_S, ScalingReasons
from cluster.gateway.models.known_model import KnownModel
from cluster.ledger.usage.records import UsageRecord
from cluster.policy.limits.budgets import BudgetUse
from cluster.policy.tenants.policy import TenantLimits, TenantPolicy
from cluster.wire.bundle import Bundle
from tests.support.calls import chat
from tests.support.cluster import sim_engine, until
from tests.support.keyed import bearer, keyed_cluster

RECORD = UsageRecord("r1", "acme", "k1", "sim", "v1", "q1", 0.0, "ok", gpu="H100", gpu_seconds=36.0)


def test_gpu_seconds_have_prices() -> None:
    """A record costs its GPU-seconds at the rate of its accelerator. Without a rate it costs nothing."""
    recent = RecentCalls(lambda: 0.0)
    charge = _charger(recent, {"H100": 100.0})
    charge(RECORD)
    assert recent.tenants["acme"].cost == recent.models["sim"].cost == 1.0
    charge(UsageRecord("r2", "acme", "k1", "sim", "v1", "q2", 0.0, "ok", gpu="L4", gpu_seconds=36.0))
    assert recent.tenants["acme"].cost == 1.0


async def test_each_ended_sequence_is_charged_once(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """With prices, the record of each ended sequence is charged once."""
    async with keyed_cluster(tmp_path, "cost: {currency: EUR, gpu_hour: {H100: 3.0}}\n") as keyed:
        accounting = keyed.gateway.dispatch.accounting
        assert accounting is not None
        assert accounting.on_record is not None
        seen: list[UsageRecord] = []
        accounting.on_record = seen.append
        await keyed.cluster.add_worker(sim_engine(checkpoint), bundle)
        key = await keyed.key("acme", models=["*"])
        await keyed.cluster.stub.Chat(chat(n=2), metadata=bearer(key))
        await until(lambda: len(seen) == 2, "both records are closed")
        assert {record.tenant for record in seen} == {"acme"}


def test_limits_are_shown_with_their_use() -> None:
    """Each limit of a tenant is shown with its use, which is None until it is known. The budget that is nearest to
    being used up is shown separately."""
    policies = {
        "acme": TenantPolicy("acme", limits=TenantLimits(tokens_per_minute=1000, daily_tokens=50, monthly_tokens=100)),
        "free": TenantPolicy("free"),
    }
    budgets = [BudgetUse("acme", "daily_tokens", "d", 5, 50), BudgetUse("acme", "monthly_tokens", "m", 60, 100)]
    known = LimitUses([("acme", "tokens_per_minute", 0.25), ("gone", "x", 1.0)], budgets, policies)
    assert known.of("acme") == Limits(
        {
            "tokens_per_minute": {"used": 250, "limit": 1000},
            "daily_tokens": {"used": 5, "limit": 50},
            "monthly_tokens": {"used": 60, "limit": 100},
        },
        {"name": "monthly_tokens", "used": 60, "limit": 100, "currency": "tokens"},
    )
    assert known.of("free") == known.of("nobody") == Limits()
    unknown = LimitUses([], [], policies).of("acme")
    assert unknown.limits["tokens_per_minute"] == {"used": None, "limit": 1000}
    assert unknown.budget is None


class Controller:
    """A fake controller that answers requests for scaling decisions. It records the requested models."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.is_away = False

    async def ask(self, verb: str, body: bytes, actor: str, timeout_s: float) -> bytes:
        """Return an explanation with one scaling decision. Raises CallError if the controller is away."""
        request = scaling_pb2.ExplainScalingRequest.FromString(body)
        self.asked.append(request.name)
        if self.is_away:
            raise CallError(Outcome.NO_WORKER, "no controller is linked")
        model = scaling_pb2.ModelScaling(name=request.name, by="frozen", why="held")
        decisions = [scaling_pb2.ScalingDecision(why=f"{request.name} has enough")]
        return scaling_pb2.ExplainScalingResponse(model=model, decisions=decisions).SerializeToString()


async def test_words_of_decisions_are_asked_for_seldom() -> None:
    """For each model, the console requests the explanation of the scaling decision from the controller at most once in
    REFRESH_S. It requests few explanations at a time. An explanation is None while no controller answers."""
    controller = Controller()
    reasons = ScalingReasons(controller.ask)
    models = [KnownModel(CatalogEntry(f"m{at}"), in_catalog=True) for at in range(MAX_ASKED + 2)]
    rows = [{"id": model.name, "replicas": 1, "replicas_desired": 2} for model in models]
    assert reasons.rows(rows)[0] == {"id": "m0", "wanted": 2, "had": 1, "reason": None, "frozen": None}
    for now in (0.0, 0.1, 1.0, 2.0):
        reasons.refresh(models, now)
        await until(lambda: not reasons._tasks, "the answers have come")
    assert sorted(controller.asked) == [model.name for model in models]
    shown = reasons.rows(rows)[0]
    assert (shown["reason"], shown["frozen"]) == ("m0 has enough", True)
    controller.is_away = True
    reasons.refresh(models[:1], REFRESH_S + 1.0)
    await until(lambda: not reasons._tasks, "the answers have come")
    assert reasons.rows(rows)[0]["reason"] is None
    assert reasons.is_frozen("m1") is None
    await reasons.close()
    await asyncio.sleep(0)
