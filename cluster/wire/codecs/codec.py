"""Conversion between the types of cluster.api and the messages of link.v1."""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from cluster.api.output_parts import OutputParsing, OutputPart, ParsedOutput, PartKind
from cluster.api.pooling import known_tasks
from cluster.api.types import (
    KV_EVENTS,
    POOLING_SAMPLING,
    CatalogEntry,
    DrainState,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    FinishReason,
    Grammar,
    ModelState,
    PositionLogprobs,
    Sampling,
    TokenOutput,
    VersionShare,
    WorkerIdentity,
)
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.codecs.adapter_codec import adapter_to_pb, adapters_from_pb
from cluster.wire.codecs.numbers import MAX_TOTAL_S, bounded
from cluster.wire.codecs.pooling_codec import (
    pooler_from_pb,
    pooler_to_pb,
    pooling_from_pb,
    pooling_to_pb,
    vectors_by_slot,
)
from cluster.wire.codecs.times_codec import times_by_slot, times_to_pb
from cluster.wire.ended_requests import EndedUsage

PROTOCOL_MIN = 1
PROTOCOL_MAX = 1
MAX_TEXT = 4096
"""Maximum number of characters of an engine's or worker's error text in a message."""
_PART_KINDS = frozenset(map(int, PartKind))
_KIND_OF = {int(kind): kind for kind in PartKind}
_KIND_BITS = 3
_KIND_MASK = (1 << _KIND_BITS) - 1
"""Mask of the low bits of a part's tag, which encode the part's kind."""
MAX_KV_BLOCKS = 8192
"""Maximum number of blocks in a received report of KV blocks, 64 KiB. Workers send fewer: BLOCKS_PER_MESSAGE."""
MAX_NESTED = 100
"""Maximum number of lists and objects in sampling defaults. It bounds their depth, too."""
MAX_BUSY = 64
"""Maximum number of characters that are kept of the work that explains why an engine does not step."""
MAX_VARINT_BYTES = 10
"""Maximum size of a varint in a message, in bytes."""


def pack_ids(ids: Sequence[int]) -> bytes:
    """Encode token ids as little-endian uint32."""
    words = array("I", ids)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def unpack_ids(data: bytes) -> array[int]:
    """Decode token ids, the inverse of `pack_ids`. Raises ValueError if the length is not a multiple of four."""
    words = array("I")
    words.frombytes(data)
    if sys.byteorder == "big":
        words.byteswap()
    return words


def sampling_to_pb(s: Sampling) -> pb.Sampling:
    """Encode sampling parameters."""
    out = pb.Sampling(
        max_tokens=s.max_tokens,
        min_tokens=s.min_tokens,
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        min_p=s.min_p,
        seed=s.seed,
        stop_token_ids=s.stop_token_ids,
        frequency_penalty=s.frequency_penalty,
        presence_penalty=s.presence_penalty,
        repetition_penalty=s.repetition_penalty,
        logit_bias=s.logit_bias,
        logprobs=s.logprobs,
        ignore_eos=s.ignore_eos,
        max_reasoning_tokens=s.max_reasoning_tokens,
    )
    if s.grammar is not None:
        _grammar_to_pb(s.grammar, out.grammar)
    return out


def _grammar_to_pb(grammar: Grammar, out: pb.Grammar) -> None:
    if grammar.kind == "choice":
        out.choice.values.extend(grammar.value)
    elif grammar.kind == "json_object":
        out.json_object = True
    else:
        setattr(out, grammar.kind, grammar.value)


def sampling_from_pb(m: pb.Sampling) -> Sampling:
    """Decode sampling parameters, the inverse of `sampling_to_pb`."""
    return Sampling(
        max_tokens=m.max_tokens,
        min_tokens=m.min_tokens,
        temperature=m.temperature,
        top_p=m.top_p,
        top_k=m.top_k,
        min_p=m.min_p,
        seed=m.seed if m.HasField("seed") else None,
        stop_token_ids=tuple(m.stop_token_ids),
        frequency_penalty=m.frequency_penalty,
        presence_penalty=m.presence_penalty,
        repetition_penalty=m.repetition_penalty,
        logit_bias=dict(m.logit_bias),
        logprobs=m.logprobs if m.HasField("logprobs") else None,
        ignore_eos=m.ignore_eos,
        grammar=_grammar_from_pb(m.grammar) if m.HasField("grammar") else None,
        max_reasoning_tokens=m.max_reasoning_tokens if m.HasField("max_reasoning_tokens") else None,
    )


