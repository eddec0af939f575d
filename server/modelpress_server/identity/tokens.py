"""Static tokens. Only their SHA-256 is kept and compared.

A token has 256 random bits, so that its plain hash cannot be guessed from; passwords would need a slow one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from modelpress_server.config import TOKENS_NAME, Settings, SettingsError
from modelpress_server.identity.roles import ALL_PROJECTS, Caller, Role, parse_grant
from modelpress_server.watched_file import WatchedFile

PREFIX = "mp_"
_HASHED = "sha256:"


@dataclass(frozen=True)
class TokenRecord:
    """A token as it is kept. Times are seconds since the epoch; `expires_s` 0: never."""

    name: str
    sha256: str
    grants: Mapping[str, str]
    created_s: float
    expires_s: float = 0.0

    def caller(self) -> Caller:
        """Whom the token names."""
        return Caller(f"token:{self.name}", {project: Role[role.upper()] for project, role in self.grants.items()})


Known = Mapping[bytes, tuple[Caller, float]]  # hash of a token -> whose it is, and when it expires (0: never)
_NONE: Known = {}


def digest(token: str) -> bytes:
    """What is kept of a token."""
    return hashlib.sha256(token.encode(errors="replace")).digest()


class Tokens:
    """All static tokens; the files are read again when they change."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError."""
        everything = {ALL_PROJECTS: Role.ADMIN}
        self._fixed: Known = {}
        if settings.token is not None:
            if not settings.token.strip():
                raise SettingsError("token: is empty; set a long random one.")
            self._fixed = {digest(settings.token.strip()): (Caller("token:settings", everything), 0.0)}
        self._files: list[WatchedFile[Known]] = []
        if settings.token_file is not None:
            self._files.append(WatchedFile(settings.token_file, read_token_file, "token_file"))
        # Made by the first `compress-server token add`, perhaps while the server runs.
        self._kept = WatchedFile(settings.data_dir / TOKENS_NAME, _known, "data_dir", optional=_NONE)

    @property
    def any(self) -> bool:
        """Whether tokens are asked for: also when the last one of a file has been revoked."""
        return bool(self._fixed or self._files) or self._kept.exists

    def find(self, token: str, now_s: float) -> Caller | None:
        """Whose token it is; None: unknown, revoked or expired."""
        key = digest(token)
        for known in (self._fixed, self._kept.get(), *(file.get() for file in self._files)):
            # A sender cannot choose the bytes of the hash, so that the time of this look-up tells nothing of a token.
            if key in known:
                caller, expires_s = known[key]
                return caller if not expires_s or now_s < expires_s else None
        return None


def read_token_file(path: Path) -> Known:
    """A file with one token a line: `TOKEN [PROJECT[:ROLE] ...]`, or its hash as `sha256:HEX`. Raises SettingsError."""
    lines = path.read_text("utf-8").splitlines()
    known: dict[bytes, tuple[Caller, float]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        token, *grants = line.split()
        try:
            key = bytes.fromhex(token.removeprefix(_HASHED)) if token.startswith(_HASHED) else digest(token)
            granted = dict(map(parse_grant, grants)) or {ALL_PROJECTS: Role.ADMIN}
        except ValueError as error:
            raise SettingsError(f"token_file: {path}, line {number}: {error}.") from error
        known[key] = Caller(f"token:line {number}", granted), 0.0
    if not known:
        raise SettingsError(f"token_file: {path} holds no token. Write one a line.")
    return known


class TokenKeeper:
    """The tokens of a data folder, for `compress-server token`; the server reads the file, and never writes it."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / TOKENS_NAME

    def records(self) -> list[TokenRecord]:
        """All, the oldest first. Raises SettingsError."""
        try:
            return _read_records(self._path)
        except FileNotFoundError:
            return []

    def add(self, name: str, grants: Mapping[str, Role], now_s: float, expires_s: float = 0.0) -> str:
        """Makes a token and returns it: it can be read nowhere later. Raises SettingsError for a name that is taken."""
        token = PREFIX + secrets.token_urlsafe(32)
        given = {project: role.name.lower() for project, role in grants.items()}
        with self._changing() as records:
            if any(record.name == name for record in records):
                raise SettingsError(f"There is a token named {name}. Revoke it, or choose another name.")
            records.append(TokenRecord(name, digest(token).hex(), given, now_s, expires_s))
        return token

    def revoke(self, name: str) -> None:
        """Takes a token back. Raises SettingsError where there is none of the name."""
        with self._changing() as records:
            kept = [record for record in records if record.name != name]
            if len(kept) == len(records):
                raise SettingsError(f"There is no token named {name}.")
            records[:] = kept

    @contextmanager
    def _changing(self) -> Iterator[list[TokenRecord]]:
        """One command at a time; the file is there whole or as it was."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            records = self.records()
            yield records
            document = json.dumps({"tokens": [asdict(record) for record in records]}, indent=1)
            partial = self._path.with_suffix(".partial")
            partial.unlink(missing_ok=True)
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(document + "\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path)
        finally:
            os.close(lock)


def _read_records(path: Path) -> list[TokenRecord]:
    try:
        return [TokenRecord(**entry) for entry in json.loads(path.read_text("utf-8"))["tokens"]]
    except (ValueError, TypeError, KeyError) as error:
        raise SettingsError(f"data_dir: {path} is no list of tokens ({error}). Restore it, or remove it.") from error


def _known(path: Path) -> Known:
    return {bytes.fromhex(record.sha256): (record.caller(), record.expires_s) for record in _read_records(path)}
