"""Fuzzing: batches of hypothesis examples for a bounded time, with checks after each batch."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import structlog
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

T = TypeVar("T")
SECONDS = float(os.environ.get("FUZZ_S", "3"))
BATCH = 20


def batches(strategy: st.SearchStrategy[T]) -> Iterator[list[T]]:
    """Yield lists of examples for FUZZ_S seconds.

    The seed is FUZZ_SEED, else the time. In CI the seed is 0, so that a result depends only on the tested change; `make
    fuzz` looks for new examples.
    """
    by_default = 0 if "CI" in os.environ and "FUZZ_S" not in os.environ else time.time_ns() % 1_000_000
    first = int(os.environ.get("FUZZ_SEED", by_default))
    until = time.monotonic() + SECONDS
    number = first
    while time.monotonic() < until:
        yield _batch(strategy, number)
        number += 1


def _batch(strategy: st.SearchStrategy[T], number: int) -> list[T]:
    made: list[T] = []

    @seed(number)
    @settings(
        max_examples=BATCH,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def make(example: T) -> None:
        made.append(example)

    make()
    return made


@asynccontextmanager
async def nothing_unexpected() -> AsyncIterator[None]:
    """Fail if a handler raises an unexpected exception, or if a task raises an exception that is never retrieved."""
    loop = asyncio.get_running_loop()
    failures: list[str] = []
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: failures.append(repr(context)))
    try:
        with structlog.testing.capture_logs(processors=[structlog.processors.format_exc_info]) as logs:
            yield
            gc.collect()
            await asyncio.sleep(0)
    finally:
        loop.set_exception_handler(before)
    failures += [
        repr(entry)
        for entry in logs
        if entry["event"] == "request.failed" or entry["log_level"] in ("error", "critical")
    ]
    assert not failures, "\n".join(failures)


async def each(examples: list[T], attack: Callable[[T], Awaitable[None]]) -> None:
    """Run `attack` on all examples of a batch at once. The error of a failing attack names its example."""

    async def run_attack(example: T) -> None:
        try:
            await attack(example)
        except Exception as error:
            raise AssertionError(f"{example!r}: {error!r}") from error

    await asyncio.gather(*map(run_attack, examples))


def messages(kind: type[Message], **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return a strategy for valid messages of type `kind`, in which any field may be set.

    `fixed`: strategies for top-level fields, by name.
    """
    return _fields(kind.DESCRIPTOR, 3, fixed).map(lambda fields: kind(**fields))


def _fields(descriptor: Any, depth: int, fixed: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    optional = {
        field.name: _values(field, depth) for field in descriptor.fields if depth or field.message_type is None
    } | fixed
    return st.fixed_dictionaries({}, optional=optional).map(_one_of_each(descriptor))


def _one_of_each(descriptor: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def keep(fields: dict[str, Any]) -> dict[str, Any]:
        for group in descriptor.oneofs:
            for extra in [field.name for field in group.fields if field.name in fields][1:]:
                del fields[extra]
        return fields

    return keep


def _values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    nested = field.message_type
    if nested is not None and nested.GetOptions().map_entry:
        key, value = nested.fields_by_name["key"], nested.fields_by_name["value"]
        return st.dictionaries(_scalars(key), _values(value, depth - 1), max_size=3)
    element = _scalars(field) if nested is None else _fields(nested, depth - 1, {})
    return st.lists(element, max_size=4) if field.is_repeated else element


INTERESTING = st.sampled_from(
    ["", "sim", "user", "system", "assistant", "json_schema", "{}", "[", "default", "\0", "ä🎉"]
)


def _scalars(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    kinds = FieldDescriptor
    small = {
        kinds.CPPTYPE_BOOL: st.booleans(),
        kinds.CPPTYPE_STRING: INTERESTING | st.text(max_size=20),
        kinds.CPPTYPE_DOUBLE: st.floats(),
        kinds.CPPTYPE_FLOAT: st.floats(width=32),
    }
    if field.cpp_type in small:
        if field.type == kinds.TYPE_BYTES:
            return st.binary(max_size=40)
        return small[field.cpp_type]
    if field.enum_type is not None:
        return st.integers(0, 7)
    low, high = {
        kinds.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
        kinds.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
        kinds.CPPTYPE_UINT32: (0, (1 << 32) - 1),
        kinds.CPPTYPE_UINT64: (0, (1 << 64) - 1),
    }[field.cpp_type]
    return st.integers(max(low, -1), 5) | st.integers(low, high)