def _grammar_from_pb(m: pb.Grammar) -> Grammar | None:
    kind = m.WhichOneof("kind")
    if kind is None:
        return None
    if kind == "choice":
        return Grammar(kind, tuple(m.choice.values))
    if kind == "json_object":
        return Grammar(kind, "")
    return Grammar(kind, getattr(m, kind))


_POOLING_SAMPLING = sampling_to_pb(POOLING_SAMPLING)


def submit_to_pb(slot: int, attempt: int, request: EngineRequest) -> pb.Submit:
    """Encode a request with its prompt ids as a Submit. `slot`: the request's number on the link. `attempt`: 1 for the
    request's first Submit."""
    return pb.Submit(
        slot=slot,
        attempt=attempt,
        prompt_ids=pack_ids(request.prompt_token_ids),
        emitted_ids=pack_ids(request.emitted_token_ids),
        sampling=sampling_to_pb(request.sampling) if request.pooling is None else _POOLING_SAMPLING,
        cache_salt=request.cache_salt,
        priority=request.priority,
        adapter=request.adapter,
        traceparent=request.traceparent,
        parsing=None if request.parsing is None else _parsing_to_pb(request.parsing),
        pooling=None if request.pooling is None else pooling_to_pb(request.pooling),
    )


def _parsing_to_pb(parsing: OutputParsing) -> pb.OutputParsing:
    return pb.OutputParsing(
        request=parsing.request, stop=parsing.stop, is_whole=parsing.is_whole, needs_tools=parsing.needs_tools
    )


def _parsing_from_pb(m: pb.OutputParsing) -> OutputParsing:
    return OutputParsing(m.request, tuple(m.stop), m.is_whole, m.needs_tools)


def max_submit_bytes(request: EngineRequest) -> int:
    """Return an upper bound on the sum of the sizes that `submit_bytes` returns. The bound is faster to compute than
    the sum. For nearly all requests the bound is below the allowed size, so the sum need not be computed."""
    sampling = request.sampling
    characters = len(request.cache_salt) + len(request.traceparent) + len(request.adapter)
    if sampling.grammar is not None:
        value = sampling.grammar.value
        characters += len(value) if isinstance(value, str) else sum(map(len, value)) + 2 * len(value)
    numbers = len(sampling.stop_token_ids) + 2 * len(sampling.logit_bias)
    return 4 * characters + MAX_VARINT_BYTES * numbers + 64


def submit_bytes(request: EngineRequest) -> Mapping[str, int]:
    """Return the sizes in bytes of those fields of a Submit that can be large, by field name. The token ids are left
    out."""
    sampling = sampling_to_pb(request.sampling)
    return {
        "stop_token_ids": pb.Sampling(stop_token_ids=sampling.stop_token_ids).ByteSize(),
        "logit_bias": pb.Sampling(logit_bias=sampling.logit_bias).ByteSize(),
        "grammar": sampling.grammar.ByteSize(),
        "cache_salt": pb.Submit(cache_salt=request.cache_salt).ByteSize(),
        "traceparent": pb.Submit(traceparent=request.traceparent).ByteSize(),
        "adapter": pb.Submit(adapter=request.adapter).ByteSize(),
    }


def submit_from_pb(m: pb.Submit, request_id: str, prompt_ids: bytes) -> EngineRequest:
    """Decode a request, the inverse of `submit_to_pb`. `prompt_ids`: the ids in the Submit or, for a long prompt, from
    the bulk stream. Raises ValueError for invalid fields."""
    if m.priority < 0:
        raise ValueError(f"priority is {m.priority}, but must be 0 or more")
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=unpack_ids(prompt_ids),
        sampling=POOLING_SAMPLING if m.HasField("pooling") else sampling_from_pb(m.sampling),
        emitted_token_ids=unpack_ids(m.emitted_ids).tolist(),
        cache_salt=m.cache_salt,
        priority=m.priority,
        adapter=m.adapter,
        traceparent=m.traceparent,
        parsing=_parsing_from_pb(m.parsing) if m.HasField("parsing") else None,
        pooling=pooling_from_pb(m.pooling) if m.HasField("pooling") else None,
        tenant=m.tenant_handle,
    )


