"""Servers that share a database: who runs what, and indexes for long queues."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "servers",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("lease_until_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_servers")),
    )
    op.add_column("jobs", sa.Column("owner", sa.String(length=26)))
    op.add_column("jobs", sa.Column("fence", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("models", sa.Column("owner", sa.String(length=26)))
    op.add_column("uploads", sa.Column("writer", sa.String(length=26)))
    op.create_index("ix_jobs_queue", "jobs", ["state", "project", sa.text("priority DESC"), "id"])
    op.create_index("ix_jobs_state_project_id", "jobs", ["state", "project", "id"])
    op.create_index("ix_jobs_state_queue_deadline_us", "jobs", ["state", "queue_deadline_us"])
    op.drop_index("ix_jobs_state_id", "jobs")


def downgrade() -> None:
    op.create_index("ix_jobs_state_id", "jobs", ["state", "id"])
    for name in ("ix_jobs_state_queue_deadline_us", "ix_jobs_state_project_id", "ix_jobs_queue"):
        op.drop_index(name, "jobs")
    op.drop_column("uploads", "writer")
    op.drop_column("models", "owner")
    op.drop_column("jobs", "fence")
    op.drop_column("jobs", "owner")
    op.drop_table("servers")
