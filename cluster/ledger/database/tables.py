"""The tables after the newest migration. Times are seconds since the epoch.

JSON columns have the type JSON on SQLite and on PostgreSQL.

`change_sequence` has one row. Every transaction that changes tenants or keys first adds 1 to the row's value, which
locks the row until the commit. So numbers become visible in order, and a reader that has seen n has seen all changes
up to n. (With a database sequence, 6 could be committed before 5, and a reader would miss 5.) Each row of `tenants`
and `keys` has the number of the row's last change, and readers select rows with newer numbers. `reload_from` is the
number of the last deletion of rows: a reader that has seen only smaller numbers reads all rows again. `database_id` is
random. A reader that has seen another database reads all rows again too, because equal numbers of two databases mean
different changes.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

tenants = Table(
    "tenants",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("policy", JSON, nullable=False),
    Column("origin", String(8), nullable=False),
    Column("model_aliases", JSON, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("updated_at", Float(53), nullable=False),
    Column("removed_at", Float(53)),
    Column("changed", BigInteger, nullable=False, index=True),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", String(63), ForeignKey("tenants.name"), nullable=False, index=True),
    Column("name", String(255), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("role", String(16), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("expires_at", Float(53)),
    Column("revoked_at", Float(53)),
    Column("rotated_from", String(32), nullable=False),
    Column("changed", BigInteger, nullable=False, index=True),
)

usage = Table(
    "usage",
    metadata,
    Column("record_id", String(128), primary_key=True),
    Column("tenant", String(255), nullable=False),
    Column("key_id", String(128), nullable=False),
    Column("model", String(255), nullable=False),
    Column("version", String(255), nullable=False),
    Column("adapter", String(255), nullable=False),
    Column("request_id", String(128), nullable=False),
    Column("segment", BigInteger, nullable=False),
    Column("opened_at_s", Float(53), nullable=False),
    Column("day", String(10), nullable=False),
    Column("outcome", String(255), nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("generated_tokens", BigInteger, nullable=False),
    Column("queue_s", Float(53), nullable=False),
    Column("ttft_s", Float(53)),
    Column("duration_s", Float(53), nullable=False),
    Column("gpu", String(255), nullable=False),
    Column("gpu_seconds", Float(53), nullable=False),
    Column("delivered_unknown", Boolean, nullable=False),
    Column("labels", JSON, nullable=False),
    Column("worker", String(255), nullable=False, server_default=text("''")),
    Column("pod", String(255), nullable=False, server_default=text("''")),
    Column("node", String(255), nullable=False, server_default=text("''")),
    Column("gateway", String(255), nullable=False, server_default=text("''")),
    Column("reasoning_tokens", BigInteger, nullable=False, server_default=text("0")),
    Column("predicted_cached_tokens", BigInteger),
    Column("trace_id", String(32), nullable=False, server_default=text("''")),
    Index("ix_usage_day_tenant_model", "day", "tenant", "model"),
    Index("ix_usage_tenant_opened_at_s", "tenant", "opened_at_s"),
)

audit = Table(
    "audit",
    metadata,
    Column("event_id", String(32), primary_key=True),
    Column("at_s", Float(53), nullable=False, index=True),
    Column("kind", String(32), nullable=False),
    Column("action", String(64), nullable=False),
    Column("actor", String(255), nullable=False),
    Column("tenant", String(255), nullable=False),
    Column("object", String(255), nullable=False),
    Column("outcome", String(32), nullable=False),
    Column("reason", Text, nullable=False),
    Column("source", String(255), nullable=False),
    Column("details", JSON, nullable=False),
    Index("ix_audit_tenant_at_s", "tenant", "at_s"),
)

erased = Table(
    "erased_tenants",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("erased_at", Float(53), nullable=False),
)

budget_notices = Table(
    "budget_notices",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", String(63), nullable=False),
    Column("budget", String(32), nullable=False),
    Column("period", String(10), nullable=False),
    Column("threshold", Float(53), nullable=False),
    Column("used_tokens", BigInteger, nullable=False),
    Column("limit_tokens", BigInteger, nullable=False),
    Column("noticed_at", Float(53), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_try_at", Float(53), nullable=False),
    Column("delivered_at", Float(53)),
)

resumed = Table(
    "resumed",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("expires_at_s", Float(53), nullable=False, index=True),
)

change_sequence = Table(
    "change_sequence",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("value", BigInteger, nullable=False),
    Column("reload_from", BigInteger, nullable=False, server_default=text("0")),
    Column("database_id", String(32), nullable=False, server_default=text("''")),
)

schema_history = Table(
    "schema_history",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("kind", String(16), nullable=False),
    Column("applied_at", Float(53), nullable=False),
)