def wire_text(text: str) -> str:
    """Return an error text, cut to MAX_TEXT characters. Lone surrogates are replaced, because protobuf rejects them."""
    return text[:MAX_TEXT].encode("utf-8", "replace").decode()


class StepColumns:
    """A builder of one StepOutputs message: the outputs of one or more engine steps for one link. The outputs are
    stored as columns (slots, counts, token ids)."""

    def __init__(self, part_columns: bool = True) -> None:
        """`part_columns`: whether the gateway can read the parts of parsed outputs as columns. The gateway reports this
        in its Welcome message."""
        self._part_columns = part_columns
        self.slots: list[int] = []
        self.counts: list[int] = []
        self.token_ids: list[int] = []
        self._plain = True
        self._firsts: list[pb.First] = []
        self._finishes: list[pb.Finish] = []
        self._logprobs: list[pb.SlotLogprobs] = []
        self._parts: list[pb.SlotParts] = []
        self._part_slots: list[int] = []
        self._part_tags: list[int] = []
        self._part_texts: list[str] = []
        self._vectors: list[pb.SlotVector] = []
        self._times: list[pb.SlotTimes] = []
        self.vector_bytes = 0

    def add(self, slot: int, output: TokenOutput) -> None:
        """Append the output of one request in one step."""
        ids = output.token_ids
        count = len(ids)
        self.slots.append(slot)
        self.counts.append(count)
        self.token_ids.extend(ids)
        if count != 1:
            self._plain = False
        if output.prompt_tokens is not None:
            self._firsts.append(
                pb.First(
                    slot=slot,
                    prompt_tokens=output.prompt_tokens,
                    cached_tokens=output.cached_tokens or 0,
                    origin_lost=output.origin_lost,
                )
            )
        if output.finish is not None:
            self._finishes.append(
                pb.Finish(
                    slot=slot,
                    reason=pb.Finish.Reason.ValueType(int(output.finish)),
                    stop_token_id=output.stop_token_id,
                    message=wire_text(output.message),
                )
            )
        if output.logprobs:
            self._logprobs.extend(_logprobs_to_pb(slot, output.logprobs))
        if (parsed := output.parsed) is not None:
            # The first output of a request has SlotParts even if its token adds no part. They show the gateway that
            # the output is parsed.
            begins = output.prompt_tokens is not None
            if begins or parsed.stop_string or parsed.reasoning_tokens or not self._part_columns:
                self._parts.append(_parsed_to_pb(slot, parsed, with_parts=not self._part_columns))
            if self._part_columns:
                for kind, text, call in parsed.parts:
                    self._part_slots.append(slot)
                    self._part_tags.append(call << _KIND_BITS | kind)
                    self._part_texts.append(text)
        if output.times is not None:
            self._times.append(times_to_pb(slot, output.times))
        if output.vector is not None:
            self._vectors.append(pb.SlotVector(slot=slot, values=output.vector))
            self.vector_bytes += len(output.vector)

    def to_pb(self) -> pb.StepOutputs:
        """Build the message."""
        return pb.StepOutputs(
            slots=self.slots,
            counts=() if self._plain else self.counts,
            token_ids=self.token_ids,
            firsts=self._firsts,
            finishes=self._finishes,
            logprobs=self._logprobs,
            parts=self._parts,
            part_slots=self._part_slots,
            part_tags=self._part_tags,
            part_texts=self._part_texts,
            vectors=self._vectors,
            times=self._times,
        )


def _parsed_to_pb(slot: int, parsed: ParsedOutput, *, with_parts: bool) -> pb.SlotParts:
    parts = [
        pb.OutputPart(kind=pb.OutputPart.Kind.ValueType(int(part.kind)), text=part.text, call=part.call)
        for part in (parsed.parts if with_parts else ())
    ]
    return pb.SlotParts(
        slot=slot, parts=parts, stop_string=parsed.stop_string, reasoning_tokens=parsed.reasoning_tokens
    )


