"""Add columns to the usage table: a call's gateway, and the worker, pod and node where the call ended.

The columns have a default, because during an upgrade the previous release inserts rows without them.
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
    """Add the columns `worker`, `pod`, `node` and `gateway`, which are empty in existing rows."""
    for name in ("worker", "pod", "node", "gateway"):
        op.add_column("usage", sa.Column(name, sa.String(255), nullable=False, server_default=sa.text("''")))
