"""cluster.admin.v1 on the wire: tenants and keys as messages, for the gateway and for its command line alike.

In messages a priority class is `priority_class`, as `class` is a word of most languages; in JSON, masks, errors and
the configuration it is `class`.
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
from cluster.api.outcomes import invalid
from cluster.ledger.errors import LedgerError
from cluster.ledger.rows import StoredKey, StoredTenant, key_state
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
    """`acme` of `tenants/acme`. Raises CallError that names the field."""
    found = _NAME.fullmatch(value)
    if found is None or found[2]:
        raise invalid(field, "must be like tenants/acme: a-z, 0-9, '-', '_' and '.', 63 characters at most")
    return found[1]


def key_name(value: str, field: str) -> tuple[str, str]:
    """Tenant and id of `tenants/acme/keys/k1`. Raises CallError that names the field."""
    found = _NAME.fullmatch(value)
    if found is None or not found[2]:
        raise invalid(field, "must be like tenants/acme/keys/k1")
    return found[1], found[2]


# ---- time


def timestamp(at_s: float | None) -> Timestamp | None:
    """As a message; None and what no calendar has: unset."""
    if at_s is None or not 0 <= at_s <= _LAST_S:
        return None
    made = Timestamp()
    made.FromNanoseconds(round(at_s * 1e6) * 1000)
    return made


def seconds(value: Timestamp) -> float:
    """Since the epoch."""
    return value.seconds + value.nanos / 1e9


def seconds_or_none(message: Message, field: str) -> float | None:
    """Of a field that may be unset. Raises CallError for what is no time."""
    if not message.HasField(field):
        return None
    at_s = seconds(getattr(message, field))
    if not math.isfinite(at_s) or not 0 <= at_s <= _LAST_S:
        raise invalid(field, "is no time between 1970 and 9999")
    return at_s


# ---- messages as plain values


def plain(message: Message) -> dict[str, Any]:
    """What is set in a message, by the configuration's names; nothing of it shares the message's memory."""
    return {_config_name(message, field): _value(field, value) for field, value in message.ListFields()}


def _config_name(message: Message, field: FieldDescriptor) -> str:
    return "class" if field.name == "priority_class" and isinstance(message, pb.Tenant) else field.name


def _value(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(value)
    if field.message_type is None:
        return list(value) if field.is_repeated else value
    return [plain(one) for one in value] if field.is_repeated else plain(value)


# ---- tenants


def tenant_pb(stored: StoredTenant) -> pb.Tenant:
    """As the API shows it."""
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
    """What `tenant_pb` has made. Raises LedgerError when another release says what this one does not know."""
    row = {k: v for k, v in plain(message).items() if k in SETTABLE}
    row |= {"name": message.name.removeprefix("tenants/"), "suspended": message.suspended}
    try:
        policy = TenantPolicy.from_json(row)
    except ValueError as error:
        raise LedgerError(f"the gateway's answer is not understood: {error}") from None
    times = seconds(message.create_time), seconds(message.update_time)
    return StoredTenant(policy, message.origin, *times, dict(message.model_aliases))


def own_fields(tenant: pb.Tenant, unset: Sequence[str]) -> dict[str, Any]:
    """What a new tenant has beside the defaults; `unset` are paths that stay empty where the defaults are not."""
    own = {name: value for name, value in plain(tenant).items() if name in SETTABLE}
    for path in unset:
        _put(own, *_parts(path, "unset_mask"), None)
    return own


def changes(tenant: pb.Tenant, mask: Sequence[str]) -> tuple[dict[str, Any], set[str]]:
    """What an update changes, None taking away, and which maps it replaces whole. Without a mask: what is set."""
    values = {name: value for name, value in plain(tenant).items() if name in SETTABLE}
    if not mask:
        return values, set()
    found: dict[str, Any] = {}
    whole: set[str] = set()
    for path in mask:
        head, rest = _parts(path, "update_mask")
        if rest:
            if head not in whole:
                _put(found, head, rest, (values.get(head) or {}).get(rest))
        else:
            found[head] = values.get(head)
            if isinstance(found[head], dict):
                whole.add(head)
    return found, whole


def _parts(path: str, field: str) -> tuple[str, str]:
    """`limits.daily_tokens` as its two parts. Raises CallError for what cannot be changed."""
    head, _, rest = path.partition(".")
    head = "class" if head == "priority_class" else head
    if head in OUTPUT_ONLY or head == "name":
        raise invalid(field, f"{path[:80]!r} is output only" + ("; see Suspend, Resume" if head == "suspended" else ""))
    if head not in SETTABLE:
        raise invalid(field, f"{path[:80]!r} is no field of a tenant; there are {', '.join(sorted(SETTABLE))}")
    if head in _NESTED and rest:
        if rest not in _NESTED[head]:
            raise invalid(field, f"{path[:80]!r} is no field; {head} has {', '.join(_NESTED[head])}")
    elif rest and head != "labels":
        raise invalid(field, f"{path[:80]!r}: name {head} as a whole")
    return head, rest.strip("`")


def _put(into: dict[str, Any], head: str, rest: str, value: Any) -> None:
    if not rest:
        into[head] = value
        return
    if not isinstance(into.get(head), dict):
        into[head] = {}
    into[head][rest] = value


def tenant_and_paths(name: str, given: Mapping[str, Any]) -> tuple[pb.Tenant, list[str], list[str]]:
    """A message of plain values by the configuration's names, for those who ask: the message, the paths that are
    given, and those of them that are None. Raises LedgerError that names the field."""
    message = pb.Tenant(name=f"tenants/{name}")
    paths: list[str] = []
    empty: list[str] = []
    for field, value in given.items():
        if field not in SETTABLE:
            raise LedgerError(f"{field}: is unknown; there are {', '.join(sorted(SETTABLE))}")
        parts = value if isinstance(value, Mapping) and (field in _NESTED or field == "labels") else None
        if not parts:
            paths.append(field)
            empty += [field] if value is None or parts == {} else []
        for key, one in (parts or {}).items():
            paths.append(f"{field}.{key}")
            empty += [f"{field}.{key}"] if one is None else []
        kept = {key: one for key, one in parts.items() if one is not None} if parts is not None else value
        if kept is None or kept == {}:
            continue
        try:
            json_format.ParseDict({field: kept}, message)
        except json_format.ParseError as error:
            raise LedgerError(f"{field}: {_parse_message(error)}") from None
    return message, paths, empty


def _parse_message(error: Exception) -> str:
    return str(error).rsplit(" at ", 1)[0]


# ---- keys


def key_pb(stored: StoredKey, now_s: float) -> pb.Key:
    """As the API shows it."""
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
    """What `key_pb` has made."""
    tenant, _, key_id = message.name.removeprefix("tenants/").partition("/keys/")
    expires_at, revoked_at = (seconds_or_none(message, name) for name in ("expire_time", "revoke_time"))
    made_at = seconds(message.create_time)
    return StoredKey(
        key_id, tenant, message.display_name, message.role, made_at, expires_at, revoked_at, message.rotated_from
    )