def parts_by_slot(step: pb.StepOutputs) -> dict[int, list[OutputPart]]:
    """Decode the parts of parsed outputs in a step's columns. Returns a list of parts for each slot that has parts.
    Parts of an unknown kind are left out. Raises ValueError if the columns differ in length."""
    out: dict[int, list[OutputPart]] = {}
    for slot, tag, text in zip(step.part_slots, step.part_tags, step.part_texts, strict=True):
        kind = _KIND_OF.get(tag & _KIND_MASK)
        if kind is not None:
            part = OutputPart(kind, text, tag >> _KIND_BITS)
            if (parts := out.get(slot)) is None:
                out[slot] = [part]
            else:
                parts.append(part)
    return out


def _parsed_from_pb(
    messages: Iterable[pb.SlotParts], columns: Mapping[int, Sequence[OutputPart]]
) -> dict[int, ParsedOutput]:
    """Return the parsed output of each slot, merged from all messages of the slot. `columns`: the parts that each slot
    already has, as `parts_by_slot` returns them; the parts of the messages are appended."""
    out = {slot: ParsedOutput(tuple(parts)) for slot, parts in columns.items()}
    for m in messages:
        before = out.get(m.slot, ParsedOutput())
        parts = [OutputPart(PartKind(p.kind), p.text, p.call) for p in m.parts if int(p.kind) in _PART_KINDS]
        out[m.slot] = ParsedOutput(
            (*before.parts, *parts),
            m.stop_string or before.stop_string,
            max(m.reasoning_tokens, before.reasoning_tokens),
        )
    return out


def _logprobs_to_pb(slot: int, positions: Sequence[PositionLogprobs]) -> Iterator[pb.SlotLogprobs]:
    """Yield one message for each run of consecutive positions that have the same number of log probabilities."""
    start = 0
    while start < len(positions):
        width = len(positions[start].token_ids)
        end = start
        message = pb.SlotLogprobs(slot=slot, width=width)
        while end < len(positions) and len(positions[end].token_ids) == width:
            message.token_ids.extend(positions[end].token_ids)
            message.logprobs.extend(positions[end].logprobs)
            end += 1
        yield message
        start = end


def check_kv_blocks(message: pb.KvBlocks) -> int:
    """Check a report of KV blocks. Returns the size of its hashes in bytes. Raises ValueError if the hashes are not
    64-bit numbers or the report has more than MAX_KV_BLOCKS hashes."""
    stored, removed = len(message.stored), len(message.removed)
    if stored % 8 or removed % 8 or stored + removed > 8 * MAX_KV_BLOCKS:
        raise ValueError(f"kv_blocks: must be lists of 64-bit hashes, at most {MAX_KV_BLOCKS} in a message")
    return stored + removed


def slots_with_details(step: pb.StepOutputs) -> set[int] | None:
    """Return the slots (numbers of requests on the link) for which `step` has something besides one plain token: a
    First or Finish message, log probabilities, SlotParts or a vector.

    Returns None for a message with `counts`, in which a slot may have no token or several tokens. If a slot occurs
    several times in the message, the slots in the column `part_slots` are returned too, because parts must stay with
    their tokens.
    """
    if step.counts:
        return None
    more = {first.slot for first in step.firsts}
    more.update(finish.slot for finish in step.finishes)
    more.update(block.slot for block in step.logprobs)
    if step.parts:
        more.update(parsed.slot for parsed in step.parts)
    if step.vectors:
        more.update(vector.slot for vector in step.vectors)
    if step.part_slots:
        slots = list(step.slots)
        if len(set(slots)) < len(slots):
            more.update(step.part_slots)
    return more


def outputs_from_pb(
    step: pb.StepOutputs,
    only: Collection[int] | None = None,
    columns: Mapping[int, Sequence[OutputPart]] | None = None,
) -> Iterator[tuple[int, TokenOutput]]:
    """Yield (slot, output) once for each slot of the message; if `only` is given, only for the slots in `only`.

    If a slot has several entries in the message, they are merged into one output, with the slot's First, Finish, log
    probabilities, parts and vector. Slots are yielded in the order of their last entries. `columns`: the result of
    parts_by_slot(step), if the caller has it. Raises ValueError for a malformed vector, before the first output is
    yielded.
    """
    if columns is None:
        columns = parts_by_slot(step)
    firsts = {f.slot: f for f in step.firsts}
    finishes = {f.slot: f for f in step.finishes}
    logprobs: dict[int, list[PositionLogprobs]] = {}
    for block in step.logprobs:
        logprobs.setdefault(block.slot, []).extend(_positions(block))
    parsed = _parsed_from_pb(step.parts, columns) if step.parts or columns else {}
    vectors = vectors_by_slot(step.vectors)
    times = times_by_slot(step.times) if step.times else {}
    for slot, token_ids in _tokens_by_slot(step, only):
        output = TokenOutput("", token_ids)
        if (first := firsts.get(slot)) is not None:
            output.prompt_tokens, output.cached_tokens = first.prompt_tokens, first.cached_tokens
            output.origin_lost = first.origin_lost
        if (finish := finishes.get(slot)) is not None:
            output.finish = FinishReason(finish.reason)
            output.stop_token_id = finish.stop_token_id if finish.HasField("stop_token_id") else None
            output.message = finish.message
        output.logprobs = logprobs.get(slot)
        output.parsed = parsed.get(slot)
        output.vector = vectors.get(slot)
        if times:
            output.times = times.get(slot)
        yield slot, output


