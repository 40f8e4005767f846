"""Table of resume claims. A gateway resumes a broken stream only if it can claim the names of the stream."""

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
