"""Client of guard servers (cluster.guard.v1.Guard). A guard server checks a prompt before the prompt is tokenized."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from cluster.guard.v1 import guard_pb2, guard_pb2_grpc
from cluster.policy.tenants.patterns import NAME
from cluster.policy.tenants.policy import GuardRule

MAX_ANSWER_BYTES = 64 * 1024 * 1024
_OUTCOMES = {
    guard_pb2.CheckResponse.ACTION_ALLOW: "",
    guard_pb2.CheckResponse.ACTION_REFUSE: "refused",
    guard_pb2.CheckResponse.ACTION_REPLACE: "redacted",
    guard_pb2.CheckResponse.ACTION_FLAG: "flagged",
}


@dataclass(frozen=True, slots=True)
class GuardReply:
    """A guard server's answer. `outcome`: "" (allowed), refused, redacted or flagged. `texts`: the texts of the prompt,
    redacted if the outcome is "redacted". `finding`: a name for what the guard server found."""

    outcome: str
    texts: Sequence[str]
    finding: str


class GuardServers:
    """The gRPC channels to guard servers, one for each guard server that a policy names."""

    def __init__(self) -> None:
        self._channels: dict[tuple[str, str], grpc.aio.Channel] = {}

    async def check(
        self, rule: GuardRule, tenant: str, model: str, request_id: str, texts: Sequence[str]
    ) -> GuardReply:
        """Send texts to the guard server of a rule and return the answer. Raises OSError if the server cannot be
        reached or the ca_file cannot be read, and ValueError for an invalid answer."""
        request = guard_pb2.CheckRequest(tenant=tenant, model=model, request_id=request_id, texts=texts)
        stub = guard_pb2_grpc.GuardStub(self._channel(rule))
        try:
            answer = await stub.Check(request, timeout=rule.timeout_s)
        except grpc.aio.AioRpcError as error:
            raise ConnectionError(f"the guard server failed with {error.code().name}") from None
        outcome = _OUTCOMES.get(answer.action)
        if outcome is None:
            raise ValueError("the guard server's answer has no action")
        replaced = list(answer.texts) if outcome == "redacted" else texts
        if len(replaced) != len(texts):
            raise ValueError(f"the guard server returned {len(replaced)} texts for {len(texts)}")
        return GuardReply(outcome, replaced, answer.finding if NAME.fullmatch(answer.finding) else "unnamed")

    def _channel(self, rule: GuardRule) -> grpc.aio.Channel:
        name = (rule.address, rule.ca_file)
        channel = self._channels.get(name)
        if channel is None:
            options = (("grpc.max_receive_message_length", MAX_ANSWER_BYTES),)
            if on_this_host(rule.address):
                channel = grpc.aio.insecure_channel(rule.address, options)
            else:
                roots = Path(rule.ca_file).read_bytes() if rule.ca_file else None
                channel = grpc.aio.secure_channel(rule.address, grpc.ssl_channel_credentials(roots), options)
            self._channels[name] = channel
        return channel

    async def close(self) -> None:
        """Close every channel."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()


def on_this_host(address: str) -> bool:
    """Return whether an address is on this host. Every other address requires TLS."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
