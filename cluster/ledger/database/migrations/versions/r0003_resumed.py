"""Table of resume claims: the names that gateways claim before they resume broken streams."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "r0003"
down_revision = "r0002"
branch_labels = None
depends_on = None
KIND = "expand"


def upgrade() -> None:
    """Create the table `resumed`."""
    op.create_table(
        "resumed",
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("expires_at_s", sa.Float(53), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_resumed"),
    )
    op.create_index("ix_resumed_expires_at_s", "resumed", ["expires_at_s"])