def _tokens_by_slot(step: pb.StepOutputs, only: Collection[int] | None) -> Iterator[tuple[int, list[int]]]:
    """Yield (slot, token ids) once for each slot; if `only` is given, only for the slots in `only`. The token ids of a
    slot's entries are joined. Slots are yielded in the order of their last entries."""
    slots, ids = list(step.slots), list(step.token_ids)
    last = dict(zip(slots, range(len(slots)), strict=True))
    if only is not None and not step.counts and len(last) == len(slots):  # nearly always: one token for each slot
        for at in sorted([last[slot] for slot in only if slot in last]):
            yield slots[at], ids[at : at + 1]
        return
    at, earlier = 0, dict[int, list[int]]()
    for i, (slot, count) in enumerate(zip(slots, step.counts or [1] * len(slots), strict=True)):
        piece = ids[at : at + count]
        at += count
        if only is not None and slot not in only:
            continue
        if last[slot] == i:
            yield slot, earlier.pop(slot, []) + piece
        else:
            earlier.setdefault(slot, []).extend(piece)


def _positions(block: pb.SlotLogprobs) -> Iterator[PositionLogprobs]:
    ids, values, width = list(block.token_ids), list(block.logprobs), block.width
    for at in range(0, len(ids), width):
        yield PositionLogprobs(ids[at : at + width], values[at : at + width])


def usage_to_pb(u: EndedUsage) -> pb.Usage:
    """Encode the usage of an ended request."""
    return pb.Usage(
        key=u.key,
        sealed_record=u.sealed,
        prompt_tokens=u.prompt_tokens,
        cached_tokens=u.cached_tokens,
        generated_tokens=u.generated_tokens,
        written_tokens=u.written_tokens,
        earlier_tokens=u.earlier_tokens,
        gpu_seconds=u.gpu_seconds,
        gpu=u.gpu,
        outcome=u.outcome,
        duration_ms=round(u.duration_s * 1000),
        idle_id=u.idle_id,
        idle_since_s=u.idle_since_s,
    )


def usage_from_pb(m: pb.Usage) -> EndedUsage:
    """Decode the usage of an ended request, the inverse of `usage_to_pb`. An impossible number of GPU-seconds is
    replaced, since it would spoil every sum over records."""
    return EndedUsage(
        sealed=m.sealed_record,
        prompt_tokens=m.prompt_tokens,
        cached_tokens=m.cached_tokens,
        generated_tokens=m.generated_tokens,
        written_tokens=m.written_tokens,
        earlier_tokens=m.earlier_tokens,
        gpu_seconds=bounded(m.gpu_seconds, MAX_TOTAL_S),
        gpu=m.gpu,
        outcome=m.outcome,
        duration_s=m.duration_ms / 1000,
        idle_id=m.idle_id,
        idle_since_s=m.idle_since_s,
        key=m.key,
    )


def load_to_pb(load: EngineLoad) -> pb.Load:
    """Encode an engine's load."""
    return pb.Load(
        running=load.running,
        waiting=load.waiting,
        kv_usage=load.kv_usage,
        steps=load.steps,
        step_ms=load.step_s * 1000,
        busy=load.busy,
        step_age_ms=load.step_age_s * 1000,
        step_p99_ms=load.step_p99_s * 1000,
        prefill_tokens=load.prefill_tokens,
    )


