"""The memory of encoded prompts is exact, bounded, and private to each tenant."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.gateway.text.encoding.prompt_memory import ENTRY_BYTES, IDLE_S, MAX_IDS, PromptMemory, pack, unpack

IDS = st.lists(st.one_of(st.integers(0, 300), st.integers(0, MAX_IDS - 1)), max_size=50)
MAX_BYTES = 40 * (ENTRY_BYTES + 200)
LAW = settings(max_examples=200, deadline=None)


@pytest.mark.slow
@LAW
@given(blocks=st.lists(IDS, max_size=6), before=IDS, after=IDS)
def test_packed_ids_are_the_same_again(blocks: list[list[int]], before: list[int], after: list[int]) -> None:
    """`unpack` restores the ids of packed blocks exactly. It puts the ids `before` in front of them and the ids `after`
    behind them."""
    packed = [pack(array("I", ids).tobytes()) for ids in blocks]
    around = array("I", before).tobytes(), array("I", after).tobytes()
    assert unpack(packed, *around).tolist() == [*before, *(i for ids in blocks for i in ids), *after]


@LAW
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60), st.booleans(), st.integers(0, 2)), max_size=200))
def test_the_memory_is_exact_bounded_and_private(steps: list[tuple[int, int, bool, int]]) -> None:
    """Whatever tenants store and read, the memory stays within its size and counts its bytes exactly. A tenant gets
    only what it has stored itself."""
    now = 0.0
    memory = PromptMemory(MAX_BYTES, lambda: now)
    stored: dict[tuple[str, bytes], bytes] = {}
    for tenant_number, block, write, waits in steps:
        now += (0.0, 1.0, IDLE_S)[waits]
        tenant, digest = f"tenant-{tenant_number}", b"%d" % block
        if write:
            ids = array("I", [tenant_number] * (block * 5)).tobytes()
            stored[tenant, digest] = ids
            memory.put(tenant, [(digest, pack(ids))])
        (found,) = memory.get(tenant, [digest])
        assert found is None or unpack([found]).tobytes() == stored[tenant, digest]
        assert memory.bytes <= MAX_BYTES
        assert memory.bytes == sum(memory.bytes_of(f"tenant-{i}") for i in range(4))


def fill(memory: PromptMemory, tenant: str, blocks: range) -> None:
    """Store blocks of equal sizes for a tenant."""
    for i in blocks:
        memory.put(tenant, [(b"%d" % i, pack(bytes(400)))])


def known(memory: PromptMemory, tenant: str, blocks: range) -> int:
    """Return how many of a tenant's blocks are known."""
    return sum(planes is not None for planes in memory.get(tenant, [b"%d" % i for i in blocks]))


def test_a_loud_tenant_evicts_its_own() -> None:
    """A tenant that stores without end loses its own oldest blocks. A tenant below its equal share of the memory loses
    none."""
    memory = PromptMemory(MAX_BYTES)
    fill(memory, "quiet", range(15))
    fill(memory, "loud", range(1000))
    assert known(memory, "quiet", range(15)) == 15
    assert 20 <= known(memory, "loud", range(1000)) <= 25
    assert known(memory, "loud", range(980, 1000)) == 20


def test_the_latest_used_stays() -> None:
    """If a tenant stores more blocks than fit into the memory, the blocks that were read last are kept."""
    memory = PromptMemory(MAX_BYTES)
    for i in range(200):
        fill(memory, "acme", range(i, i + 1))
        assert known(memory, "acme", range(3)) == min(i + 1, 3)


def test_a_tenant_without_calls_makes_room() -> None:
    """A tenant that has not used its blocks for an hour is the first to lose them."""
    now = 0.0
    memory = PromptMemory(MAX_BYTES, lambda: now)
    fill(memory, "gone", range(10))
    now += IDLE_S + 1
    fill(memory, "acme", range(38))
    assert known(memory, "acme", range(38)) == 38
    assert memory.bytes_of("gone") < 10 * ENTRY_BYTES
    fill(memory, "acme", range(38, 60))
    assert memory.bytes_of("gone") == 0
