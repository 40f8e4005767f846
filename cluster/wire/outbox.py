"""Outgoing messages of one link. They are merged until the link's writer sends them. Adding a message never waits.

If a gateway stops reading, only its own outbox fills up. If that outbox is full, the link to that gateway is closed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from cluster.api.adapters import AdapterStatus
from cluster.api.demand import ComputedWork
from cluster.api.types import EngineLoad, TokenOutput
from cluster.link.v1 import link_pb2 as pb
from cluster.policy.fairness.peer_backlog import ServedTotal
from cluster.policy.fairness.service_counters import FlowKey
from cluster.wire.codecs.adapter_codec import adapter_report_to_pb
from cluster.wire.codecs.codec import StepColumns, load_to_pb, usage_to_pb, wire_text
from cluster.wire.codecs.demand_codec import work_to_pb
from cluster.wire.codecs.fairness_codec import FlowBacklog, WeightedValue, peer_backlogs_to_pb, served_to_pb
from cluster.wire.credit import Grant
from cluster.wire.ended_requests import MAX_PER_MESSAGE, EndedUsage
from cluster.wire.rendering import RenderedPieces

MESSAGE_BYTES = 4 << 20
"""Maximum size in bytes of the Submits in one message to a worker; a worker accepts far larger messages."""
STEP_VECTOR_BYTES = 1 << 20
"""Total size in bytes of the vectors in one message. Once it is reached, further outputs go into the next message."""
MAX_VECTOR_BYTES = 256 << 20
"""Size in bytes of unsent vectors above which an outbox is full."""
MAX_KV_MESSAGES = 4096
"""Maximum number of unsent reports of KV blocks. All blocks of a large engine fit in a few hundred reports."""


class Outbox:
    """A worker's outgoing messages for one gateway. The outbox is `full` if more than `max_tokens` token ids,
    MAX_VECTOR_BYTES bytes of vectors or MAX_KV_MESSAGES reports of KV blocks wait to be sent."""

    def __init__(self, max_tokens: int = 65_536) -> None:
        self._max_tokens = max_tokens
        self._wake = asyncio.Event()
        self._steps: deque[StepColumns] = deque()
        self._accepted: list[pb.Accepted] = []
        self._refused: list[pb.Refused] = []
        self._grant: Grant | None = None
        self._load: EngineLoad | None = None
        self._work: ComputedWork | None = None
        self._standing: pb.Standing | None = None
        self._served: dict[FlowKey, WeightedValue[ServedTotal]] | None = None
        self._elsewhere: dict[str, Sequence[WeightedValue[FlowBacklog]]] = {}
        self._engine_ended = ""
        self._kv_blocks: deque[pb.KvBlocks] = deque()
        self._rendered = RenderedPieces()
        self._adapters: Sequence[AdapterStatus] | None = None
        self.part_columns = False
        """Whether the gateway reads parts as columns, as its Welcome says."""
        self.acked_seq = 0
        self.sent_seq = 0
        """Number of messages that `next_message` has returned."""
        self.usage: Callable[[], Sequence[EndedUsage]] = tuple
        """Callback that returns the usage records for the next message. If it returns MAX_PER_MESSAGE records, another
        message follows."""

    def output(self, slot: int, output: TokenOutput) -> None:
        """Add the output of a request. After the last output of an engine step, call `flush` to wake the writer."""
        if not self._steps or self._steps[-1].vector_bytes >= STEP_VECTOR_BYTES:
            self._steps.append(StepColumns(self.part_columns))
        self._steps[-1].add(slot, output)

    def accepted(self, slot: int) -> None:
        """Add a report that the engine accepted the request in this slot. Does not wake the writer: the report is sent
        with the next message."""
        self._accepted.append(pb.Accepted(slot=slot))

    def refused(self, slot: int, reason: str, message: str, field: str) -> None:
        """Add a report that the engine refused the request in this slot."""
        self._refused.append(pb.Refused(slot=slot, reason=reason, message=wire_text(message), field=wire_text(field)))
        self.flush()

    def grant(self, grant: Grant) -> None:
        """Set the link's new credit limits. They replace limits that were not sent yet."""
        self._grant = grant
        self.flush()

    def load(self, load: EngineLoad) -> None:
        """Set the worker's load. It replaces a load that was not sent yet. Does not wake the writer."""
        self._load = load

    def work(self, work: ComputedWork) -> None:
        """Set the work that the engine has computed. It replaces work that was not sent yet. Does not wake the
        writer."""
        self._work = work

    def drain_state(self, standing: pb.Standing) -> None:
        """Set the worker's drain state. It replaces a state that was not sent yet."""
        self._standing = standing
        self.flush()

    def served(self, totals: Sequence[WeightedValue[ServedTotal]]) -> None:
        """Set the totals of tokens that tenants were served, to be sent in the next report. A total replaces an unsent
        total of the same tenant and class. The report is sent even if `totals` is empty."""
        if self._served is None:
            self._served = {}
        for total in totals:
            self._served[FlowKey(total.value.rank, total.value.tenant)] = total
        self.flush()

    def peer_backlog(self, gateway: str, waiting: Sequence[WeightedValue[FlowBacklog]]) -> None:
        """Send to this link's peer the backlog of another gateway, named `gateway`. `waiting`: this backlog by flow. It
        replaces an earlier, still unsent backlog of the same gateway."""
        self._elsewhere[gateway] = waiting
        self.flush()

    def kv_blocks(self, messages: Iterable[pb.KvBlocks], *, wakes: bool = True) -> None:
        """Add reports of KV blocks. Each message contains at most one report, so that tokens are not delayed. `wakes`:
        whether to wake the writer; if not, the reports are sent with the next messages, at the latest after two
        heartbeats."""
        self._kv_blocks.extend(messages)
        if wakes:
            self.flush()

    def rendered(self, answer: pb.Rendered) -> None:
        """Add a rendered prompt, which answers a Render message. Its token ids are cut into pieces, which are sent in
        several messages."""
        self._rendered.add(answer)
        self.flush()

    def adapters(self, statuses: Sequence[AdapterStatus]) -> None:
        """Set the states of all adapters. They replace states that were not sent yet."""
        self._adapters = statuses
        self.flush()

    def engine_ended(self, why: str) -> None:
        """Set the reason why the worker's engine has ended. It is sent in the last message, after all outputs."""
        self._engine_ended = why
        self.flush()

    def flush(self) -> None:
        """Wake the link's writer."""
        self._wake.set()

    @property
    def full(self) -> bool:
        """Whether too many tokens, vectors or reports of KV blocks wait, because the gateway has stopped reading."""
        if len(self._kv_blocks) > MAX_KV_MESSAGES:
            return True
        tokens = sum(len(columns.token_ids) for columns in self._steps)
        return tokens > self._max_tokens or sum(columns.vector_bytes for columns in self._steps) > MAX_VECTOR_BYTES

    async def next_message(self) -> pb.WorkerTurn:
        """Wait until there is something to send, then return the next message. It contains everything that was added
        since the previous message. Data that exceeds the size of a message is returned in later messages."""
        await self._wake.wait()
        self._wake.clear()
        self.sent_seq += 1
        message = pb.WorkerTurn(
            seq=self.sent_seq, acked_seq=self.acked_seq, accepted=self._accepted, refused=self._refused
        )
        self._accepted, self._refused = [], []
        if self._steps:
            message.step.CopyFrom(self._steps.popleft().to_pb())
            if self._steps:
                self._wake.set()
        if self._engine_ended and not self._steps:  # the gateway reads no message after this one
            message.engine_ended = wire_text(self._engine_ended)
        if self._grant is not None:
            message.credit.CopyFrom(
                pb.Credit(grant_id=self._grant.grant_id, sequences=self._grant.sequences, tokens=self._grant.tokens)
            )
            self._grant = None
        if self._load is not None:
            message.load.CopyFrom(load_to_pb(self._load))
            self._load = None
        if self._work is not None:
            message.work.CopyFrom(work_to_pb(self._work))
            self._work = None
        if self._standing is not None:
            message.standing.CopyFrom(self._standing)
            self._standing = None
        if self._served is not None:
            message.served.CopyFrom(served_to_pb(self._served.values()))
            self._served = None
        if self._elsewhere:
            message.elsewhere.extend(peer_backlogs_to_pb(self._elsewhere))
            self._elsewhere = {}
        if self._kv_blocks:
            message.kv_blocks.CopyFrom(self._kv_blocks.popleft())
            if self._kv_blocks:
                self._wake.set()
        if self._rendered:
            message.rendered.extend(self._rendered.next_message())
            if self._rendered:
                self._wake.set()
        if self._adapters is not None:
            message.adapters.CopyFrom(adapter_report_to_pb(self._adapters))
            self._adapters = None
        if not self._steps and (usage := self.usage()):  # a request's usage must not overtake its output
            message.usage.extend(map(usage_to_pb, usage))
            if len(usage) >= MAX_PER_MESSAGE:
                self._wake.set()
        return message

    def unwritten(self) -> dict[int, int]:
        """Return the number of unsent tokens of each slot."""
        counts: dict[int, int] = {}
        for columns in self._steps:
            for slot, count in zip(columns.slots, columns.counts, strict=True):
                counts[slot] = counts.get(slot, 0) + count
        return counts


