"""Conversion of adapters, and of their states on a worker, to messages of link.v1 and back.

Received messages are checked against limits. A message that exceeds a limit is a fault of its sender and ends the link.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.api.adapters import AdapterSpec, AdapterState, AdapterStatus
from cluster.link.v1 import link_pb2 as pb

MAX_ADAPTERS: Final = 1024
"""Maximum number of adapters of one model."""
MAX_NAME: Final = 128
"""Maximum number of characters of an adapter's name, license and version, and of a tenant's name."""
MAX_SOURCE: Final = 2048
"""Maximum number of characters of an adapter's source."""
MAX_REASON: Final = 512
"""Maximum number of characters of the reason why an adapter failed. The sender cuts a longer reason."""
MAX_TENANTS: Final = 4096
"""Maximum number of tenants in a message, summed over all adapters."""
_DIGEST = re.compile(r"(?:[0-9a-f]{64})?")
_STATES = {state: pb.AdapterStatus.State.Value(f"STATE_{state.value}") for state in AdapterState}
_STATE_OF = {value: state for state, value in _STATES.items()}


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """The adapters that a worker should have loaded. If its gateways send different sets, the set with the highest
    `revision` applies."""

    revision: int
    adapters: tuple[AdapterSpec, ...] = ()


def adapter_to_pb(spec: AdapterSpec) -> pb.Adapter:
    """Encode an adapter of a catalog, with the tenants that may use it."""
    message = _without_tenants(spec)
    message.tenants.extend(spec.tenants)
    return message


def adapters_from_pb(messages: Sequence[pb.Adapter]) -> tuple[AdapterSpec, ...]:
    """Decode adapters. Raises ValueError if there are too many adapters, a value is too long, or a name occurs
    twice."""
    if len(messages) > MAX_ADAPTERS:
        raise ValueError(f"adapters: {len(messages)} adapters, at most {MAX_ADAPTERS} are allowed")
    if (tenants := sum(len(m.tenants) for m in messages)) > MAX_TENANTS:
        raise ValueError(f"adapters.tenants: {tenants} names, at most {MAX_TENANTS} are allowed in all")
    specs = tuple(_from_pb(m) for m in messages)
    if len({spec.name for spec in specs}) < len(specs):
        raise ValueError("adapters.name: an adapter's name occurs twice")
    return specs


def adapter_set_to_pb(adapter_set: AdapterSet) -> pb.AdapterSet:
    """Encode the adapters for a worker. Their tenants are left out, because workers must not know tenants' names."""
    return pb.AdapterSet(revision=adapter_set.revision, adapters=map(_without_tenants, adapter_set.adapters))


def adapter_set_from_pb(m: pb.AdapterSet) -> AdapterSet:
    """Decode the adapters that a worker should have. Raises ValueError in the same cases as `adapters_from_pb`."""
    return AdapterSet(m.revision, adapters_from_pb(m.adapters))


def adapter_report_to_pb(statuses: Iterable[AdapterStatus]) -> pb.AdapterReport:
    """Encode the states of a worker's adapters. Long reasons are cut, and characters that protobuf rejects are
    replaced."""
    return pb.AdapterReport(
        adapters=[
            pb.AdapterStatus(
                name=status.name,
                digest=status.digest,
                state=_STATES[status.state],
                reason=status.reason[:MAX_REASON].encode("utf-8", "replace").decode(),
                resident=status.resident,
                load_number=status.load_number,
            )
            for status in statuses
        ]
    )


def adapter_report_from_pb(m: pb.AdapterReport) -> tuple[AdapterStatus, ...]:
    """Decode the states of a worker's adapters. Raises ValueError if there are too many adapters or a value is too
    long.

    A state that this release does not know counts as LOADING, so that the worker gets no requests for the adapter.
    """
    if len(m.adapters) > MAX_ADAPTERS:
        raise ValueError(f"adapters: {len(m.adapters)} adapters, at most {MAX_ADAPTERS} are allowed")
    statuses = tuple(_status_from_pb(part) for part in m.adapters)
    if len({status.name for status in statuses}) < len(statuses):
        raise ValueError("adapters.name: an adapter's name occurs twice")
    return statuses


def _without_tenants(spec: AdapterSpec) -> pb.Adapter:
    return pb.Adapter(
        name=spec.name,
        source=spec.source,
        digest=spec.digest,
        pinned=spec.pinned,
        license=spec.license,
        version=spec.version,
        load_number=spec.load_number,
    )


def _from_pb(m: pb.Adapter) -> AdapterSpec:
    _check_name(m.name)
    _check_digest(m.digest)
    _check_length("source", m.source, MAX_SOURCE)
    _check_length("license", m.license, MAX_NAME)
    _check_length("version", m.version, MAX_NAME)
    for tenant in m.tenants:
        _check_length("tenants", tenant, MAX_NAME)
    return AdapterSpec(
        name=m.name,
        source=m.source,
        digest=m.digest,
        tenants=tuple(m.tenants),
        pinned=m.pinned,
        license=m.license,
        version=m.version,
        load_number=m.load_number,
    )


def _status_from_pb(m: pb.AdapterStatus) -> AdapterStatus:
    _check_name(m.name)
    _check_digest(m.digest)
    _check_length("reason", m.reason, MAX_REASON)
    state = _STATE_OF.get(m.state, AdapterState.LOADING)
    if state is AdapterState.READY and not m.digest:
        raise ValueError(f"adapters.digest: {m.name!r} is ready and has no digest")
    return AdapterStatus(m.name, m.digest, state, m.reason, m.resident, m.load_number)


def _check_name(name: str) -> None:
    if not name:
        raise ValueError("adapters.name: must not be empty")
    _check_length("name", name, MAX_NAME)


def _check_length(field: str, text: str, longest: int) -> None:
    if len(text) > longest:
        raise ValueError(f"adapters.{field}: {len(text)} characters, at most {longest} are allowed")


def _check_digest(digest: str) -> None:
    if not _DIGEST.fullmatch(digest):
        raise ValueError("adapters.digest: must be 64 lower-case hexadecimal digits, or empty")
