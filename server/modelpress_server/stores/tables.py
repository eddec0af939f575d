"""The tables. Protobuf messages are stored whole; columns beside them are what queries need.

Times are microseconds since the epoch in columns named `_us`.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    }
)

models = Table(
    "models",
    metadata,
    Column("id", String(26), primary_key=True),
    Column("project", String(63), nullable=False),
    Column("state", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("inspection_key", LargeBinary(32), nullable=False),
    Column("message", LargeBinary, nullable=False),
    Column("owner", String(26)),  # the server that inspects it
    Index("ix_models_project_id", "project", "id"),
    Index("ix_models_state_id", "state", "id"),
    Index("ix_models_inspection_key", "inspection_key"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(26), primary_key=True),
    Column("project", String(63), nullable=False),
    # No foreign key: a job outlives its model.
    Column("model_id", String(26), nullable=False),
    Column("state", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("cache_key", LargeBinary(32), nullable=False),
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("queue_deadline_us", BigInteger),
    Column("end_time_us", BigInteger),
    Column("last_sequence", BigInteger, nullable=False),
    Column("compacted_sequence", BigInteger, nullable=False),
    Column("last_log_sequence", BigInteger, nullable=False),
    Column("message", LargeBinary, nullable=False),
    Column("manifest", LargeBinary, nullable=False),
    # The server that runs it, and how often it was claimed: what an earlier claim still wants to write does not count.
    Column("owner", String(26)),
    Column("fence", BigInteger, nullable=False, server_default="0"),
    Index("ix_jobs_project_id", "project", "id"),
    # The queue of a project in its order, its oldest job, and what expires next: each one step, however long it is.
    Index("ix_jobs_queue", "state", "project", text("priority DESC"), "id"),
    Index("ix_jobs_state_project_id", "state", "project", "id"),
    Index("ix_jobs_state_queue_deadline_us", "state", "queue_deadline_us"),
    Index("ix_jobs_model_id", "model_id"),
    Index("ix_jobs_end_time_us", "end_time_us"),
)

# Servers that share this database, each until its lease ends. What others own is nobody's any more.
servers = Table(
    "servers",
    metadata,
    Column("id", String(26), primary_key=True),
    Column("lease_until_us", BigInteger, nullable=False),
)

# Labels of models and jobs; `owner` is the id, unique over both.
labels = Table(
    "labels",
    metadata,
    Column("owner", String(26), primary_key=True),
    Column("key", String(63), primary_key=True),
    Column("value", String(255), nullable=False),
)

job_events = Table(
    "job_events",
    metadata,
    Column("job_id", String(26), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True),
    Column("message", LargeBinary, nullable=False),
)

job_logs = Table(
    "job_logs",
    metadata,
    Column("job_id", String(26), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True),
    Column("time_us", BigInteger, nullable=False),
    Column("severity", String(7), nullable=False),
    Column("text", Text, nullable=False),
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", String(26), primary_key=True),
    Column("project", String(63), nullable=False),
    Column("sha256", LargeBinary(32), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("state", Integer, nullable=False),
    Column("committed_size", BigInteger, nullable=False),
    Column("create_time_us", BigInteger, nullable=False),
    Column("expire_time_us", BigInteger, nullable=False),
    Column("writer", String(26)),  # who took it last: what an earlier one still wants to commit does not count
    Index("ix_uploads_project_sha256", "project", "sha256"),
    Index("ix_uploads_expire_time_us", "expire_time_us"),
)

# Which project sees which blob: another project's digests do not exist for it.
project_blobs = Table(
    "project_blobs",
    metadata,
    Column("project", String(63), primary_key=True),
    Column("sha256", LargeBinary(32), primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("used_us", BigInteger, nullable=False),
    Index("ix_project_blobs_sha256", "sha256"),
    Index("ix_project_blobs_used_us", "used_us"),
)

# What keeps a blob alive; `owner` is the id of a model or job.
blob_references = Table(
    "blob_references",
    metadata,
    Column("owner", String(26), primary_key=True),
    Column("sha256", LargeBinary(32), primary_key=True),
    Column("project", String(63), nullable=False),
    Index("ix_blob_references_project_sha256", "project", "sha256"),
)

# What a project has used so far.
usage = Table(
    "usage",
    metadata,
    Column("project", String(63), primary_key=True),
    Column("jobs", BigInteger, nullable=False),
    Column("cpu_s", Float, nullable=False),
    Column("run_s", Float, nullable=False),
)

# The job whose result serves identical ones; deleting the job deletes the entry.
result_cache = Table(
    "result_cache",
    metadata,
    Column("project", String(63), primary_key=True),
    Column("cache_key", LargeBinary(32), primary_key=True),
    Column("job_id", String(26), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Index("ix_result_cache_job_id", "job_id"),
)

request_ids = Table(
    "request_ids",
    metadata,
    Column("project", String(63), primary_key=True),
    Column("kind", String(6), primary_key=True),
    Column("request_id", String(36), primary_key=True),
    Column("payload_sha256", LargeBinary(32), nullable=False),
    Column("resource_id", String(26), nullable=False),
    Column("create_time_us", BigInteger, nullable=False),
    Index("ix_request_ids_create_time_us", "create_time_us"),
)

# Events that are to be brought somewhere; `due_us`: not before.
outbox = Table(
    "outbox",
    metadata,
    Column("endpoint", String(63), primary_key=True),
    Column("id", String(26), primary_key=True),
    Column("create_time_us", BigInteger, nullable=False),
    Column("due_us", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Index("ix_outbox_endpoint_due_us", "endpoint", "due_us"),
)
