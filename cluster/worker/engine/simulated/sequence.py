"""A request in the simulated engine: its validity check, its tokens so far, and its next token."""

from __future__ import annotations

from cluster.api.ports import EngineRefused
from cluster.api.types import EngineRequest, FinishReason, TokenOutput
from cluster.worker.engine.simulated.config import SimConfig
from cluster.worker.engine.simulated.kv import KvCache, SequenceBlocks
from cluster.worker.engine.simulated.tokens import TokenSource, content_key, digest64, extend, fold
from cluster.worker.engine.simulated.vectors import check_pooling, pooled

MAX_LOGPROBS = 20


def check_request(request: EngineRequest, c: SimConfig) -> None:
    """Raise EngineRefused if an engine with the configuration `c` cannot run the request."""
    check_pooling(request, c)
    is_pooling = request.pooling is not None
    length = len(request.prompt_token_ids) + len(request.emitted_token_ids)
    if length >= c.max_model_len + is_pooling:
        output = "" if is_pooling else ", at least one for output"
        raise EngineRefused(
            "CONTEXT_LENGTH_EXCEEDED",
            f"the prompt has {length} tokens, but the context is {c.max_model_len} tokens{output}",
            "prompt_token_ids",
        )
    wrong: tuple[tuple[bool, str, str], ...] = (
        (not request.prompt_token_ids, "prompt_token_ids", "must not be empty"),
    )
    if not is_pooling:
        wrong += _wrong_sampling(request, c)
    for is_wrong, name, what in wrong:
        if is_wrong:
            raise EngineRefused("INVALID_FIELD", f"{name} {what}", name)
    for name, ids in (("prompt_token_ids", request.prompt_token_ids), ("emitted_token_ids", request.emitted_token_ids)):
        if ids and (max(ids) >= c.vocab or min(ids) < 0):
            raise EngineRefused("INVALID_FIELD", f"{name} has ids outside the vocabulary (0 to {c.vocab - 1})", name)


def _wrong_sampling(request: EngineRequest, c: SimConfig) -> tuple[tuple[bool, str, str], ...]:
    """Return the checks of the sampling fields.

    A check has three parts: whether the field is wrong, the field's name, and the rule for the field.
    """
    s = request.sampling
    return (
        (s.max_tokens < 1, "max_tokens", "must be 1 or more"),
        (s.min_tokens > s.max_tokens, "min_tokens", "must not exceed max_tokens"),
        (len(request.emitted_token_ids) >= s.max_tokens, "emitted_token_ids", "reach max_tokens already"),
        (not _stops(request, c).isdisjoint(request.emitted_token_ids), "emitted_token_ids", "have a stop token"),
        (s.logprobs is not None and not 0 <= s.logprobs <= MAX_LOGPROBS, "logprobs", f"must be 0 to {MAX_LOGPROBS}"),
    )


def _stops(request: EngineRequest, config: SimConfig) -> frozenset[int]:
    eos = () if request.sampling.ignore_eos or config.eos < 0 else (config.eos,)
    return frozenset((*request.sampling.stop_token_ids, *eos))


class SimSequence:
    """A request that runs or waits: its tokens, how many of them are computed, and the blocks that it holds."""

    __slots__ = (
        "_config", "_state", "_stops", "alive", "blocks", "cached_tokens", "computed", "first", "key", "output_from",
        "request", "tokens",
    )  # fmt: skip

    def __init__(self, request: EngineRequest, arrival: int, config: SimConfig, cache: KvCache) -> None:
        self._config = config
        self.request = request
        self.key = (request.priority, arrival)
        self.tokens = [*request.prompt_token_ids, *request.emitted_token_ids]
        self.output_from = len(request.prompt_token_ids)
        salt = (request.cache_salt, request.adapter)
        self.blocks = SequenceBlocks(cache, config.block_size, digest64(*salt), salt)
        self.computed = 0
        self.cached_tokens = -1  # -1 until the sequence is first scheduled
        self.first = True  # whether it has had no output
        self.alive = True
        self._state = fold(content_key(config.seed, request, bool(config.salted)), self.tokens)
        self._stops = _stops(request, config)

    @property
    def outputs(self) -> int:
        """Number of tokens emitted so far, including those that earlier attempts on other workers emitted."""
        return len(self.tokens) - self.output_from

    @property
    def submitted_tokens(self) -> int:
        """Number of tokens that the request had when it was submitted: its prompt, and the tokens that earlier attempts
        emitted."""
        return self.output_from + len(self.request.emitted_token_ids)

    def is_last(self, outputs: int) -> bool:
        """Return whether the sequence must end after this number of output tokens. A stop token may end it earlier."""
        return self.request.pooling is not None or outputs == self.request.sampling.max_tokens

    def pool(self, corrupt: bool) -> TokenOutput:
        """Return the output of a pooling request. `corrupt`: whether the output has a wrong vector."""
        self.first = False
        return TokenOutput(
            self.request.request_id,
            (),
            FinishReason.STOP,
            prompt_tokens=self.output_from,
            cached_tokens=self.cached_tokens,
            vector=pooled(self.request, self._config, corrupt),
        )

    def emit(self, source: TokenSource, corrupt: bool) -> TokenOutput:
        """Append the next token and return it as an output. `corrupt`: whether to append a wrong token.

        For a pooling request, return its vector instead.
        """
        if self.request.pooling is not None:
            return self.pool(corrupt)
        sampling = self.request.sampling
        token = source.draw(
            self._state,
            may_end=self.outputs >= sampling.min_tokens,
            ignore_eos=sampling.ignore_eos,
            forbidden=self._stops,
        )
        if corrupt:
            token = source.different(token)
        output = TokenOutput(self.request.request_id, (token,))
        if sampling.logprobs is not None:
            greedy = sampling.temperature == 0
            output.logprobs = [source.logprobs(self._state, token, sampling.logprobs, greedy)]
        if self.first:
            self.first = False
            output.prompt_tokens, output.cached_tokens = self.output_from, self.cached_tokens
        self.tokens.append(token)
        self._state = extend(self._state, token)
        if token in self._stops:
            output.finish = FinishReason.STOP
            if sampling.ignore_eos or token != self._config.eos:
                output.stop_token_id = token
        elif self.outputs >= sampling.max_tokens or len(self.tokens) >= self._config.max_model_len:
            output.finish = FinishReason.LENGTH
        return output

    def drop_blocks(self) -> None:
        """Release all blocks, so that every token must be computed or found in the cache again."""
        self.blocks.release()
        self.computed = 0

    def __repr__(self) -> str:
        return f"SimSequence({self.request.request_id}: {self.computed}/{len(self.tokens)})"
