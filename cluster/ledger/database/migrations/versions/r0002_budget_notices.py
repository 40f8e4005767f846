"""Table of budget notices: the budget thresholds that were crossed, and the state of each notice's delivery."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "r0002"
down_revision = "r0001"
branch_labels = None
depends_on = None
KIND = "expand"


def upgrade() -> None:
    """Create the table `budget_notices`."""
    op.create_table(
        "budget_notices",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("budget", sa.String(32), nullable=False),
        sa.Column("period", sa.String(10), nullable=False),
        sa.Column("threshold", sa.Float(53), nullable=False),
        sa.Column("used_tokens", sa.BigInteger, nullable=False),
        sa.Column("limit_tokens", sa.BigInteger, nullable=False),
        sa.Column("noticed_at", sa.Float(53), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_try_at", sa.Float(53), nullable=False),
        sa.Column("delivered_at", sa.Float(53)),
        sa.PrimaryKeyConstraint("id", name="pk_budget_notices"),
    )
