"""Each repair of vLLM is made for known releases, and the repaired fault still exists."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from cluster.worker.engine.processes import watchdog
from cluster.worker.engine.vllm import repairs

pytestmark = pytest.mark.engine


def test_this_vllm_is_one_that_the_seed_repair_knows() -> None:
    """The installed vLLM is a release for which Headrace's repair of seeds on CPU is verified.

    If this test fails for a new release of vLLM, verify the repair (vllm/repairs.py) before you add the release
    to its list.
    """
    assert repairs.seeds_are_safe()


def test_seeds_are_not_safe_where_the_repair_is_kept_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM plugin contains Headrace's repairs of vLLM. If VLLM_PLUGINS is set and leaves out this plugin, vLLM does
    not load it. Then `seeds_are_safe` returns False."""
    monkeypatch.setenv("VLLM_PLUGINS", "something_else")
    assert not repairs.seeds_are_safe()
    monkeypatch.setenv("VLLM_PLUGINS", f"something_else,{repairs.PLUGIN}")
    assert repairs.seeds_are_safe()


def test_stock_generators_still_lack_an_offset() -> None:
    """PyTorch's CPU generator has no offset, although vLLM's runner uses it. Headrace repairs this fault.

    If this test fails, the repair can be removed.
    """
    import torch

    with pytest.raises(RuntimeError, match="offset"):
        torch.Generator(device="cpu").get_offset()


def test_the_runner_takes_draws_back_as_the_repair_expects() -> None:
    """When vLLM's runner discards a sample, it sets the random generator back by one draw. The runner's source code
    does this at a single place, as the repair assumes."""
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
    from vllm.v1.worker.gpu_input_batch import CachedRequestState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner._bookkeeping_sync)
    assert source.count("set_offset") == 1
    assert "gen.set_offset(gen.get_offset() - 4)" in source
    signature = inspect.signature(inspect.unwrap(TopKTopPSampler.forward_cpu))
    assert list(signature.parameters) == ["self", "logits", "generators", "k", "p"]
    assert "generator" in CachedRequestState.__dataclass_fields__


def test_a_draw_that_is_taken_back_is_drawn_again() -> None:
    """If `remember` is called before a draw, `set_offset` takes the draw back, and the next draw gives the same number.
    If `remember` was not called, `set_offset` changes nothing."""
    import torch

    generator = repairs.rewindable_generator()(device="cpu")
    generator.manual_seed(5)
    generator.set_offset(generator.get_offset() - 4)
    generator.remember()
    first = torch.rand(1, generator=generator)
    generator.set_offset(generator.get_offset() - 4)
    assert torch.equal(torch.rand(1, generator=generator), first)
    assert not torch.equal(torch.rand(1, generator=generator), first)