def load_from_pb(m: pb.Load) -> EngineLoad:
    """Decode an engine's load, the inverse of `load_to_pb`. Values that no engine can have are replaced, since routing
    compares the loads of all workers: one NaN would change the choice among the others."""
    return EngineLoad(
        running=m.running,
        waiting=m.waiting,
        kv_usage=bounded(m.kv_usage, most=1.0, otherwise=1.0),
        steps=m.steps,
        step_s=bounded(m.step_ms) / 1000,
        busy=m.busy[:MAX_BUSY],
        step_age_s=bounded(m.step_age_ms) / 1000,
        step_p99_s=bounded(m.step_p99_ms) / 1000,
        prefill_tokens=m.prefill_tokens,
    )


def hello_to_pb(identity: WorkerIdentity, info: EngineInfo, epoch: int) -> pb.Hello:
    """Encode a worker's Hello, the first message that it sends on a link."""
    return pb.Hello(
        protocol_min=PROTOCOL_MIN,
        protocol_max=PROTOCOL_MAX,
        worker_id=identity.worker_id,
        incarnation=identity.incarnation,
        ray_cluster=identity.ray_cluster,
        role="worker",
        model=identity.model,
        version=identity.version,
        weight_digest=identity.weight_digest,
        bundle_digest=identity.bundle_digest,
        node=identity.node,
        generation=identity.generation,
        pod=identity.pod,
        host=identity.host,
        gpu=identity.gpu,
        engine_class=info.engine_class,
        engine_path=info.engine_path,
        engine_path_reason=info.engine_path_reason,
        engine_version=info.engine_version,
        block_size=info.block_size,
        kv_blocks=info.kv_blocks,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        default_sampling_json=json.dumps(dict(info.default_sampling)),
        capabilities=info.capabilities,
        pooler=None if info.pooling is None else pooler_to_pb(info.pooling),
        adapter_slots=info.adapter_slots,
        adapter_capacity=info.adapter_capacity,
        epoch=epoch,
    )


_SIZES = (
    *("block_size", "kv_blocks", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "vocab_size"),
    *("adapter_slots", "adapter_capacity"),
)
"""Fields of a Hello that must not be negative."""


def hello_from_pb(m: pb.Hello) -> tuple[WorkerIdentity, EngineInfo]:
    """Decode a worker's Hello, the inverse of `hello_to_pb`. Raises ValueError if the sampling defaults are not a JSON
    object, if the length of vectors or another size is out of range, or if a worker that reports KV blocks
    gives no size of a block."""
    if KV_EVENTS in m.capabilities and m.block_size < 1:
        raise ValueError(f"block_size is {m.block_size}: a worker that reports KV blocks must have 1 or more")
    identity = WorkerIdentity(
        worker_id=m.worker_id,
        incarnation=m.incarnation,
        model=m.model,
        version=m.version,
        weight_digest=m.weight_digest,
        bundle_digest=m.bundle_digest,
        ray_cluster=m.ray_cluster,
        node=m.node,
        generation=m.generation,
        pod=m.pod,
        host=m.host,
        gpu=m.gpu,
    )
    info = EngineInfo(
        engine_class=m.engine_class,
        engine_path=m.engine_path,
        engine_path_reason=m.engine_path_reason,
        engine_version=m.engine_version,
        block_size=m.block_size,
        kv_blocks=m.kv_blocks,
        max_num_seqs=m.max_num_seqs,
        max_num_batched_tokens=m.max_num_batched_tokens,
        max_model_len=m.max_model_len,
        vocab_size=m.vocab_size,
        default_sampling=_json_object(m.default_sampling_json),
        capabilities=tuple(m.capabilities),
        pooling=pooler_from_pb(m.pooler, m.capabilities) if m.HasField("pooler") else None,
        adapter_slots=m.adapter_slots,
        adapter_capacity=m.adapter_capacity,
    )
    for name in _SIZES:
        if getattr(info, name) < 0:
            raise ValueError(f"{name} must be 0 or more, not {getattr(info, name)}")
    return identity, info


def _json_object(text: str) -> Mapping[str, object]:
    if text.count("[") + text.count("{") > MAX_NESTED:
        raise ValueError(f"default_sampling_json has more than {MAX_NESTED} lists and objects")
    value = json.loads(text) if text else {}
    if not isinstance(value, dict):
        raise ValueError("default_sampling_json must be a JSON object")
    return value


