"""Conversion of ledger values to and from cluster.admin.v1 messages, for the gateway and the command line.

The field with the priority class is named `priority_class` in messages, since `class` is a keyword in most languages.
In JSON, field masks, errors and the configuration, it is named `class`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from cluster.admin.v1 import tenants_pb2 as pb
from cluster.admin.v1 import usage_pb2
from cluster.api.outcomes import invalid
from cluster.ledger.errors import LedgerError
from cluster.ledger.rows import StoredKey, StoredTenant, key_state
from cluster.ledger.slo import COUNTED, NOT_COUNTED, SloObjective, SloSum
from cluster.policy.tenants.policy import TenantPolicy

OUTPUT_ONLY = frozenset({"suspended", "origin", "model_aliases", "create_time", "update_time"})
_NESTED = {
    "limits": [field.name for field in pb.Limits.DESCRIPTOR.fields],
    "retention": [field.name for field in pb.Retention.DESCRIPTOR.fields],
}
_NAMES = {"class" if f.name == "priority_class" else f.name for f in pb.Tenant.DESCRIPTOR.fields}
SETTABLE = frozenset(_NAMES) - OUTPUT_ONLY - {"name"}
_NAME = re.compile(r"tenants/([a-z0-9][a-z0-9._-]{0,62})(?:/keys/([A-Za-z0-9]{1,32}))?")
_LAST_S = 253_402_300_799.0


# ---- names


def tenant_name(value: str, field: str) -> str:
    """Return `acme` for `tenants/acme`. Raises CallError, which names `field`, for any other form."""
    match = _NAME.fullmatch(value)
    if match is None or match[2]:
        raise invalid(field, "must be like tenants/acme: a-z, 0-9, '-', '_' and '.', 63 characters at most")
    return match[1]


def key_name(value: str, field: str) -> tuple[str, str]:
    """Return the tenant and the key id of `tenants/acme/keys/k1`. Raises CallError, which names `field`."""
    match = _NAME.fullmatch(value)
    if match is None or not match[2]:
        raise invalid(field, "must be like tenants/acme/keys/k1")
    return match[1], match[2]


# ---- time


def timestamp(at_s: float | None) -> Timestamp | None:
    """Return a time as a Timestamp message; None if `at_s` is None or outside the years 1970 to 9999."""
    if at_s is None or not 0 <= at_s <= _LAST_S:
        return None
    stamp = Timestamp()
    stamp.FromNanoseconds(round(at_s * 1e6) * 1000)
    return stamp


def seconds(value: Timestamp) -> float:
    """Return a Timestamp message as seconds since the Unix epoch."""
    return value.seconds + value.nanos / 1e9


def seconds_or_none(message: Message, field: str) -> float | None:
    """Return a timestamp field as seconds since the Unix epoch; None if the field is unset. Raises CallError for an
    invalid time."""
    if not message.HasField(field):
        return None
    at_s = seconds(getattr(message, field))
    if not math.isfinite(at_s) or not 0 <= at_s <= _LAST_S:
        raise invalid(field, "must be a time between 1970 and 9999")
    return at_s


# ---- messages as plain values


def plain(message: Message) -> dict[str, Any]:
    """Return the set fields of a message as Python values, keyed by the field names of the configuration."""
    return {_config_name(message, field): _value(field, value) for field, value in message.ListFields()}


def _config_name(message: Message, field: FieldDescriptor) -> str:
    return "class" if field.name == "priority_class" and isinstance(message, pb.Tenant) else field.name


def _value(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(value)
    if field.message_type is None:
        return list(value) if field.is_repeated else value
    return [plain(nested) for nested in value] if field.is_repeated else plain(value)


# ---- tenants


def tenant_pb(stored: StoredTenant) -> pb.Tenant:
    """Return a stored tenant as a Tenant message."""
    row = stored.policy.as_json()
    row.pop("handle")
    row["name"] = f"tenants/{stored.policy.name}"
    message = pb.Tenant(origin=stored.origin, model_aliases=dict(stored.model_aliases))
    json_format.ParseDict(row, message)
    for name, at_s in (("create_time", stored.created_at), ("update_time", stored.updated_at)):
        if (time := timestamp(at_s)) is not None:
            getattr(message, name).CopyFrom(time)
    return message


def stored_tenant(message: pb.Tenant) -> StoredTenant:
    """Return a Tenant message as a stored tenant; the inverse of `tenant_pb`. Raises LedgerError for a message that
    cannot be read because another release wrote the message."""
    row = {k: v for k, v in plain(message).items() if k in SETTABLE}
    row |= {"name": message.name.removeprefix("tenants/"), "suspended": message.suspended}
    try:
        policy = TenantPolicy.from_json(row)
    except ValueError as error:
        raise LedgerError(f"the gateway's answer cannot be read, it may be of another release: {error}") from None
    times = seconds(message.create_time), seconds(message.update_time)
    return StoredTenant(policy, message.origin, *times, dict(message.model_aliases))


def own_fields(tenant: pb.Tenant, unset: Sequence[str]) -> dict[str, Any]:
    """Return the values that a Create request gives for a new tenant, keyed by field. `unset`: paths of fields that
    stay empty in the new tenant instead of getting their defaults; the result has None for these fields."""
    own = {name: value for name, value in plain(tenant).items() if name in SETTABLE}
    for path in unset:
        _set_path(own, *_split_path(path, "unset_mask"), None)
    return own


def changes(tenant: pb.Tenant, mask: Sequence[str]) -> tuple[dict[str, Any], set[str]]:
    """Return the new values in an Update request, keyed by field. Also return the names of the map fields that are
    replaced as a whole.

    The value None removes the field from the tenant. `mask`: paths of the fields to update; if it is empty, all fields
    that the request sets are updated.
    """
    values = {name: value for name, value in plain(tenant).items() if name in SETTABLE}
    if not mask:
        return values, set()
    changed: dict[str, Any] = {}
    whole: set[str] = set()
    for path in mask:
        head, rest = _split_path(path, "update_mask")
        if rest:
            if head not in whole:
                _set_path(changed, head, rest, (values.get(head) or {}).get(rest))
        else:
            changed[head] = values.get(head)
            if isinstance(changed[head], dict):
                whole.add(head)
    return changed, whole


def _split_path(path: str, field: str) -> tuple[str, str]:
    """Split a path like `limits.daily_tokens` into its two parts. Raises CallError for a field that callers cannot set.
    `field`: the request field that holds the path, for the error."""
    head, _, rest = path.partition(".")
    head = "class" if head == "priority_class" else head
    if head in OUTPUT_ONLY or head == "name":
        raise invalid(field, f"{path[:80]!r} is output only" + ("; see Suspend, Resume" if head == "suspended" else ""))
    if head not in SETTABLE:
        raise invalid(field, f"{path[:80]!r} is not a field of a tenant; the fields are {', '.join(sorted(SETTABLE))}")
    if head in _NESTED and rest:
        if rest not in _NESTED[head]:
            raise invalid(field, f"{path[:80]!r} is not a field; {head} has {', '.join(_NESTED[head])}")
    elif rest and head != "labels":
        raise invalid(field, f"{path[:80]!r}: {head} can only be set as a whole")
    return head, rest.strip("`")


def _set_path(into: dict[str, Any], head: str, rest: str, value: Any) -> None:
    if not rest:
        into[head] = value
        return
    if not isinstance(into.get(head), dict):
        into[head] = {}
    into[head][rest] = value


def tenant_and_paths(name: str, given: Mapping[str, Any]) -> tuple[pb.Tenant, list[str], list[str]]:
    """Build the Tenant message of a request from Python values, which are keyed by the configuration's field names.

    Returns the message, the paths of all given values, and the paths of the empty values (None or an empty map). Raises
    LedgerError, which names the field, for an invalid value.
    """
    message = pb.Tenant(name=f"tenants/{name}")
    paths: list[str] = []
    empty: list[str] = []
    for field, value in given.items():
        if field not in SETTABLE:
            raise LedgerError(f"{field}: is unknown; the fields are {', '.join(sorted(SETTABLE))}")
        parts = value if isinstance(value, Mapping) and (field in _NESTED or field == "labels") else None
        if not parts:
            paths.append(field)
            empty += [field] if value is None or parts == {} else []
        for key, part in (parts or {}).items():
            paths.append(f"{field}.{key}")
            empty += [f"{field}.{key}"] if part is None else []
        present = {key: part for key, part in parts.items() if part is not None} if parts is not None else value
        if present is None or present == {}:
            continue
        try:
            json_format.ParseDict({field: present}, message)
        except json_format.ParseError as error:
            raise LedgerError(f"{field}: {_parse_message(error)}") from None
    return message, paths, empty


def _parse_message(error: Exception) -> str:
    return str(error).rsplit(" at ", 1)[0]


# ---- keys


def key_pb(stored: StoredKey, now_s: float) -> pb.Key:
    """Return a stored key as a Key message."""
    return pb.Key(
        name=f"tenants/{stored.tenant}/keys/{stored.id}" if stored.id else "",
        display_name=stored.name,
        role=stored.role,
        create_time=timestamp(stored.created_at),
        expire_time=timestamp(stored.expires_at),
        revoke_time=timestamp(stored.revoked_at),
        rotated_from=stored.rotated_from,
        state=key_state(stored, now_s),
    )


def stored_key(message: pb.Key) -> StoredKey:
    """Return a Key message as a stored key; the inverse of `key_pb`."""
    tenant, _, key_id = message.name.removeprefix("tenants/").partition("/keys/")
    expires_at, revoked_at = (seconds_or_none(message, name) for name in ("expire_time", "revoke_time"))
    created_at = seconds(message.create_time)
    return StoredKey(
        key_id, tenant, message.display_name, message.role, created_at, expires_at, revoked_at, message.rotated_from
    )


# ---- sums of calls


def slo_pb(slo_sum: SloSum) -> usage_pb2.SloSum:
    """Return an SloSum as a message. An SloSum holds the numbers of calls of a tenant and model that met and missed the
    SLO."""
    counts = {name: getattr(slo_sum, name) for name in (*COUNTED, *NOT_COUNTED)}
    message = usage_pb2.SloSum(tenant=slo_sum.tenant, model=slo_sum.model, **counts)
    if slo_sum.objective is not None:
        message.ttft_s, message.itl_s = slo_sum.objective.ttft_s, slo_sum.objective.itl_s
        message.target = slo_sum.objective.target
    return message


def slo_sum(message: usage_pb2.SloSum) -> SloSum:
    """Return the SloSum that a message holds; the inverse of `slo_pb`."""
    is_known = message.HasField("ttft_s")
    objective = SloObjective(message.ttft_s, message.itl_s, message.target) if is_known else None
    counts = {name: int(getattr(message, name)) for name in (*COUNTED, *NOT_COUNTED)}
    return SloSum(message.tenant, message.model, objective, **counts)
