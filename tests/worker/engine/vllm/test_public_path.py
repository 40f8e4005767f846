"""Log probabilities that AsyncLLM has merged are restored to the form of the fast path."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st
from vllm.logprobs import FlatLogprobs

from cluster.worker.engine.vllm.public_path import _flat

positions = st.integers(1, 5).flatmap(
    lambda k: st.lists(
        st.tuples(st.lists(st.integers(0, 9), min_size=k, max_size=k, unique=True), st.integers(0, 9)), max_size=5
    ).map(lambda drawn: (k, drawn))
)


@given(positions, st.integers(0, 5))
def test_merged_outputs_keep_every_position_whole(
    drawn: tuple[int, list[tuple[list[int], int]]], merged_from: int
) -> None:
    """Each position of an output has log probabilities of the sampled token and of the k most likely tokens. This also
    holds if AsyncLLM has merged several outputs into one."""
    k, sampled_positions = drawn
    whole, merged = FlatLogprobs(), FlatLogprobs()
    expected = []
    for number, (top, sampled) in enumerate(sampled_positions):
        ids = [sampled, *top]
        values = [-float(top.index(sampled) + 1 if sampled in top else k + 1), *(-float(i + 1) for i in range(k))]
        rank = top.index(sampled) + 1 if sampled in top else k + 1
        output = FlatLogprobs()
        output.append_fast(ids, values, itertools.chain((rank,), range(1, k + 1)), itertools.repeat(None))
        if number >= merged_from:
            merged.extend(output)
        else:
            merged.append_fast(ids, values, itertools.chain((rank,), range(1, k + 1)), itertools.repeat(None))
        whole.append_fast(ids, values, itertools.chain((rank,), range(1, k + 1)), itertools.repeat(None))
        expected.append((ids, values))
    for flat in (whole, merged):
        assert [(list(p.token_ids), list(p.logprobs)) for p in _flat(flat, k + 1)] == expected
