"""What a caller may do in a project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from modelpress_server.names import is_project

ALL_PROJECTS = "*"


class Role(IntEnum):
    """Each may do what those before it may."""

    READER = 1  # read models, jobs, logs, reports, files
    SUBMITTER = 2  # upload, create models and jobs, cancel
    ADMIN = 3  # delete and relabel


@dataclass(frozen=True)
class Caller:
    """Who calls. `grants`: project, or ALL_PROJECTS, to role."""

    name: str
    grants: Mapping[str, Role]

    def role(self, project: str) -> Role | None:
        """The role in a project; None: the project does not exist for this caller."""
        roles = [self.grants[key] for key in (project, ALL_PROJECTS) if key in self.grants]
        return max(roles, default=None)


ANYBODY = Caller("anonymous", {ALL_PROJECTS: Role.ADMIN})

# Methods of the API that need more than a reader.
_NEEDS = {
    **dict.fromkeys(
        ("FindMissingBlobs", "CreateUpload", "WriteUpload", "CancelUpload", "CreateModel", "CreateJob", "CancelJob"),
        Role.SUBMITTER,
    ),
    **dict.fromkeys(("DeleteJob", "DeleteModel", "UpdateModel", "UpdateJob"), Role.ADMIN),
}
_READS = ("Get", "List", "Watch", "Wait", "Stream", "ReadBlob")


def needed_role(method: str) -> Role:
    """The role that a method needs; one that nobody thought of needs the highest."""
    if method in _NEEDS:
        return _NEEDS[method]
    return Role.READER if method.startswith(_READS) else Role.ADMIN


def parse_grant(text: str) -> tuple[str, Role]:
    """`PROJECT:ROLE` or `*:ROLE`; a project alone is granted as admin. Raises ValueError."""
    project, _, role = text.partition(":")
    if project != ALL_PROJECTS and not is_project(project):
        raise ValueError(f"{text!r}: {project!r} is neither a project's name ([A-Za-z0-9_-]) nor '*'")
    try:
        return project, Role[role.upper()] if role else Role.ADMIN
    except KeyError:
        raise ValueError(f"{text!r}: {role!r} is no role; there are {', '.join(role_names())}") from None


def role_names() -> list[str]:
    """reader, submitter, admin."""
    return [role.name.lower() for role in Role]
