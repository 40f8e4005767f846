"""Columns of the usage table for a call's gateway, and for the worker, pod and node where the call ended.

The previous release inserts rows without these columns.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "r0004"
down_revision = "r0003"
branch_labels = None
depends_on = None
KIND = "expand"


def upgrade() -> None:
    """Add the columns. The columns are empty in existing rows."""
    for name in ("worker", "pod", "node", "gateway"):
        op.add_column("usage", sa.Column(name, sa.String(255), nullable=False, server_default=sa.text("''")))
