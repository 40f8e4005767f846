"""Add a column to the change sequence: a random id of the database.

Snapshots that a gateway has saved of another database are recognized by this id. The previous release neither reads nor
writes the column.
"""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "r0008"
down_revision = "r0007"
branch_labels = None
depends_on = None
KIND = "expand"


def upgrade() -> None:
    """Add the column `database_id` to the table `change_sequence`, and give the database an id."""
    column = sa.Column("database_id", sa.String(32), nullable=False, server_default=sa.text("''"))
    op.add_column("change_sequence", column)
    table = sa.table("change_sequence", sa.column("id", sa.Integer), sa.column("database_id", sa.String))
    op.execute(table.update().where(table.c.id == 1).values(database_id=secrets.token_hex(16)))
