"""Initial schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    _create_models()
    _create_jobs()
    _create_blobs()


def _create_models() -> None:
    op.create_table(
        "labels",
        sa.Column("owner", sa.String(length=26), nullable=False),
        sa.Column("key", sa.String(length=63), nullable=False),
        sa.Column("value", sa.String(length=255), nullable=False),
        sa.PrimaryKeyConstraint("owner", "key", name=op.f("pk_labels")),
    )
    op.create_table(
        "models",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("state", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("inspection_key", sa.LargeBinary(length=32), nullable=False),
        sa.Column("message", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_models")),
    )
    op.create_index("ix_models_inspection_key", "models", ["inspection_key"], unique=False)
    op.create_index("ix_models_project_id", "models", ["project", "id"], unique=False)
    op.create_index("ix_models_state_id", "models", ["state", "id"], unique=False)
    op.create_table(
        "request_ids",
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=6), nullable=False),
        sa.Column("request_id", sa.String(length=36), nullable=False),
        sa.Column("payload_sha256", sa.LargeBinary(length=32), nullable=False),
        sa.Column("resource_id", sa.String(length=26), nullable=False),
        sa.Column("create_time_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("project", "kind", "request_id", name=op.f("pk_request_ids")),
    )
    op.create_index("ix_request_ids_create_time_us", "request_ids", ["create_time_us"], unique=False)


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("model_id", sa.String(length=26), nullable=False),
        sa.Column("state", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("cache_key", sa.LargeBinary(length=32), nullable=False),
        sa.Column("queue_deadline_us", sa.BigInteger(), nullable=True),
        sa.Column("end_time_us", sa.BigInteger(), nullable=True),
        sa.Column("last_sequence", sa.BigInteger(), nullable=False),
        sa.Column("compacted_sequence", sa.BigInteger(), nullable=False),
        sa.Column("last_log_sequence", sa.BigInteger(), nullable=False),
        sa.Column("message", sa.LargeBinary(), nullable=False),
        sa.Column("manifest", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    op.create_index("ix_jobs_model_id", "jobs", ["model_id"], unique=False)
    op.create_index("ix_jobs_project_id", "jobs", ["project", "id"], unique=False)
    op.create_index("ix_jobs_state_id", "jobs", ["state", "id"], unique=False)
    op.create_table(
        "job_events",
        sa.Column("job_id", sa.String(length=26), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("message", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_events_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "sequence", name=op.f("pk_job_events")),
    )
    op.create_table(
        "job_logs",
        sa.Column("job_id", sa.String(length=26), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("time_us", sa.BigInteger(), nullable=False),
        sa.Column("severity", sa.String(length=7), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_logs_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "sequence", name=op.f("pk_job_logs")),
    )
    op.create_table(
        "result_cache",
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("cache_key", sa.LargeBinary(length=32), nullable=False),
        sa.Column("job_id", sa.String(length=26), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_result_cache_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("project", "cache_key", name=op.f("pk_result_cache")),
    )
    op.create_index("ix_result_cache_job_id", "result_cache", ["job_id"], unique=False)


def _create_blobs() -> None:
    op.create_table(
        "blob_references",
        sa.Column("owner", sa.String(length=26), nullable=False),
        sa.Column("sha256", sa.LargeBinary(length=32), nullable=False),
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.PrimaryKeyConstraint("owner", "sha256", name=op.f("pk_blob_references")),
    )
    op.create_index("ix_blob_references_project_sha256", "blob_references", ["project", "sha256"], unique=False)
    op.create_table(
        "project_blobs",
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("sha256", sa.LargeBinary(length=32), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("used_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("project", "sha256", name=op.f("pk_project_blobs")),
    )
    op.create_index("ix_project_blobs_sha256", "project_blobs", ["sha256"], unique=False)
    op.create_index("ix_project_blobs_used_us", "project_blobs", ["used_us"], unique=False)
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(length=26), nullable=False),
        sa.Column("project", sa.String(length=63), nullable=False),
        sa.Column("sha256", sa.LargeBinary(length=32), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Integer(), nullable=False),
        sa.Column("committed_size", sa.BigInteger(), nullable=False),
        sa.Column("create_time_us", sa.BigInteger(), nullable=False),
        sa.Column("expire_time_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_uploads")),
    )
    op.create_index("ix_uploads_expire_time_us", "uploads", ["expire_time_us"], unique=False)
    op.create_index("ix_uploads_project_sha256", "uploads", ["project", "sha256"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_result_cache_job_id", table_name="result_cache")
    op.drop_table("result_cache")
    op.drop_table("job_logs")
    op.drop_table("job_events")
    op.drop_index("ix_uploads_project_sha256", table_name="uploads")
    op.drop_index("ix_uploads_expire_time_us", table_name="uploads")
    op.drop_table("uploads")
    op.drop_index("ix_request_ids_create_time_us", table_name="request_ids")
    op.drop_table("request_ids")
    op.drop_index("ix_project_blobs_used_us", table_name="project_blobs")
    op.drop_index("ix_project_blobs_sha256", table_name="project_blobs")
    op.drop_table("project_blobs")
    op.drop_index("ix_models_state_id", table_name="models")
    op.drop_index("ix_models_project_id", table_name="models")
    op.drop_index("ix_models_inspection_key", table_name="models")
    op.drop_table("models")
    op.drop_table("labels")
    op.drop_index("ix_jobs_state_id", table_name="jobs")
    op.drop_index("ix_jobs_project_id", table_name="jobs")
    op.drop_index("ix_jobs_model_id", table_name="jobs")
    op.drop_table("jobs")
    op.drop_index("ix_blob_references_project_sha256", table_name="blob_references")
    op.drop_table("blob_references")
