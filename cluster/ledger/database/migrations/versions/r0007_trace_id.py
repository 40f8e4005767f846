"""Add a column to the usage table: the id of a call's trace.

During an upgrade, the previous release inserts rows without this column.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "r0007"
down_revision = "r0006"
branch_labels = None
depends_on = None
KIND = "expand"


def upgrade() -> None:
    """Add the column `trace_id` to the table `usage`. The column is empty in existing rows."""
    column = sa.Column("trace_id", sa.String(32), nullable=False, server_default=sa.text("''"))
    op.add_column("usage", column)