class CommandBox:
    """A gateway's outgoing messages for one worker. They are merged into one message while they wait to be sent."""

    def __init__(self) -> None:
        self._wake = asyncio.Event()
        self._submits: list[pb.Submit] = []
        self._aborts: list[int] = []
        self._backlog: pb.Backlog | None = None
        self._fetch: list[str] = []
        self._grant_ack = 0
        self._usage_acks: list[int] = []
        self._commands: list[pb.Command] = []
        self._takeovers: list[pb.Takeover] = []
        self._renders: list[pb.Render] = []
        self._adapters: pb.AdapterSet | None = None
        self._seq = 0

    def submit(self, submit: pb.Submit) -> None:
        """Add a Submit, which is a request for the worker's engine."""
        self._submits.append(submit)
        self._wake.set()

    def aborts(self, slots: Sequence[int]) -> None:
        """Add the slots of requests that the engine must abort."""
        self._aborts.extend(slots)
        self._wake.set()

    def backlog(self, backlog: pb.Backlog) -> None:
        """Replace the gateway's unsent backlog for the worker's model by `backlog`. The unsent message may have a list
        of backlogs by tenant. If `backlog` has no such list, the list of the unsent message is kept."""
        if self._backlog is not None and self._backlog.tells_flows and not backlog.tells_flows:
            unsent = self._backlog
            unsent.waiting, unsent.waiting_tokens = backlog.waiting, backlog.waiting_tokens
            unsent.claim, unsent.kept = backlog.claim, backlog.kept
        else:
            self._backlog = backlog
        self._wake.set()

    def fetch(self, digest: str) -> None:
        """Request a tokenizer bundle from the worker."""
        self._fetch.append(digest)
        self._wake.set()

    def grant_ack(self, grant_id: int) -> None:
        """Acknowledge the credit grant with the id `grant_id`."""
        self._grant_ack = grant_id
        self._wake.set()

    def usage_acks(self, keys: Sequence[int]) -> None:
        """Acknowledge the usage records with these keys, which are in the ledger's database."""
        self._usage_acks.extend(keys)
        self._wake.set()

    def takeover(self, call: str, generation: int) -> None:
        """Report that a call was resumed as `generation`, so that the worker ends older generations of the call."""
        self._takeovers.append(pb.Takeover(call=call, generation=generation))
        self._wake.set()

    def render(self, render: pb.Render) -> None:
        """Add a chat that the worker must render into a prompt."""
        self._renders.append(render)
        self._wake.set()

    def adapters(self, adapters: pb.AdapterSet) -> None:
        """Set the adapters that the worker should have. They replace a set that was not sent yet. Call this only for a
        worker with the capability `adapters:v1`."""
        self._adapters = adapters
        self._wake.set()

    def command(self, command: pb.Command) -> None:
        """Add an operator's command for the worker."""
        self._commands.append(command)
        self._wake.set()

    async def next_message(self) -> pb.GatewayTurn:
        """Wait until there is something to send. Then return one message with everything that was added since the last
        message. Submits and bundle requests that do not fit are returned in the next message."""
        await self._wake.wait()
        self._seq += 1
        submits = self._next_submits()
        message = pb.GatewayTurn(
            seq=self._seq,
            submits=submits,
            aborts=() if self._submits else self._aborts,
            grant_ack=self._grant_ack,
            backlog=self._backlog,
            usage_acks=self._usage_acks,
            commands=self._commands,
            takeovers=self._takeovers,
            renders=self._renders,
            adapters=self._adapters,
        )
        if self._fetch:
            message.fetch_bundle.digest = self._fetch.pop(0)
        if not self._fetch and not self._submits:
            self._wake.clear()
        if not self._submits:  # an abort must not overtake the Submit of the same request
            self._aborts = []
        self._backlog, self._usage_acks, self._commands, self._takeovers = None, [], [], []
        self._renders, self._adapters = [], None
        return message

    def _next_submits(self) -> Sequence[pb.Submit]:
        """Remove and return the Submits for one message: as many as fit into MESSAGE_BYTES, and at least one."""
        if len(self._submits) == 1:
            submits, self._submits = self._submits, []
            return submits
        count = total = 0
        for submit in self._submits:
            total += submit.ByteSize()
            if count and total > MESSAGE_BYTES:
                break
            count += 1
        submits, self._submits = self._submits[:count], self._submits[count:]
        return submits
