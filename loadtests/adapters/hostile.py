"""Load test of hostile adapters (the part `hostile`): 280 adapters with broken, forged or huge files are
declared at once, while callers use the base model and a good adapter.

Two things count as harm: the engine ends, or a call for the base model or the good adapter fails or gets a
different text than before. Every hostile adapter must reach the state FAILED, with the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from cluster.api.adapters import full_name
from loadtests.adapters import rig
from loadtests.faces.base import CallFailed, Request
from loadtests.figures import Bound, Figure
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact
from loadtests.serving import ours as serving
from tests.support.hostile_adapters import write_hostile_adapters

TITLE = "hostile adapters: engines or calls of others harmed"
ACCEPTED, WITHOUT_REASON = "hostile adapters that were not refused", "refused without a reason"
NONE = Bound("<=", 0.0)
ROWS: Mapping[str, Bound | None] = {TITLE: NONE, ACCEPTED: NONE, WITHOUT_REASON: NONE}
ENGINE: Mapping[str, object] = {"max_loras": 2, "max_cpu_loras": 4}
GOOD, TOKENS, CALLS, REFUSED_S = "a0", 48, 40, 300.0
ENDED = ("FAILED", "READY")


async def measure(stage: Stage) -> list[Figure]:
    """Declare the hostile adapters while calls run, and return the report's rows. Raises DidNotStart, TimeoutError."""
    folder = await rig.prepare(stage, 1)
    hostile = await asyncio.to_thread(write_hostile_adapters, folder / "adapters", folder / "model")
    async with rig.running(stage, folder, [GOOD], ENGINE, later=hostile) as ours:
        face = rig.ModelsClient(ours.http, serving.MODEL, api_key=ours.key)
        models = (serving.MODEL, full_name(serving.MODEL, GOOD))
        try:
            before = {model: await _text(face, model) for model in models}
            harmed, calls, states = 0, 0, dict[str, dict[str, Any]]()
            async with asyncio.timeout(REFUSED_S):
                while calls < CALLS or sum(card["state"] in ENDED for card in states.values()) < len(hostile):
                    for model in models:
                        calls += 1
                        harmed += await _text(face, model) != before[model]
                    cards = await face.cards()
                    states = {
                        name: cards[name] for each in hostile if (name := full_name(serving.MODEL, each)) in cards
                    }
            harmed += not ours.worker.alive
        finally:
            await face.close()
    accepted = [name for name, card in states.items() if card["state"] != "FAILED"]
    silent = [name for name, card in states.items() if card["state"] == "FAILED" and not card.get("state_reason")]
    note = f"{len(hostile)} adapters, {calls} calls of others meanwhile"
    return [
        exact(TITLE, harmed, NONE, note=note),
        exact(ACCEPTED, len(accepted), NONE, note=", ".join(accepted[:5])),
        exact(WITHOUT_REASON, len(silent), NONE, note=", ".join(silent[:5])),
    ]


async def _text(face: rig.ModelsClient, model: str) -> str:
    """Make a call and return its text, or the error as text."""
    pieces: list[str] = []
    try:
        await face.run(Request("text", "The river", TOKENS, model=model), pieces.append)
    except CallFailed as error:
        return f"failed: {error}"
    return "".join(pieces)
