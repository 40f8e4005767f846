"""Column of the usage table: the number of completion tokens that are reasoning.

The previous release inserts rows without this column.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "r0005"
down_revision = "r0004"
branch_labels = None
depends_on = None
KIND = "expand"


def upgrade() -> None:
    """Add the column. It is 0 in existing rows."""
    column = sa.Column("reasoning_tokens", sa.BigInteger, nullable=False, server_default=sa.text("0"))
    op.add_column("usage", column)
