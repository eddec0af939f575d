"""Jobs by the time of their end."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_jobs_end_time_us", "jobs", ["end_time_us"])


def downgrade() -> None:
    op.drop_index("ix_jobs_end_time_us", "jobs")