def test_shared_memory_is_named_as_the_repair_expects() -> None:
    """vLLM has the fault that the repair removes: ranks compare a name to find out whether they share memory, but
    the name does not identify the memory.

    The repair adds an id of the memory to the name.
    """
    import inspect
    from types import SimpleNamespace

    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator, _CPUSHMDistributed

    assert "make_group_name(self)" in inspect.getsource(CpuCommunicator._all_group_ranks_share_shm_group_name)
    assert list(inspect.signature(_CPUSHMDistributed.make_group_name).parameters) == ["communicator"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_DIST_IDENT", "2345")
        patch.setattr(_CPUSHMDistributed, "make_group_name", _CPUSHMDistributed.__dict__["make_group_name"])
        group = SimpleNamespace(unique_name="tp:0", ranks=[0, 1])
        stock = _CPUSHMDistributed.make_group_name(group)
        assert stock.startswith("2345-tp:0-[0-1]-cpushm")
        repairs._repair_shared_memory()  # twice, if an engine of this process has applied the repair already
        assert _CPUSHMDistributed.make_group_name(group) == f"{stock}-{repairs.shared_memory()}"
        patch.setattr(repairs, "shared_memory", lambda: "elsewhere")
        assert _CPUSHMDistributed.make_group_name(group).endswith("-elsewhere")


@pytest.mark.parametrize("part", ["ring", "arena"])
def test_a_queue_is_freed_quietly_when_its_block_is_gone(part: str) -> None:
    """vLLM raises FileNotFoundError when it frees a queue whose shared memory has lost its name.

    With our repair, the queue is freed without an error, and the name is unregistered.
    """
    modules = {"ring": ("shm_broadcast", "ShmRingBuffer"), "arena": ("shm_tensor_arena", "ShmTensorArena")}
    name, what = modules[part]
    module = pytest.importorskip(f"vllm.distributed.device_communicators.{name}", reason="new in vLLM 0.32")
    kind, arguments = getattr(module, what), (1, 1024, 1)
    with pytest.MonkeyPatch.context() as patch:
        stock = getattr(kind.__del__, "__wrapped__", kind.__del__)
        patch.setattr(kind, "__del__", stock)
        repairs._free_quietly(kind)
        unregistered: list[tuple[str, str]] = []
        swept, kept = kind(*arguments), kind(*arguments)
        watchdog.unlink([swept.shared_memory.name])
        with pytest.raises(FileNotFoundError):
            stock(swept)
        with pytest.MonkeyPatch.context() as tracker:
            tracker.setattr(resource_tracker, "unregister", lambda *what: unregistered.append(what))
            swept.__del__()
        assert unregistered == [(f"/{swept.shared_memory.name}", "shared_memory")]
        block = Path("/dev/shm", kept.shared_memory.name)
        assert block.exists()
        del swept, kept
        assert not block.exists(), "an existing name is unlinked"


def test_a_repair_that_finds_no_place_is_named_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repair (a patch of vLLM at run time) that cannot be applied raises no error, because an error would keep every
    engine from starting. The repair is listed in `not_applied`."""
    made: list[str] = []

    def moved() -> None:
        raise ImportError("no module named vllm.elsewhere")

    monkeypatch.setenv(repairs.ACTIVE, "1")
    monkeypatch.setattr(repairs, "_applied", set())
    monkeypatch.setattr(repairs, "not_applied", {})
    table = (
        repairs.Repair("moved", moved, lambda: True),
        repairs.Repair("other platform", moved, lambda: False),
        repairs.Repair("there", lambda: made.append("there"), lambda: True),
    )
    monkeypatch.setattr(repairs, "REPAIRS", table)
    repairs.apply()
    repairs.apply()
    assert made == ["there"], "once"
    assert repairs.not_applied == {"moved": "ImportError: no module named vllm.elsewhere"}


def test_a_vllm_outside_the_window_stays_as_it_is_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown vLLM release is not patched, and `not_applied` names the release."""
    monkeypatch.setenv(repairs.ACTIVE, "1")
    monkeypatch.setattr(repairs, "_applied", set())
    monkeypatch.setattr(repairs, "not_applied", {})
    monkeypatch.setattr(repairs, "_version", lambda: "0.99.0")
    monkeypatch.setattr(repairs, "REPAIRS", (repairs.Repair("never", lambda: pytest.fail("applied"), lambda: True),))
    repairs.apply()
    assert repairs.not_applied["all"].startswith("vLLM 0.99.0 is not known; known are 0.31.0")


@pytest.mark.parametrize("name", ["bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"])
def test_a_row_without_an_adapter_gets_the_last_one(name: str) -> None:
    """vLLM's LoRA operations apply the last slot's adapter to a row with the index -1, which means no adapter.

    With the repair, such a row is not changed. If this test fails because vLLM no longer has the fault, the repair can
    be removed.
    """
    import inspect

    import torch
    from vllm.lora.ops.torch_ops import lora_ops

    stock = inspect.unwrap(getattr(lora_ops, name))
    weights = torch.arange(1.0, 4.0).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    inputs, index = torch.tensor([[1.0, 2.0], [3.0, float("inf")], [5.0, 6.0]]), torch.tensor([0, -1, 2])
    more = (0, 2) if name == "bgmv_expand_slice" else ()
    results = []
    for operation in (stock, repairs._without_adapter_adds_nothing(stock)):
        output = torch.zeros(3, 2)
        operation(inputs, weights, output, index, *more)
        results.append(output)
    assert results[0][1].tolist() == [float("inf")] * 2
    assert results[1][1].tolist() == [0.0, 0.0]
    assert torch.equal(results[0][[0, 2]], results[1][[0, 2]])


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("form", ["one tensor", "with a key"])
def test_the_heads_of_a_token_are_rotated(monkeypatch: pytest.MonkeyPatch, form: str, side_by_side: bool) -> None:
    """vLLM's CPU kernel of rotary embeddings rotates tokens by heads by head size wrongly; with the repair, it gives
    what it gives for tokens by (heads times head size).

    If the first part fails, the repair can be removed.
    """
    import torch
    from vllm import _custom_ops

    stock = inspect.unwrap(_custom_ops.rotary_embedding)
    monkeypatch.setattr(_custom_ops, "rotary_embedding", stock)
    repairs._repair_rotation()
    angles = torch.rand(64, 16)
    places, cache = torch.tensor([3, 40, 7]), torch.cat([angles.cos(), angles.sin()], -1)

    def heads(count: int) -> torch.Tensor:
        """Return random heads of three tokens as a part of a larger tensor."""
        wide = torch.randn(3, 5, 32) if side_by_side else torch.randn(3, 5, 64)
        return wide[:, :count, :32]

    def rotated(rotate: Callable[..., None], *given: torch.Tensor, flat: bool) -> list[torch.Tensor]:
        tensors = [tensor.flatten(1).clone() if flat else tensor for tensor in given]
        rotate(places, tensors[0], tensors[1] if len(tensors) > 1 else None, 32, cache, True)
        return [tensor.reshape(3, -1, 32) for tensor in tensors]

    given = [heads(4), heads(2)][: 1 if form == "one tensor" else 2]
    right = rotated(stock, *given, flat=True)
    wrong = rotated(stock, *(tensor.clone() for tensor in given), flat=False)
    assert not all(torch.allclose(one, other) for one, other in zip(wrong, right, strict=True))
    repaired = rotated(_custom_ops.rotary_embedding, *given, flat=False)
    assert all(torch.equal(one, other) for one, other in zip(repaired, right, strict=True))


def test_adapters_are_refused_where_the_repair_is_kept_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine on CPUs refuses adapters if Headrace's repair of vLLM is not applied. Without the repair, requests for
    the base model would get wrong tokens."""
    assert repairs.why_no_adapters() == ""
    with monkeypatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "something_else")
        assert repairs.PLUGIN in repairs.why_no_adapters()
    with monkeypatch.context() as patch:
        patch.setattr(repairs, "_version", lambda: "0.99.0")
        assert "0.99.0" in repairs.why_no_adapters()
    monkeypatch.setitem(repairs.not_applied, "base rows", "no such name")
    assert "no such name" in repairs.why_no_adapters()
