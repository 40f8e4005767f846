"""Add a column to the usage table: how many cached tokens the gateway predicted for a call.

The previous release can still insert rows, which do not have this column.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "r0006"
down_revision = "r0005"
branch_labels = None
depends_on = None
KIND = "expand"


def upgrade() -> None:
    """Add the column `predicted_cached_tokens` to the table `usage`. In existing rows it is NULL, which means that
    there was no prediction."""
    op.add_column("usage", sa.Column("predicted_cached_tokens", sa.BigInteger))
