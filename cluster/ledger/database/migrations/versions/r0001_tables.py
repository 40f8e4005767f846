"""Tables of tenants, keys, usage, audit and the change sequence."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "r0001"
down_revision = None
branch_labels = None
depends_on = None
KIND = "expand"


def upgrade() -> None:
    """Create the tables, and the only row of the change sequence."""
    _tenants_and_keys()
    _usage()
    _audit()
    sequence = op.create_table(
        "change_sequence",
        sa.Column("id", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("value", sa.BigInteger, nullable=False),
        sa.Column("reload_from", sa.BigInteger, nullable=False, server_default=sa.text("0")),
        sa.PrimaryKeyConstraint("id", name="pk_change_sequence"),
    )
    op.bulk_insert(sequence, [{"id": 1, "value": 1, "reload_from": 0}])
    op.create_table(
        "schema_history",
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("applied_at", sa.Float(53), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_schema_history"),
    )


def _tenants_and_keys() -> None:
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("policy", sa.JSON, nullable=False),
        sa.Column("origin", sa.String(8), nullable=False),
        sa.Column("model_aliases", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("updated_at", sa.Float(53), nullable=False),
        sa.Column("removed_at", sa.Float(53)),
        sa.Column("changed", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_tenants"),
    )
    op.create_index("ix_tenants_changed", "tenants", ["changed"])
    op.create_table(
        "keys",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("expires_at", sa.Float(53)),
        sa.Column("revoked_at", sa.Float(53)),
        sa.Column("rotated_from", sa.String(32), nullable=False),
        sa.Column("changed", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
        sa.UniqueConstraint("digest", name="uq_keys_digest"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.name"], name="fk_keys_tenant"),
    )
    op.create_index("ix_keys_tenant", "keys", ["tenant"])
    op.create_index("ix_keys_changed", "keys", ["changed"])


def _usage() -> None:
    op.create_table(
        "usage",
        sa.Column("record_id", sa.String(128), nullable=False),
        sa.Column("tenant", sa.String(255), nullable=False),
        sa.Column("key_id", sa.String(128), nullable=False),
        sa.Column("model", sa.String(255), nullable=False),
        sa.Column("version", sa.String(255), nullable=False),
        sa.Column("adapter", sa.String(255), nullable=False),
        sa.Column("request_id", sa.String(128), nullable=False),
        sa.Column("segment", sa.BigInteger, nullable=False),
        sa.Column("opened_at_s", sa.Float(53), nullable=False),
        sa.Column("day", sa.String(10), nullable=False),
        sa.Column("outcome", sa.String(255), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("generated_tokens", sa.BigInteger, nullable=False),
        sa.Column("queue_s", sa.Float(53), nullable=False),
        sa.Column("ttft_s", sa.Float(53)),
        sa.Column("duration_s", sa.Float(53), nullable=False),
        sa.Column("gpu", sa.String(255), nullable=False),
        sa.Column("gpu_seconds", sa.Float(53), nullable=False),
        sa.Column("delivered_unknown", sa.Boolean, nullable=False),
        sa.Column("labels", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("record_id", name="pk_usage"),
    )
    op.create_index("ix_usage_day_tenant_model", "usage", ["day", "tenant", "model"])
    op.create_index("ix_usage_tenant_opened_at_s", "usage", ["tenant", "opened_at_s"])


def _audit() -> None:
    op.create_table(
        "audit",
        sa.Column("event_id", sa.String(32), nullable=False),
        sa.Column("at_s", sa.Float(53), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("actor", sa.String(255), nullable=False),
        sa.Column("tenant", sa.String(255), nullable=False),
        sa.Column("object", sa.String(255), nullable=False),
        sa.Column("outcome", sa.String(32), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("source", sa.String(255), nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("event_id", name="pk_audit"),
    )
    op.create_index("ix_audit_at_s", "audit", ["at_s"])
    op.create_index("ix_audit_tenant_at_s", "audit", ["tenant", "at_s"])
    op.create_table(
        "erased_tenants",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("erased_at", sa.Float(53), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_erased_tenants"),
    )
