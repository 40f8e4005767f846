"""Conversion of RequestTimes, the durations that a worker reports for a sampled call, to link.v1 and back."""

from __future__ import annotations

import math
from collections.abc import Iterable

from cluster.api.request_times import RequestTimes
from cluster.link.v1 import link_pb2 as pb

MAX_S = 86_400.0
"""Maximum valid duration in seconds."""


def times_to_pb(slot: int, times: RequestTimes) -> pb.SlotTimes:
    """Encode the durations of the request with this slot number."""
    return pb.SlotTimes(
        slot=slot,
        wait_s=times.wait_s,
        queue_s=times.queue_s,
        prefill_s=times.prefill_s,
        decode_s=times.decode_s,
        parse_s=times.parse_s,
    )


def times_by_slot(messages: Iterable[pb.SlotTimes]) -> dict[int, RequestTimes]:
    """Decode the durations of each slot, merged from all messages of the slot. Invalid durations become 0."""
    out: dict[int, RequestTimes] = {}
    for m in messages:
        durations = (m.wait_s, m.queue_s, m.prefill_s, m.decode_s, m.parse_s)
        times = RequestTimes(*(s if math.isfinite(s) and 0 <= s <= MAX_S else 0.0 for s in durations))
        if (before := out.get(m.slot)) is None:
            out[m.slot] = times
        else:
            before.update(times)
    return out
