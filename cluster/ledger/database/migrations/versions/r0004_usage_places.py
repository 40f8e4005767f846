"""Columns for the place where a call ended and its gateway. The previous release inserts without them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "r0004"
down_revision = "r0003"
branch_labels = None
depends_on = None
KIND = "expand"


def upgrade() -> None:
    """Add the columns, empty in existing rows."""
    for name in ("worker", "pod", "node", "gateway"):
        op.add_column("usage", sa.Column(name, sa.String(255), nullable=False, server_default=sa.text("''")))