def entry_to_pb(e: CatalogEntry) -> pb.CatalogModel:
    """Encode a catalog entry."""
    return pb.CatalogModel(
        name=e.name,
        aliases=e.aliases,
        version=e.version,
        revision=e.revision,
        state=e.state.value,
        state_reason=e.state_reason,
        bundle_digest=e.bundle_digest,
        weight_digests=e.weight_digests,
        max_model_len=e.max_model_len,
        default_sampling_json=json.dumps(dict(e.default_sampling)),
        sampling_json=json.dumps(dict(e.sampling)) if e.sampling else "",
        cold_start_s=e.cold_start_s,
        replicas=e.replicas,
        replicas_desired=e.replicas_desired,
        family=e.family,
        license=e.license,
        engine_class=e.engine_class,
        weights_pinned=e.weights_pinned,
        slo_ttft_s=e.slo_ttft_s,
        slo_itl_s=e.slo_itl_s,
        slo_target=e.slo_target,
        starting_since_s=e.starting_since_s,
        fallback=e.fallback,
        versions=[_share_to_pb(share) for share in e.versions],
        retired=e.retired,
        card=e.card,
        tasks=e.tasks,
        adapters=map(adapter_to_pb, e.adapters),
    )


def _share_to_pb(s: VersionShare) -> pb.VersionShare:
    return pb.VersionShare(
        version=s.version,
        weight=s.weight,
        revision=s.revision,
        state=s.state.value,
        state_reason=s.state_reason,
        bundle_digest=s.bundle_digest,
        weight_digests=s.weight_digests,
        weights_pinned=s.weights_pinned,
        replicas=s.replicas,
        replicas_desired=s.replicas_desired,
        quarantined=s.quarantined,
        ttft_ratio=s.ttft_ratio,
    )


def _share_from_pb(m: pb.VersionShare) -> VersionShare:
    return VersionShare(
        version=m.version,
        weight=round(m.weight, 6),
        revision=m.revision,
        state=ModelState(m.state),
        state_reason=m.state_reason,
        bundle_digest=m.bundle_digest,
        weight_digests=tuple(m.weight_digests),
        weights_pinned=m.weights_pinned,
        replicas=m.replicas,
        replicas_desired=m.replicas_desired,
        quarantined=m.quarantined,
        ttft_ratio=round(m.ttft_ratio, 6),
    )


def drain_state_to_pb(standing: DrainState) -> pb.Standing.State.ValueType:
    """Encode a drain state."""
    return pb.Standing.State.Value(f"STATE_{standing.value}")


def drain_state_from_pb(standing: pb.Standing) -> DrainState:
    """Decode a drain state. A state that this release does not know counts as draining."""
    known = pb.Standing.State.items()
    name = next((name for name, value in known if value == standing.state), "").removeprefix("STATE_")
    return DrainState[name] if name in DrainState.__members__ else DrainState.DRAINING


def entry_from_pb(m: pb.CatalogModel) -> CatalogEntry:
    """Decode a catalog entry, the inverse of `entry_to_pb`. Raises ValueError if its state is unknown or its adapters
    exceed the limits."""
    return CatalogEntry(
        name=m.name,
        aliases=tuple(m.aliases),
        version=m.version,
        revision=m.revision,
        state=ModelState(m.state),
        state_reason=m.state_reason,
        bundle_digest=m.bundle_digest,
        weight_digests=tuple(m.weight_digests),
        max_model_len=m.max_model_len,
        default_sampling=_json_object(m.default_sampling_json),
        sampling=_json_object(m.sampling_json),
        cold_start_s=m.cold_start_s,
        replicas=m.replicas,
        replicas_desired=m.replicas_desired,
        family=m.family,
        license=m.license,
        engine_class=m.engine_class,
        weights_pinned=m.weights_pinned,
        fallback=tuple(m.fallback),
        versions=tuple(_share_from_pb(share) for share in m.versions),
        retired=tuple(m.retired),
        card=dict(m.card),
        adapters=adapters_from_pb(m.adapters),
        slo_ttft_s=m.slo_ttft_s,
        slo_itl_s=m.slo_itl_s,
        slo_target=m.slo_target,
        starting_since_s=m.starting_since_s,
        tasks=known_tasks(m.tasks),
    )
